"""`phi3edge calibrate`, as a user meets it: what it writes, replaces, refuses, and goes on with."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _models import GROUPED, write_model
from _prequantized import AWQ, write_prequantized
from typer.testing import CliRunner, Result

from phi3edge import collect
from phi3edge.checkpoint import open_checkpoint
from phi3edge.cli._errors import guard
from phi3edge.cli.app import app
from phi3edge.errors import Phi3EdgeError, UnsupportedError
from phi3edge.families import parse_config
from phi3edge.statistics import load_statistics

BLOCKS = ["block-00000.safetensors", "block-00001.safetensors", "head.safetensors"]
NAMES = sorted([*BLOCKS, "ids.npy", "imatrix.gguf", "statistics.json"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", GROUPED)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    random = np.random.default_rng(0)
    path.write_text(" ".join("".join(random.choice(list("abcdefg"), 5)) for _ in range(2000)))
    return path


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


def options(text: Path, out: Path, *more: object) -> list[object]:
    return ["--calibration", text, "--sequences", 10, "--tokens", 128, "--out", out, *more]


def calibrated(model: Path, text: Path, out: Path, *more: object) -> dict[str, Any]:
    done = invoke(model, *options(text, out, "--json", *more))
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_it_writes_a_folder_that_loads(model: Path, text: Path, tmp_path: Path) -> None:
    said = calibrated(model, text, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == NAMES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
    found = load_statistics(tmp_path / "out", spec)
    assert said["linears"] == len(found) == 9
    assert said["calibration"]["name"] == found.calibration.name == "words.txt"
    assert said["calibration"]["sha256"] == found.calibration.sha256
    assert (said["calibration"]["sequences"], said["calibration"]["tokens"]) == (10, 128)
    assert said["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert found["lm_head.weight"].tokens == 1280
    again = calibrated(model, text, tmp_path / "again", "--moments")
    assert again["moments"] is True
    assert load_statistics(tmp_path / "again", spec, moments=True)["lm_head.weight"].moments is not None


def test_a_folder_is_replaced_only_if_it_is_one_of_ours_and_force_is_given(
    model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    calibrated(model, text, out)
    before = (out / "statistics.json").stat().st_mtime_ns
    for damage, more, says in (
        (None, (), "--force replaces it"),
        ("thesis.txt", ("--force",), "thesis.txt"),
    ):
        if damage:
            (out / damage).write_text("years of work")
        with pytest.raises(Phi3EdgeError, match=r"exists|holds") as raised:
            invoke_or_raise(model, *options(text, out, *more))
        assert says in f"{raised.value} {raised.value.hint}"
        assert (out / "statistics.json").stat().st_mtime_ns == before
    (out / "thesis.txt").unlink()
    calibrated(model, text, out, "--force")
    assert (out / "statistics.json").stat().st_mtime_ns > before
    assert sorted(path.name for path in out.iterdir()) == NAMES


def invoke_or_raise(*arguments: object) -> None:
    done = invoke(*arguments)
    if done.exception:
        raise done.exception


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--device", "tpu"), "tpu"),
        (("--calibration", "nowhere.txt"), "nowhere.txt"),
        (("--tokens", "1000", "--calibration", "python"), "context of 512"),
    ],
    ids=["device", "text", "tokens"],
)
def test_bad_usage_is_one_clear_line(model: Path, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    with pytest.raises(Phi3EdgeError, match=says):
        invoke_or_raise(model, "--out", tmp_path / "out", *arguments)
    assert not list(tmp_path.iterdir())


def test_cuda_without_a_gpu_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(Phi3EdgeError, match="no GPU"):
        invoke_or_raise(model, "--out", tmp_path / "out", "--device", "cuda")


def test_without_torch_the_extra_is_named(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert guard(lambda: collect.calibrate(str(model), out=tmp_path / "out")) == 2
    with pytest.raises(Phi3EdgeError, match="calibration needs a package") as raised:
        collect.calibrate(str(model), out=tmp_path / "out")
    assert "[reference]" in str(raised.value.hint)


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    write_prequantized(tmp_path / "awq", AWQ)
    with pytest.raises(UnsupportedError, match="quantized already"):
        collect.calibrate(str(tmp_path / "awq"), out=tmp_path / "out")


def test_an_interrupted_command_says_that_it_goes_on_and_does(model: Path, text: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / ".out.work"
    command = [sys.executable, "-c", SLOW, "calibrate", str(model), *map(str, options(text, out))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (work / BLOCKS[0]).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "goes on" in stderr
    assert not out.exists()
    first = (work / BLOCKS[0]).stat().st_mtime_ns
    calibrated(model, text, out)
    assert (out / BLOCKS[0]).stat().st_mtime_ns == first
    calibrated(model, text, tmp_path / "straight")
    for name in BLOCKS:
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert not work.exists()


SLOW = """
import time
from phi3edge import collect
from phi3edge.cli.app import main
run = collect._Run.block
def slow(self, layer, advance):
    time.sleep(30 * layer)
    run(self, layer, advance)
collect._Run.block = slow
main()
"""
