"""The command line as a user meets it: real processes, exit codes, what goes to stdout and what to stderr."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from _genai import write_genai
from _models import MHA, write_model
from _targets import write_target

from phi3edge import cli, registry
from phi3edge.cli import app as app_module
from phi3edge.cli._errors import BUG, guard
from phi3edge.errors import GateError, UsageError, install_command

HEAVY = ("torch", "transformers", "numba", "onnx", "onnxruntime", "llama_cpp", "huggingface_hub", "sentencepiece")
HEAVY += ("lm_eval", "datasets", "evaluate", "pandas", "vl_convert")


def run(*arguments, cwd=None, **environment):
    command = [sys.executable, "-m", "phi3edge", *map(str, arguments)]
    env = {**os.environ, "COLUMNS": "160", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", MHA)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist") / "tiny-cpu"
    options = ("--target", "cpu", "--recipe", "q8_0", "--out", out, "--chunks", 2, "--threads", 1, "--json")
    return out, run("export", model, *options)


def test_export_writes_runs_and_reports(exported):
    out, done = exported
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["folder"] == str(out)
    assert said["report"]["passed"] is True
    assert said["plan"]["recipe"] == "q8_0"
    files = ["README.md", "phi3edge.json", "report.html", "report.json", "tiny-q8_0.gguf"]
    assert sorted(p.name for p in out.iterdir()) == files
    assert json.loads((out / "report.json").read_text()) == said["report"]


def test_validate_finds_checkpoint_and_target_in_the_manifest(exported):
    out, _ = exported
    done = run("validate", out, "--chunks", 2, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout
    assert "perplexity" in done.stdout


def test_a_failed_gate_is_exit_code_1(exported, model, tmp_path):
    out, _ = exported
    target = write_target(tmp_path / "strict.toml", gates="kl_mean = 1e-9")
    gguf = out / "tiny-q8_0.gguf"
    done = run("validate", gguf, "-c", model, "-t", target, "--chunks", 2, "--threads", 1, "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is False
    assert [g["name"] for g in report["gates"] if not g["passed"]] == ["kl_mean"]


def test_verify_inspect_and_a_damaged_file(exported, tmp_path):
    out, _ = exported
    assert run("verify", out).returncode == 0
    said = json.loads(run("inspect", out, "--json").stdout)
    assert said["architecture"] == "phi3"
    assert {t["type"] for t in said["types"]} == {"q8_0", "f32"}
    text = run("inspect", out / "tiny-q8_0.gguf", "--tensors", "--metadata").stdout
    assert "blk.1.ffn_down.weight" in text
    assert "tokenizer.ggml.model" in text
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes((out / "tiny-q8_0.gguf").read_bytes()[:5000])
    done = run("inspect", damaged)
    assert (done.returncode, done.stdout) == (2, "")
    assert "damaged.gguf" in done.stderr


def test_inspect_counts_all_parts_of_a_split_artifact(model, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, limit in ((whole, "1GB"), (parts, "1500kB")):
        options = ("-t", "android", "-r", "f16", "--no-validate", "-o", out, "--split-max-size", limit)
        assert run("export", model, *options).returncode == 0
    first, second = (json.loads(run("inspect", out, "--json").stdout) for out in (whole, parts))
    assert len(list(parts.glob("*.gguf"))) > 1
    assert first["parameters"] == second["parameters"]
    assert first["types"] == second["types"]


def test_inspect_an_onnx_folder(model, tmp_path):
    folder = write_genai(model, tmp_path / "tiny-onnx")
    said = json.loads(run("inspect", folder, "--json", "--tensors").stdout)
    assert (said["kind"], said["name"], said["architecture"]) == ("onnx", "tiny-onnx", "phi3")
    assert said["settings"]["provider"] == "cpu"
    assert said["settings"]["kv_cache"] == "f32"
    assert said["settings"]["eos_token_ids"] == [0, 3]
    assert said["operators"]["com.microsoft.GroupQueryAttention"] == 2
    assert said["file_bytes"] == sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert {f["name"] for f in said["files"]} == {f.name for f in folder.iterdir()}
    floats = next(t for t in said["types"] if t["type"] == "float32")
    assert floats["bytes"] == sum(t["bytes"] for t in said["tensors"] if t["type"] == "float32") == 4 * floats["values"]
    text = run("inspect", folder / "model.onnx").stdout
    assert "past_key_values.N.key (2 times)" in text
    assert "with chat template" in text
    (folder / "model.onnx.data").write_bytes(b"")
    done = run("inspect", folder)
    assert done.returncode == 2
    assert "model.onnx.data has 0 bytes" in done.stderr


def test_inspect_a_checkpoint(model):
    said = json.loads(run("inspect", model, "--json").stdout)
    assert (said["kind"], said["settings"]["layers"]) == ("checkpoint", 2)


def test_plan_reads_no_weights(model, tmp_path):
    only_config = tmp_path / "tiny"
    only_config.mkdir()
    (only_config / "config.json").write_text((model / "config.json").read_text())
    done = run("plan", only_config, "--target", "android", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["fit"]["fits"] is True
    assert sum(r["bytes"] for r in said["roles"]) == said["weight_bytes"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("export", "demoo"), "demo"),
        (("export", "./nowhere"), "nowhere"),
        (("export", "demo", "--target", "iphnoe"), "iphone"),
        (("export", "demo", "--recipe", "q4_km"), "q4_k_m"),
        (("export", "demo", "--method", "gtpq"), "gptq"),
        (("export", "demo", "--format", "tflite"), "one of gguf, onnx, both"),
        (("export", "demo", "--format", "zip"), "zip"),
        (("export", "demo", "--budget", "1.8G"), "1.8G"),
        (("export", "demo", "--budget", "1KB"), "with the smallest codecs it takes 94688256 bytes"),
        (("export", "demo", "--budget", "1.8GB", "--recipe", "q4_k_m"), "takes no budget"),
        (("export", "demo", "--recipe", "budget"), "none is given"),
        (("plan", "demo", "--bits-per-weight", "2"), "with the smallest codecs"),
        (("plan", "demo", "--bits-per-weight", "0"), "expected more than 0"),
        (("plan", "demo", "--bits-per-weight", "4", "--budget", "1GB"), "two ways"),
        (("export", "demo", "--device", "cuda"), "cuda"),
        (("export", "demo", "--split-max-size", "lots"), "lots"),
        (("export", "demo", "--split-max-size", "0"), "'0'"),
        (("export", "demo", "--text", "nowhere.txt"), "nowhere.txt"),
        (("export", "demo", "--out", "."), "working folder"),
        (("export", "demo", "--target", "directml", "--format", "gguf"), "takes onnx"),
        (("export",), "CHECKPOINT"),
        (("validate", "nowhere.gguf"), "does not exist"),
        (("validate", "/dev/null"), "--checkpoint"),
        (("validate", "nowhere.gguf", "-c", "demo", "-t", "cpu"), "nowhere.gguf"),
        (("verify", "."), "phi3edge.json"),
        (("inspect", "nowhere"), "nowhere"),
        (("plan", "demo", "--context", "0"), "context"),
        (("nonsense",), "nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_usage_is_exit_code_2_with_one_clear_line_and_nothing_written(arguments, says, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_error_is_json_too(tmp_path):
    done = run("export", "demo", "--target", "iphnoe", "--json", cwd=tmp_path)
    assert done.returncode == 2
    said = json.loads(done.stdout)
    assert "iphnoe" in said["error"]
    assert "iphone" in said["hint"]


def test_wrong_usage_is_json_too(tmp_path):
    done = run("plan", "demo", "--context", "0", "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert "--context" in json.loads(done.stdout)["error"]
    assert len(done.stderr.splitlines()) == 2


def test_a_plan_that_does_not_fit_is_one_json_document(model, tmp_path):
    toaster = write_target(tmp_path / "toaster.toml", app="1 MB")
    done = run("plan", model, "--target", toaster, "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["fit"]["fits"] is False
    assert "does not fit" in done.stderr


def test_a_full_disk_is_one_line(model):
    with registry.Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "phi3edge", "inspect", model], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "No space left" in done.stderr


def test_a_gate_on_an_unknown_metric_is_found_before_the_export(model, tmp_path):
    target = write_target(tmp_path / "typo.toml", gates="kl_maen = 1.0")
    done = run("export", model, "--target", target, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "kl_mean" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_export_that_cannot_be_validated_says_that_it_is_written(model, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    done = run("export", model, "-t", "android", "--out", tmp_path / "out", "--text", tmp_path / "short.txt")
    assert done.returncode == 2
    assert "written, but not validated" in done.stderr
    assert "give a longer text" in done.stderr
    assert run("verify", tmp_path / "out").returncode == 0


@pytest.mark.parametrize("command", ["targets", "recipes"])
def test_listings(command):
    names = set(json.loads(run(command, "--json").stdout))
    assert names == {p.stem for p in (registry.Path(cli.__file__).parents[2] / command).glob("*.toml")}
    text = run(command).stdout
    assert all(name in text for name in names)


def test_doctor_runs_the_runtimes():
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [(r["runtime"], r["runs"]) for r in said["runtimes"]] == [("llama_cpp", True), ("ort_genai", True)]
    assert all(extra["installed"] for extra in said["extras"])


def test_doctor_names_the_command_for_a_missing_extra(monkeypatch):
    from phi3edge.cli import doctor

    monkeypatch.setattr(doctor, "_version", lambda package: None)
    missing = doctor.extras()
    assert all(not e["installed"] for e in missing)
    assert all(re.search(rf"pip install .*\[{e['extra']}\]", e["command"]) for e in missing)


@pytest.mark.parametrize(
    ("origin", "wanted"),
    [
        (None, "'phi3edge[gguf]'"),
        ({"url": "file:///a%20b", "dir_info": {"editable": True}}, "--editable '/a b[gguf]'"),
        ({"url": "file:///a/b", "dir_info": {}}, "'phi3edge[gguf] @ file:///a/b'"),
        (
            {"url": "https://x/y", "vcs_info": {"vcs": "git", "commit_id": "12"}},
            "'phi3edge[gguf] @ git+https://x/y@12'",
        ),
    ],
)
def test_an_extra_comes_from_where_phi3edge_came_from(monkeypatch, origin, wanted):
    class Installed:
        def read_text(self, name):
            return origin and json.dumps(origin)

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed())
    assert install_command("gguf") == f"{sys.executable} -m pip install {wanted}"


def test_light_commands_load_nothing_heavy(model, tmp_path):
    """Each heavy package is replaced by one that fails when it is imported."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was imported')")
    for arguments in (("--help",), ("targets",), ("recipes",), ("plan", model), ("inspect", model), ("--version",)):
        done = run(*arguments, PYTHONPATH=str(tmp_path))
        assert done.returncode == 0, (arguments, done.stderr)


def test_export_without_the_quantizers_names_the_extra(model, tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError")
    done = run("export", model, "--out", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "[gguf]" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing_and_says_so(demo, tmp_path, sent, code):
    process = subprocess.Popen(
        [sys.executable, "-m", "phi3edge", "export", "demo", "--out", tmp_path / "out", "--no-validate"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),  # a shell's background job ignores SIGINT
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "left behind" in stderr
    assert not list(tmp_path.iterdir())


def test_exit_codes_of_the_guard(capsys):
    def raising(error):
        def command():
            raise error

        return guard(command)

    assert raising(UsageError("bad", "do better")) == 2
    assert raising(GateError("missed")) == 1
    assert raising(SystemExit(130)) == 130
    assert raising(SystemExit(2)) == 2
    assert raising(ZeroDivisionError()) == BUG == 101
    assert "bug" in capsys.readouterr().err
    assert guard(lambda: None) == 0


def test_every_command_shows_an_example():
    for command in app_module.app.registered_commands:
        text = command.callback.__doc__
        assert "phi3edge" in text.split("Example", 1)[1], command.name
