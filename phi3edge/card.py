"""README.md of an exported folder: the model card that a hub shows, from what the folder itself says.

The front matter is that of Hugging Face's model cards. Nothing is measured or guessed here: the text is made of
phi3edge.json, report.json and eval.json, and what is not in them is not said.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PureWindowsPath
from statistics import median

from phi3edge import _toml, folders, manifest
from phi3edge.errors import ConfigError
from phi3edge.files import write_text
from phi3edge.metrics import METRICS, show_value
from phi3edge.report import Report, read_report
from phi3edge.types import JSON
from phi3edge.units import size

_FORMATS = {"gguf": "GGUF", "onnx": "ONNX Runtime GenAI"}
_LIBRARIES = {"gguf": "gguf", "onnx": "onnxruntime-genai"}
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def write(folder: Path) -> Path:
    """Write README.md into an artifact's folder, in the place of an earlier one.

    Args:
        folder: one that export wrote.

    Returns:
        The file.

    Raises:
        OutputError: no manifest, or the folder cannot be written.
        ConfigError: report.json or eval.json is not one that this phi3edge reads.
    """
    write_text(folder / folders.CARD, render(folder))
    return folder / folders.CARD


def render(folder: Path) -> str:
    """The card's text; see `write`."""
    said = manifest.read_manifest(folder)
    report = read_report(folder / folders.REPORT) if (folder / folders.REPORT).is_file() else None
    parts = [
        _front_matter(said),
        _what_it_is(said),
        _files(said),
        _run(said),
        _weights(said),
        _measured(report),
        _tasks(folder / folders.EVAL),
        _calibration(said),
        _notes(said, report),
        _again(said),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(said: JSON) -> str:
    model, format_ = said["model"], said["format"]
    lines = [f"license: {_yaml(model['licence'])}"] if model["licence"] else []
    if _HUB_NAME.fullmatch(model["repository"] or ""):
        lines += [f"base_model: {_yaml(model['repository'])}", "base_model_relation: quantized"]
    lines += [f"library_name: {_LIBRARIES[format_]}", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in (format_, model["family"], "phi3edge")]
    return "\n".join(["---", *lines, "---"])


def _yaml(text: str) -> str:
    """A scalar; JSON's strings are YAML's, too."""
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _what_it_is(said: JSON) -> str:
    model, format_ = said["model"], _FORMATS[said["format"]]
    origin = f"`{model['repository']}`" if _HUB_NAME.fullmatch(model["repository"] or "") else f"`{model['name']}`"
    commit = f" at commit `{model['revision']}`" if model["revision"] else ""
    bits = said["plan"]["bits_per_weight"]
    return (
        f"# {model['name']}, {said['recipe']['name']}, {format_}\n\n"
        f"{origin}{commit}, {model['parameters'] / 1e9:.2f} B weights, as {format_} with recipe "
        f"`{said['recipe']['name']}`: {bits:.2f} bits per weight. Made for target `{said['target']}`, for a context of "
        f"{said['context']} tokens with a KV cache of type {said['kv_cache']}."
    )


def _files(said: JSON) -> str:
    rows = [[f"`{f['name']}`", size(f["bytes"]), f"`{f['sha256']}`"] for f in said["files"]]
    return (
        f"## Files\n\n{_table(['file', 'size', 'SHA-256'], rows)}\n\n`phi3edge verify FOLDER` holds them against these."
    )


def _run(said: JSON) -> str:
    theirs = _llama_cpp(said) if said["format"] == "gguf" else _genai(said)
    return f"## Run it\n\n{_code('phi3edge chat FOLDER', 'sh')}\n\n{theirs}"


def _llama_cpp(said: JSON) -> str:
    cache = said["kv_cache"]
    quantized = f" -fa on -ctk {cache} -ctv {cache}" if cache.startswith("q") else f" -ctk {cache} -ctv {cache}"
    command = f"llama-cli -m {said['files'][0]['name']} -c {said['context']}{'' if cache == 'f16' else quantized}"
    return f"With llama.cpp:\n\n{_code(command, 'sh')}"


def _genai(said: JSON) -> str:
    needs = " ".join(f"'{name}{least}'" for name, least in said.get("requires", {}).items())
    code = f"""import json
import onnxruntime_genai as og

model = og.Model("FOLDER")
tokenizer = og.Tokenizer(model)
chat = [{{"role": "user", "content": "Why is the sky blue?"}}]
params = og.GeneratorParams(model)
params.set_search_options(max_length={said["context"]}, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode(tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=True)))
stream = tokenizer.create_stream()
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)"""
    return f"With onnxruntime-genai (`pip install {needs}`):\n\n{_code(code, 'python')}"


def _weights(said: JSON) -> str:
    rows = [
        [r["role"], f"`{r['codec']}`", r["method"], str(r["tensors"]), size(r["bytes"])] for r in said["plan"]["roles"]
    ]
    return f"## Weights\n\n{_table(['role', 'codec', 'method', 'tensors', 'bytes'], rows)}"


def _measured(report: Report | None) -> str:
    if report is None:
        return ""
    protocol, environment = report.protocol, report.environment
    rows = [
        [
            kind.label,
            show_value(metric.value, kind.unit),
            "" if metric.standard_error is None else show_value(metric.standard_error, kind.unit),
        ]
        for name, kind in METRICS.items()
        if (metric := report.metrics.get(name))
    ]
    software = ", ".join(f"{name} {version}" for name, version in environment.software.items())
    failed = [gate.name for gate in report.gates if not gate.passed]
    gates = f"gates failed: {', '.join(failed)}" if failed else f"all {len(report.gates)} gates passed"
    return (
        f"## Measured\n\nKL is KL(reference || artifact) in nats per token; ± is the standard error. "
        f"{protocol.scored_tokens} tokens of {report.text.name} (SHA-256 `{report.text.sha256}`) were scored, in "
        f"{protocol.chunks} chunks of {protocol.chunk_tokens} tokens, a new one every {protocol.stride}, each token "
        f"after at least {protocol.context_tokens} others. Reference: {protocol.reference}. "
        f"{environment.cpu}, {environment.threads} threads; {software}. By the limits it was held to, {gates}.\n\n"
        f"{_table(['', 'measured', '±'], rows)}"
    )


def _tasks(path: Path) -> str:
    """The scores of eval.json, whose schema is phi3edge.evaluate.Evaluation."""
    if not path.is_file():
        return ""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [_score(task, score) for task in found["tasks"] for score in task["scores"]]
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not what phi3edge eval writes: {error!r}", "run phi3edge eval again") from None
    head = ["task", "shots", "questions", "metric", "this artifact", "±", "reference", "±"]
    return f"## Tasks\n\nWith {versions}; ± is the standard error.\n\n{_table(head, rows)}"


def _score(task: JSON, score: JSON) -> list[str]:
    asked = f"{task['documents']}" + ("" if task["documents"] == task["of"] else f" of {task['of']}")
    shots = "" if task["num_fewshot"] is None else str(task["num_fewshot"])
    figures = [*_figure(score["artifact"]), *_figure(score["reference"])]
    return [task["name"], shots, asked, score["metric"], *figures]


def _figure(found: JSON | None) -> tuple[str, str]:
    """A value and its standard error; nothing for what was not run."""
    if found is None:
        return "", ""
    error = found["standard_error"]
    return f"{float(found['value']):.4f}", "" if error is None else f"{float(error):.4f}"


def _calibration(said: JSON) -> str:
    if not (described := said.get("calibration")):
        return ""
    what = f"of {described['text']}" if described.get("text") else f"of {described['statistics']}"
    tokens = (
        f"{described['sequences'] * described['tokens']} tokens " if "sequences" in described else "the statistics "
    )
    hashed = f" (SHA-256 of its token ids: `{described['sha256']}`)" if described["sha256"] else ""
    experts = ""
    if counts := sorted(n for layer in described.get("expert_tokens", []) for n in layer):
        middle = f"{median(counts):.0f}"
        experts = f" Each expert was chosen by {counts[0]} to {counts[-1]} of its tokens, half by {middle} or fewer."
    return f"## Calibration\n\nThe weights were rounded with {tokens + what}{hashed}.{experts}"


def _notes(said: JSON, report: Report | None) -> str:
    notes = [*said["notes"], *(f"Not run: {line}" for line in (report.not_run if report else []))]
    return "## Limits and notes\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""


def _again(said: JSON) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in said["versions"].items())
    inputs = [[f"`{f['name']}`", size(f["bytes"]), f"`{f['sha256']}`"] for f in said["inputs"]]
    return (
        f"## Make it again\n\n{_code(command(said), 'sh')}\n\nThe same inputs give the same bytes. Made with "
        f"{versions}, from:\n\n{_table(['file', 'size', 'SHA-256'], inputs)}"
    )


