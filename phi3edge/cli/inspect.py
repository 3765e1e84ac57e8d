"""`phi3edge inspect`: what a GGUF file, an ONNX model, an exported folder or a checkpoint is."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from phi3edge import manifest
from phi3edge.cli import _inspect_onnx
from phi3edge.cli._options import JsonOption
from phi3edge.cli._output import print_json, stdout, table
from phi3edge.errors import UsageError
from phi3edge.folders import artifacts_in
from phi3edge.genai_folder import is_genai
from phi3edge.gguf_file import GGUFTensor, ggml_types, read_header
from phi3edge.types import JSON
from phi3edge.units import size

LONGEST_VALUE = 70


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A .gguf file, an ONNX model or folder, an export, or a checkpoint.")
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    metadata: Annotated[bool, typer.Option("--metadata", help="List every metadata key.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Explain any GGUF file, ONNX model or ONNX Runtime GenAI folder, export, or checkpoint. Reads headers only.

    Examples: `phi3edge inspect dist/demo-iphone`, `phi3edge inspect model.gguf --tensors --json`
    """
    if parts := artifacts_in(path):
        raise UsageError(f"{path} holds {len(parts)} artifacts", f"name one of them: phi3edge inspect {parts[0]}")
    if path.is_dir() and (path / manifest.NAME).is_file():
        described = manifest.read_manifest(path)
        if described.get("format") == "onnx":
            explained = _inspect_onnx.explain(path, tensors)
        else:
            explained = explain([path / entry["name"] for entry in described["files"]], tensors, metadata)
        content: JSON = {"kind": "artifact", "manifest": described, **explained}
    elif is_genai(path) or (path.suffix == ".onnx" and path.is_file()):
        content = {"kind": "onnx", **_inspect_onnx.explain(path, tensors)}
    elif path.is_dir():
        content = {"kind": "checkpoint", **explain_checkpoint(path)}
    elif path.is_file():
        content = {"kind": "gguf", **explain([path], tensors, metadata)}
    else:
        raise UsageError(
            f"{path} does not exist",
            "expected a .gguf file, an ONNX model or folder, an exported folder, or a checkpoint's",
        )
    if as_json:
        print_json(content)
    else:
        show(path, content)


def explain(files: list[Path], tensors: bool, metadata: bool) -> JSON:
    """A model, its codecs and tokenizer as plain data, from a GGUF file or all parts of a split one, in order."""
    headers = [read_header(path) for path in files]
    header, held = headers[0], tuple(t for h in headers for t in h.tensors)
    data = header.metadata
    architecture = data.get("general.architecture", "?")
    tokens = data.get("tokenizer.ggml.tokens", [])
    end_keys = ("eos", "eot", "eom", "fim_pad")
    ends = {key: i for key in end_keys if (i := data.get(f"tokenizer.ggml.{key}_token_id")) is not None}
    content: JSON = {
        "version": header.version,
        "file_bytes": sum(h.file_size for h in headers),
        "architecture": architecture,
        "name": data.get("general.name"),
        "parameters": sum(prod(t.shape) for t in held),
        "settings": {k: v for k, v in data.items() if k.startswith(f"{architecture}.") and not isinstance(v, list)},
        "tokenizer": {
            "model": data.get("tokenizer.ggml.model"),
            "pre": data.get("tokenizer.ggml.pre"),
            "tokens": len(tokens),
            "ends": {key: {"id": i, "token": tokens[i] if i < len(tokens) else None} for key, i in ends.items()},
            "chat_template": data.get("tokenizer.chat_template"),
        },
        "types": _by_type(held),
        "split": data.get("split.count"),
    }
    if tensors:
        content["tensors"] = [
            {
                "name": t.name,
                "type": ggml_types()[t.ggml_type].name,
                "shape": list(t.shape),
                "offset": t.offset,
                "bytes": t.nbytes,
            }
            for t in held
        ]
    if metadata:
        content["metadata"] = data
    return content


