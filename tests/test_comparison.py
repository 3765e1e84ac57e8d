"""Two formats from one plan: written together, compared with the reference and each other."""

import json
import subprocess
import sys

import pytest
from _models import MHA, write_model
from _targets import write_target

from phi3edge import build
from phi3edge.build import export_formats, formats_of
from phi3edge.errors import OutputError, RunnerError, UnsupportedError, UsageError
from phi3edge.folders import artifacts_in, require_free
from phi3edge.proof import Protocol, name_artifacts, prove, validate_together
from phi3edge.validate import Windows

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
    return prove(folder, protocol=Protocol(windows=Windows(2), threads=1))


def test_full_precision_artifacts_are_the_reference_and_each_other(compared, folder):
    comparison, written = compared
    assert written == folder / "comparison.json"
    assert sorted(comparison.reports) == ["gguf", "onnx"]
    assert comparison.reports["onnx"].metrics["kl_mean"].value < 1e-5
    [pair] = comparison.pairs
    assert {pair.a, pair.b} == {"gguf", "onnx"}
    assert 0 <= pair.kl.value < 1e-4
    assert pair.top1.value > 0.98
    assert comparison.passed == all(r.passed for r in comparison.reports.values())


def test_the_file_holds_what_was_found(compared, folder):
    comparison, written = compared
    said = json.loads(written.read_text())
    assert said["pairs"][0]["kl"]["value"] == comparison.pairs[0].kl.value
    assert {name: r["passed"] for name, r in said["reports"].items()} == {
        name: r.passed for name, r in comparison.reports.items()
    }
    for name in FORMATS:
        assert json.loads((folder / name / "report.json").read_text()) == said["reports"][name]


def test_names_of_artifacts(folder, tmp_path):
    assert name_artifacts([folder]) == {"onnx": folder / "onnx", "gguf": folder / "gguf"}
    other = tmp_path / "gguf"
    other.mkdir()
    assert list(name_artifacts([folder / "gguf", other])) == ["gguf", f"{tmp_path.name}/gguf"]
    with pytest.raises(UsageError, match="given twice"):
        name_artifacts([folder / "gguf", folder])


def test_artifacts_of_different_checkpoints_are_not_compared(folder, tmp_path):
    other = export_formats(
        str(write_model(tmp_path / "b", MHA, seed=5)), "cpu", ["gguf"], recipe="f32", out=tmp_path / "o"
    )
    with pytest.raises(UsageError, match="of another checkpoint than gguf"):
        validate_together(
            {"gguf": folder / "gguf", "b": other[0].folder}, protocol=Protocol(windows=Windows(1), threads=1)
        )


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
