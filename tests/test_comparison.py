"""Two formats from one plan: written together, compared with the reference and each other."""

import json
import subprocess
import sys

import numpy as np
import pytest
from _models import MHA, write_model
from _targets import write_target

from phi3edge import build
from phi3edge.build import artifacts_in, export_formats, formats_of, require_free, validate_together
from phi3edge.errors import OutputError, RunnerError, UnsupportedError, UsageError
from phi3edge.validate import kl_divergence, log_softmax

FORMATS = ["onnx", "gguf"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", MHA)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist") / "both"
    made = export_formats(str(model), "cpu", FORMATS, recipe="f32", out=out)
    assert [one.folder for one in made] == [out / "onnx", out / "gguf"]
    assert all(path.is_file() for one in made for path in [one.artifact, *one.files])
    return out


@pytest.fixture(scope="module")
def compared(folder):
    return validate_together(folder, chunks=2, threads=1)


def test_full_precision_artifacts_are_the_reference_and_each_other(compared, folder):
    comparison, written = compared
    assert written == folder / "comparison.json"
    assert sorted(comparison.reports) == ["gguf", "onnx"]
    assert comparison.reports["onnx"].metrics["kl_mean"].value < 1e-5
    [pair] = comparison.pairs
    assert {pair.a, pair.b} == {"gguf", "onnx"}
    assert 0 <= pair.kl_ab.value < 1e-4
    assert pair.top1.value > 0.98
    assert comparison.passed == all(r.passed for r in comparison.reports.values())


def test_the_file_holds_what_was_found(compared, folder):
    comparison, written = compared
    said = json.loads(written.read_text())
    assert said["pairs"][0]["kl_ab"]["value"] == comparison.pairs[0].kl_ab.value
    assert {name: r["passed"] for name, r in said["reports"].items()} == {
        name: r.passed for name, r in comparison.reports.items()
    }
    for name in FORMATS:
        assert json.loads((folder / name / "report.json").read_text()) == said["reports"][name]


def test_kl_between_artifacts_is_that_of_their_distributions(tmp_path):
    random = np.random.default_rng(0)
    kept = {}
    for name in "ab":
        kept[name] = tmp_path / f"{name}.npy"
        np.save(kept[name], log_softmax(random.normal(size=(2, 5, 7)).astype(np.float32)).astype(np.float16))
    from phi3edge.comparison import _pair

    pair = _pair("a", "b", kept["a"], kept["b"])
    p, q = (np.load(kept[name]).astype(np.float64).reshape(10, 7) for name in "ab")
    p, q = p - np.log(np.exp(p).sum(-1, keepdims=True)), q - np.log(np.exp(q).sum(-1, keepdims=True))
    assert pair.kl_ab.value == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert pair.kl_ba.value == pytest.approx(kl_divergence(q, p).mean(), rel=1e-4)
    assert pair.top1.value == (p.argmax(-1) == q.argmax(-1)).mean()


def test_the_folder_is_ours_to_replace_and_nobody_elses(folder, compared):
    require_free(folder, force=True)
    with pytest.raises(OutputError, match="exists"):
        require_free(folder, force=False)
    own = folder / "onnx" / "notes.txt"
    own.write_text("mine")
    try:
        with pytest.raises(OutputError, match=r"onnx/notes.txt, which phi3edge did not write"):
            require_free(folder, force=True)
    finally:
        own.unlink()


def test_if_one_format_fails_nothing_is_left(model, tmp_path, monkeypatch):
    def broken(format_, job):
        if format_ == "gguf":
            raise RunnerError("it broke")
        return real(format_, job)

    real = build.open_emitter
    monkeypatch.setattr(build, "open_emitter", broken)
    with pytest.raises(RunnerError, match="it broke"):
        export_formats(str(model), "cpu", FORMATS, recipe="f32", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_formats_follow_the_target_and_the_recipe(tmp_path):
    assert formats_of("cpu", None) == ["onnx"]
    assert formats_of("cpu", None, "q4_0") == ["gguf"]
    assert formats_of("android", None, "int4") == ["onnx"]
    assert formats_of("cpu", "both") == ["onnx", "gguf"]
    with pytest.raises(UnsupportedError, match="takes gguf, not both"):
        formats_of(str(write_target(tmp_path / "own.toml")), "both")
    with pytest.raises(UsageError) as caught:
        formats_of("cpu", "tflite")
    assert caught.value.hint == "one of gguf, onnx, both"


def run(*arguments):
    command = [sys.executable, "-m", "phi3edge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_commands_know_the_folder(folder, compared):
    assert len(artifacts_in(folder)) == 2
    done = run("verify", folder, "--json")
    assert [one["passed"] for one in json.loads(done.stdout)["artifacts"]] == [True, True]
    done = run("inspect", folder)
    assert done.returncode == 2
    assert "holds 2 artifacts" in done.stderr


@pytest.mark.parametrize("named", ["onnx", "gguf"])
def test_one_of_them_validates_alone(folder, named):
    done = run("validate", folder / named, "--chunks", 2, "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is True