def _by_type(tensors: tuple[GGUFTensor, ...]) -> list[JSON]:
    counts, sizes, weights = Counter[int](), Counter[int](), Counter[int]()
    for t in tensors:
        counts[t.ggml_type] += 1
        sizes[t.ggml_type] += t.nbytes
        weights[t.ggml_type] += prod(t.shape)
    return [
        {
            "type": ggml_types()[kind].name,
            "tensors": counts[kind],
            "weights": weights[kind],
            "bytes": count,
            "bits_per_weight": round(8 * count / weights[kind], 4) if weights[kind] else 0.0,
        }
        for kind, count in sizes.most_common()
    ]


def explain_checkpoint(folder: Path) -> JSON:
    """A checkpoint's model as plain data; its headers are checked against its config."""
    from phi3edge.checkpoint import open_checkpoint
    from phi3edge.families import parse_config

    with open_checkpoint(folder) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, checkpoint.name)
        checkpoint.check(spec)
    return {
        "name": spec.name,
        "family": spec.family,
        "parameters": spec.parameters,
        "dtype": spec.dtype,
        "settings": {
            "layers": spec.layers,
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim,
            "vocab_size": spec.vocab_size,
            "context_length": spec.context_length,
            "sliding_window": spec.sliding_window,
            "rope_theta": spec.rope.theta,
            "tied_head": spec.tied,
            "eos_token_ids": list(spec.eos_token_ids),
        },
    }


def show(path: Path, content: JSON) -> None:
    """The explanation for a terminal."""
    head = Text(str(content.get("name") or path.name), style="bold")
    head.append(f"  {content.get('architecture') or content.get('family')}", style="dim")
    if "parameters" in content:
        head.append(f", {content['parameters'] / 1e9:.2f} B weights", style="dim")
    stdout.print(head)
    if described := content.get("manifest"):
        model, licence = described["model"], described["model"]["licence"] or "unknown"
        made = f"made from {model['checkpoint']} for {described['target']} with {described['recipe']['name']}"
        stdout.print(f"{made}, licence {licence}", markup=False)
        for entry in described["files"] if "operators" not in content else ():
            stdout.print(f"  {entry['name']}: {size(entry['bytes'])}")
        for line in described["notes"]:
            stdout.print(Text(f"note: {line}", style="yellow"))
    elif split := content.get("split"):
        stdout.print(f"one of {split} parts; the figures are of this part")
    settings = table("setting", "value")
    for key, value in content["settings"].items():
        settings.add_row(key, _show(value))
    if content["settings"]:
        stdout.print(settings)
    if "operators" in content:
        _inspect_onnx.show(content)
    elif "types" in content:
        types = table("type", ">tensors", ">weights", ">bytes", ">bits/weight")
        for t in content["types"]:
            types.add_row(
                t["type"], str(t["tensors"]), f"{t['weights']:,}", size(t["bytes"]), f"{t['bits_per_weight']:.2f}"
            )
        stdout.print(Text(), types)
        _show_tokenizer(content["tokenizer"])
    if "tensors" in content:
        rows = table("tensor", "type", "shape", ">offset", ">bytes")
        for t in content["tensors"]:
            rows.add_row(t["name"], t["type"], " x ".join(map(str, t["shape"])), str(t["offset"]), str(t["bytes"]))
        stdout.print(Text(), rows)
    if "metadata" in content:
        rows = table("key", "value")
        for key, value in content["metadata"].items():
            rows.add_row(Text(key), Text(_show(value)))
        stdout.print(Text(), rows)


def _show_tokenizer(tokenizer: JSON) -> None:
    ends = ", ".join(f"{e['token']} ({key} {e['id']})" for key, e in tokenizer["ends"].items())
    template = "with" if tokenizer["chat_template"] else "without"
    kind = f"tokenizer {tokenizer['model']} ({tokenizer['pre']}), {tokenizer['tokens']} tokens"
    stdout.print(Text(f"\n{kind}, {template} chat template; ends at {ends}"))


def _show(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} values: {_show(value[:4])[1:-1]} ..." if len(value) > 4 else repr(value)
    text = f"{value:g}" if isinstance(value, float) else str(value).replace("\n", "\\n")
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