def command(said: JSON) -> str:
    """The command that exports an artifact again, from its manifest; folders on the way to a file are left out."""
    model, recipe = said["model"], said["recipe"]
    options = {
        "target": _toml_name("targets", said["target"]),
        "recipe": _toml_name("recipes", recipe["name"]),
        "format": said["format"],
        "context": str(said["context"]),
        "kv-cache": said["kv_cache"],
        "method": recipe.get("method"),
    }
    if said["plan"]["chosen"]:
        options["budget"] = str(sum(f["bytes"] for f in said["files"]))
    described = said.get("calibration") or {}
    if "statistics" in described:
        options["statistics"] = described["statistics"]
    elif described:
        options |= {"calibration": _calibration_option(described["text"]), "sequences": str(described["sequences"])}
    given = " ".join(f"--{name} {_shell(value)}" for name, value in options.items() if value)
    checkpoint = model["checkpoint"] if model["revision"] else PureWindowsPath(model["checkpoint"]).name
    return f"phi3edge export {_shell(checkpoint)} {given}"


def _toml_name(kind: str, name: str) -> str:
    """How a recipe or target is named: one that does not come with phi3edge by its file."""
    return name if name in _toml.shipped(kind) else f"{name}.toml"


def _calibration_option(name: str) -> str | None:
    """What --calibration was, from the text's name; None for the default."""
    if name.startswith("written by the model itself"):
        return "self+python" if "; python-" in name else None
    if re.fullmatch(r"python-[\d.]+ docstrings", name):
        return "python"
    return f"hub:{name}" if re.fullmatch(r"[\w.-]+/[\w.-]+@\w+:.+", name) else name


def _shell(text: str) -> str:
    return text if re.fullmatch(r"[\w@%+=:,./-]+", text) else json.dumps(text)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
