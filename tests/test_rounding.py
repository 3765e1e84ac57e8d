"""Calibrated exports, end to end: what is written, what is said about it, and what is refused."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _models import GROUPED, write_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from phi3edge import folders
from phi3edge.build import export, prepare
from phi3edge.cli.app import app
from phi3edge.errors import MissingExtraError, OutputError, UnsupportedError, UsageError
from phi3edge.proof import Protocol, validate_artifact
from phi3edge.rounding import Rounding, default_sequences, require_rounding
from phi3edge.text import default_text
from phi3edge.validate import Windows

TWO = Protocol(windows=Windows(2))
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "sleeps", "by", "water")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny", GROUPED)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choice(WORDS, 4000)))
    return path


@pytest.fixture(scope="module")
def made(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF folder, rounded with gptq."""
    rounding = Rounding("gptq", str(text), sequences=8)
    out = tmp_path_factory.mktemp("made") / "out"
    return export(str(model), "cpu", format_="gguf", recipe="q4_0", out=out, rounding=rounding).folder


def test_the_manifest_says_what_was_calibrated_on_and_how_each_linear_came_out(made: Path, text: Path) -> None:
    said = json.loads((made / "phi3edge.json").read_text())["calibration"]
    assert said["text"] == text.name
    assert (said["sequences"], said["tokens"]) == (8, 512)
    assert {row["role"] for row in said["linears"]} == {"attn_qkv", "attn_output", "ffn_gate_up", "ffn_down", "head"}
    assert len(said["linears"]) == 2 * 4 + 1
    assert np.load(made / folders.CALIBRATION).shape == (8, 512)


def test_gptq_is_nearer_to_the_reference_than_rtn(made: Path, model: Path, tmp_path: Path) -> None:
    plain = export(str(model), "cpu", format_="gguf", recipe="q4_0", out=tmp_path / "plain").folder
    kl = [validate_artifact(folder, protocol=TWO)[0].metrics["kl_mean"].value for folder in (made, plain)]
    assert kl[0] < kl[1]


def test_a_real_model_keeps_more_than_half_of_what_rounding_to_nearest_loses(demo: Path, tmp_path: Path) -> None:
    """On the demo's first two blocks, with its embedding and head left as they are."""
    part = tmp_path / "part"
    part.mkdir()
    for path in demo.iterdir():
        if "safetensors" not in path.name:
            shutil.copy(path, part)
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    tensors = {name: t for shard in demo.glob("*.safetensors") for name, t in load_file(shard).items()}
    later = re.compile(r"model\.layers\.([2-9]|\d\d)\.")
    save_file({n: t for n, t in tensors.items() if not later.match(n)}, part / "model.safetensors", {"format": "pt"})
    words = tmp_path / "words.txt"
    words.write_text(default_text().text[600_000:640_000])  # far from the beginning, which is scored
    recipe = tmp_path / "linears.toml"
    recipe.write_text(
        'summary = "blocks only"\nformats = ["gguf"]\n'
        '[codecs]\nlinear = "q4_0"\nembedding = "f16"\nhead = "f16"\nnorm = "f32"\n'
    )
    kl = {}
    for method in ("rtn", "gptq"):
        rounding = Rounding(method, str(words), sequences=8)
        made = export(str(part), "cpu", format_="gguf", recipe=str(recipe), out=tmp_path / method, rounding=rounding)
        kl[method] = validate_artifact(made.folder, protocol=TWO)[0].metrics["kl_mean"].value
    assert kl["gptq"] < 0.5 * kl["rtn"]


def test_the_same_inputs_give_the_same_bytes(made: Path, model: Path, text: Path, tmp_path: Path) -> None:
    rounding = Rounding("gptq", str(text), sequences=8)
    again = export(str(model), "cpu", format_="gguf", recipe="q4_0", out=tmp_path / "out", rounding=rounding)
    assert again.artifact.read_bytes() == (made / again.artifact.name).read_bytes()


def test_an_onnx_folder_is_calibrated_alike_and_runs(model: Path, text: Path, tmp_path: Path) -> None:
    rounding = Rounding("gptq", str(text), sequences=8)
    out = export(str(model), "cpu", format_="onnx", recipe="int4", out=tmp_path / "out", rounding=rounding)
    report, *_ = validate_artifact(out.folder, protocol=TWO)
    assert report.metrics["kl_mean"].value < 0.1
    assert report.calibration is not None
    assert report.calibration.name == text.name


def test_an_artifact_is_not_scored_on_what_it_was_calibrated_on(made: Path, text: Path) -> None:
    with pytest.raises(UsageError, match="share a passage"):
        validate_artifact(made, protocol=Protocol(text, Windows(2)))


def test_another_calibration_file_than_the_manifests_is_noticed(made: Path) -> None:
    path = made / folders.CALIBRATION
    kept = path.read_bytes()
    try:
        np.save(path, np.zeros((8, 512), np.int32))
        with pytest.raises(OutputError, match="is not what"):
            validate_artifact(made, protocol=TWO)
        path.unlink()
        with pytest.raises(OutputError, match="cannot read"):
            validate_artifact(made, protocol=TWO)
    finally:
        path.write_bytes(kept)


def test_statistics_of_another_run_weigh_the_scale_search(model: Path, text: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    gathered = tmp_path / "statistics"
    options = ["calibrate", str(model), "--calibration", str(text), "--sequences", "8", "--out", str(gathered)]
    assert runner.invoke(app, options).exit_code == 0
    files = []
    for name, statistics in (("plain", None), ("folder", gathered), ("imatrix", gathered / "imatrix.gguf")):
        out = tmp_path / name
        made = export(
            str(model), "cpu", format_="gguf", recipe="q4_0", out=out, rounding=Rounding("rtn", statistics=statistics)
        )
        files.append(made.artifact.read_bytes())
    assert files[0] != files[1]
    assert files[1] == files[2]


def test_wider_models_get_more_text(model: Path) -> None:
    spec = prepare(str(model), "cpu").plan.model
    assert default_sequences(spec) == 48
    wide = [replace(t, shape=(t.shape[0], 2048)) if t.role == "ffn_down" else t for t in spec.tensors]
    assert default_sequences(replace(spec, tensors=tuple(wide))) == 64
    widest = [replace(t, shape=(t.shape[0], 8192)) if t.role == "ffn_down" else t for t in spec.tensors]
    assert default_sequences(replace(spec, tensors=tuple(widest))) == 128


def test_options_that_do_not_go_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--statistics goes with --method rtn"):
        require_rounding(Rounding(statistics=tmp_path), calibrated=True)
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        require_rounding(Rounding(device="tpu"), calibrated=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="no CUDA device"):
        require_rounding(Rounding(device="cuda"), calibrated=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError):
        require_rounding(Rounding(), calibrated=True)
