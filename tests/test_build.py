"""The main job on small models: from a checkpoint to an artifact that llama.cpp runs, and what must never happen."""

import contextlib
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from _models import GROUPED, MHA, TIED, Shape, phi3_tensors, write_model, write_weights
from _targets import write_target

from phi3edge import build, folders, manifest
from phi3edge.build import export
from phi3edge.checkpoint import open_checkpoint
from phi3edge.errors import CheckpointError, DoesNotFitError, OutputError, UnsupportedError, UsageError
from phi3edge.families import parse_config
from phi3edge.files import new_folder, sha256
from phi3edge.gates import Limit
from phi3edge.proof import Protocol, validate_artifact
from phi3edge.quantize import quantize
from phi3edge.recipes import load_recipe, shipped_recipes
from phi3edge.validate import Windows, validate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", MHA)


def read_all(stream):
    return [list(rows) for _, rows in stream]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


NAMED = sorted(n for n, r in shipped_recipes().items() if "gguf" in r.formats and r.budget is None)


@pytest.mark.parametrize("recipe", NAMED)
def test_every_recipe_writes_what_the_plan_says(model, tmp_path, recipe):
    made = export(str(model), "android", recipe=recipe, out=tmp_path / "out")
    reader = gguf.GGUFReader(made.artifact)
    planned = made.prepared.plan.tensors
    assert [t.tensor_type.name.lower() for t in reader.tensors] == [t.codec for t in planned]
    assert [int(t.n_bytes) for t in reader.tensors] == [t.bytes for t in planned]
    weights = phi3_tensors(MHA)
    worst = {"f32": 1e-7, "bf16": 1e-7, "f16": 1e-3, "q8_0": 0.01, "q6_k": 0.03}.get(recipe, 0.15)
    for planned_tensor, t in zip(planned, reader.tensors, strict=True):
        original = weights[planned_tensor.tensor.name].float().numpy()
        decoded = gguf.dequantize(t.data, t.tensor_type).reshape(original.shape)
        assert np.linalg.norm(decoded - original) <= worst * np.linalg.norm(original), planned_tensor.tensor.name


@pytest.mark.parametrize("shape", [MHA, GROUPED, TIED, Shape(dtype="float16"), Shape(dtype="float32")], ids=str)
def test_a_full_precision_artifact_is_the_same_model(tmp_path, shape):
    model = write_model(tmp_path / "tiny", shape, shards=2)
    made = export(str(model), "android", recipe="f32", out=tmp_path / "out")
    gates = {"kl_mean": Limit(limit=1e-4)}
    report, _ = validate(made.artifact, model, windows=Windows(2), gates=gates, kv_type="f32", threads=1)
    assert report.passed
    assert report.metrics["top1"].value > 0.98


def test_the_same_inputs_give_the_same_bytes(model, tmp_path):
    first = export(str(model), "iphone", out=tmp_path / "a", threads=1)
    second = export(str(model), "iphone", out=tmp_path / "b", threads=4)
    assert tree(first.folder) == tree(second.folder)


def test_the_manifest_says_what_was_made_from_what(model, tmp_path):
    made = export(str(model), "iphone", out=tmp_path / "out")
    said = manifest.read_manifest(made.folder)
    assert said["target"] == "iphone"
    assert said["recipe"]["name"] == "q4_k_m"
    assert said["model"]["licence"] == "mit"
    assert {f["name"] for f in said["files"]} == {p.name for p in made.files}
    assert {f["name"] for f in said["inputs"]} >= {"config.json", "tokenizer.json", "model.safetensors"}
    assert said["inputs"][0]["sha256"] == sha256(model / said["inputs"][0]["name"])
    assert manifest.verify(made.folder) == []


def test_settings_for_sampling_go_along(model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    path = copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.5}))
    made = export(str(copy), "android", out=tmp_path / "out")
    assert gguf.GGUFReader(made.artifact).fields["general.sampling.temp"].contents() == 0.5


def test_verify_finds_a_changed_a_short_and_a_missing_file(model, tmp_path):
    made = export(str(model), "android", out=tmp_path / "out")
    data = made.artifact.read_bytes()
    made.artifact.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "sha256" in manifest.verify(made.folder)[0]
    made.artifact.write_bytes(data[:-1])
    assert "bytes" in manifest.verify(made.folder)[0]
    made.artifact.unlink()
    assert "missing" in manifest.verify(made.folder)[0]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda said: said["files"][0].update(name="../secret"), "name"),
        (lambda said: said["files"][0].update(name="/etc/passwd"), "name"),
        (lambda said: said["files"].clear(), "files"),
        (lambda said: said.pop("target"), "target"),
        (lambda said: said.update(context=-1), "context"),
        (lambda said: said.update(schema=99), "99"),
        (lambda said: said.pop("schema"), "schema"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(model, tmp_path, damage, says):
    made = export(str(model), "android", out=tmp_path / "out")
    said = manifest.read_manifest(made.folder)
    damage(said)
    (made.folder / manifest.NAME).write_text(json.dumps(said))
    with pytest.raises(OutputError, match=says):
        manifest.verify(made.folder)


def test_a_split_artifact_loads_and_is_the_same_model(model, tmp_path):
    made = export(str(model), "android", recipe="f16", out=tmp_path / "out", split_max_size=1_500_000)
    assert len(made.files) > 1
    assert all(p.stat().st_size <= 1_500_000 for p in made.files)
    report, _ = validate(made.artifact, model, windows=Windows(2), gates={"kl_mean": Limit(limit=1e-3)}, threads=1)
    assert report.passed


def test_an_existing_output_needs_force_and_is_replaced_whole(model, tmp_path):
    out = tmp_path / "out"
    export(str(model), "android", recipe="q8_0", out=out)
    before = tree(out)
    with pytest.raises(OutputError, match="exists") as error:
        export(str(model), "android", out=out)
    assert "--force" in error.value.hint
    assert tree(out) == before
    export(str(model), "android", recipe="q4_0", out=out, force=True)
    assert sorted(tree(out)) == ["README.md", manifest.NAME, "tiny-q4_0.gguf"]


def test_a_folder_that_is_not_ours_is_never_replaced(model, tmp_path):
    out = tmp_path / "photos"
    out.mkdir()
    (out / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(OutputError, match=r"cat\.jpg"):
        export(str(model), "android", out=out, force=True)
    assert tree(out) == {"cat.jpg": b"cat"}


def test_force_does_not_delete_what_a_user_put_beside_an_artifact(model, tmp_path):
    out = tmp_path / "out"
    export(str(model), "android", out=out)
    (out / "notes.txt").write_text("mine")
    before = tree(out)
    with pytest.raises(OutputError, match=r"notes\.txt"):
        export(str(model), "android", out=out, force=True)
    assert tree(out) == before


def test_the_old_artifact_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_bytes(b"old")
    rename = Path.rename

    def broken(self, target):
        if self.name.endswith(".partial"):
            raise OSError(5, os.strerror(5))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OutputError, match="cannot write"), new_folder(out, lambda: None) as partial:
        (partial / "new").write_bytes(b"new")
    assert tree(tmp_path) == {"out/old": b"old"}


def test_a_place_that_was_taken_meanwhile_is_not_replaced(model, tmp_path):
    out = tmp_path / "out"

    def meanwhile():
        with new_folder(out, lambda: folders.require_free(out, force=False)):
            out.mkdir()
            (out / "theirs").write_bytes(b"x")

    with pytest.raises(OutputError, match="theirs"):
        meanwhile()
    assert tree(tmp_path) == {"out/theirs": b"x"}


def test_an_error_ends_the_worker_threads(tmp_path):
    model = write_model(tmp_path / "tiny", MHA)
    tensors = phi3_tensors(MHA)
    tensors["model.embed_tokens.weight"][0, 0] = float("nan")
    write_weights(model, tensors)
    with pytest.raises(CheckpointError):
        export(str(model), "android", out=tmp_path / "out")
    assert not [t for t in threading.enumerate() if t.name.startswith("quantize")]


def test_the_working_folder_is_never_replaced(model, tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for out in (Path(), Path("..")):
        with pytest.raises(OutputError, match="working folder") as error:
            export(str(model), "android", out=out, force=True)
        assert "--out" in error.value.hint
    assert list(tmp_path.iterdir()) == [tmp_path / "inner"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(model, tmp_path):
    first = export(str(model), "android", recipe="q8_0", out=tmp_path / "v1")
    link = tmp_path / "latest"
    link.symlink_to(first.folder)
    export(str(model), "android", recipe="q4_0", out=link, force=True)
    assert link.is_symlink()
    assert sorted(tree(tmp_path / "v1")) == ["README.md", manifest.NAME, "tiny-q4_0.gguf"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "v1"]


def test_what_will_be_refused_is_refused_before_weights_are_fetched(model, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "resolve", lambda *_: pytest.fail("weights were fetched"))
    toaster = write_target(tmp_path / "toaster.toml", app="1 MB")
    with pytest.raises(DoesNotFitError):
        export(str(model), str(toaster), out=tmp_path / "out")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(OutputError, match=r"cat\.jpg"):
        export(str(model), "android", out=tmp_path / "photos")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(28, os.strerror(28)), CheckpointError("x")])
def test_an_interrupted_export_leaves_nothing(model, tmp_path, interruption, monkeypatch):
    def broken(*args):
        raise interruption

    monkeypatch.setattr(build, "_manifest", broken)
    with pytest.raises(type(interruption)):
        export(str(model), "android", out=tmp_path / "dist" / "out")
    assert not list((tmp_path / "dist").iterdir())


def test_an_interruption_keeps_what_was_there_before(model, tmp_path):
    out = tmp_path / "out"
    export(str(model), "android", out=out)
    before = tree(tmp_path)
    with contextlib.suppress(KeyboardInterrupt), new_folder(out, lambda: None) as partial:
        (partial / "half").write_bytes(b"x")
        assert len(list(tmp_path.iterdir())) == 2
        raise KeyboardInterrupt
    assert tree(tmp_path) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_names_its_tensor_and_leaves_nothing(tmp_path, bad):
    model = write_model(tmp_path / "tiny", MHA)
    tensors = phi3_tensors(MHA)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = bad
    write_weights(model, tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj"):
        export(str(model), "android", out=tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


def test_what_does_not_fit_is_refused_unless_forced(model, tmp_path):
    target = write_target(tmp_path / "toaster.toml", app="1 MB")
    with pytest.raises(DoesNotFitError) as error:
        export(str(model), str(target), out=tmp_path / "out")
    assert "--force" in error.value.hint
    assert not (tmp_path / "out").exists()
    assert export(str(model), str(target), out=tmp_path / "out", force=True).artifact.is_file()


def test_a_format_that_the_target_does_not_take_is_refused(model, tmp_path):
    with pytest.raises(UnsupportedError, match="directml takes onnx, not gguf"):
        export(str(model), "directml", format_="gguf", out=tmp_path / "out")


def test_every_tensor_is_read_exactly_once(model):
    with open_checkpoint(model) as source:
        spec = parse_config(source.config, source.generation_config, "tiny")
        plan = build.make_plan(spec, *load_recipe("q4_0"))
        with source.each_read_once(spec):
            for t, rows in quantize(source, plan, 2):
                assert sum(r.nbytes for r in rows) == t.bytes
        part = replace(plan, tensors=plan.tensors[:-1])
        with pytest.raises(CheckpointError, match="lm_head"), source.each_read_once(spec):
            read_all(quantize(source, part, 2))


def test_a_split_target_splits_by_itself(model, tmp_path):
    target = tmp_path / "small-files.toml"
    shipped = (Path(__file__).parent.parent / "targets" / "android.toml").read_text()
    target.write_text(shipped.replace('max_bytes = "1.5 GB"', 'max_bytes = "1.5 MB"'))
    made = export(str(model), str(target), recipe="f16", out=tmp_path / "out")
    assert made.artifact.name.endswith(f"-00001-of-{len(made.files):05d}.gguf")
    shutil.rmtree(made.folder)


def test_the_kv_cache_can_be_chosen_and_is_written_down(model, tmp_path):
    made = export(str(model), "android", recipe="q8_0", kv_cache="q8_0", out=tmp_path / "out")
    assert manifest.read_manifest(made.folder)["kv_cache"] == "q8_0"
    larger = export(str(model), "android", recipe="q8_0", out=tmp_path / "f16")
    assert made.prepared.fit.kv_cache < larger.prepared.fit.kv_cache
    with pytest.raises(UsageError, match="unknown KV cache type 'int8' for gguf"):
        export(str(model), "android", recipe="q8_0", kv_cache="int8", out=tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_an_int8_kv_cache_is_calibrated_and_runs(model, tmp_path):
    made = export(str(model), "cpu", recipe="f32", format_="onnx", kv_cache="int8", out=tmp_path / "out")
    report, *_ = validate_artifact(made.folder, protocol=Protocol(windows=Windows(2), threads=1))
    assert report.environment.flags["kv_type"] == "int8"
    assert 1e-7 < report.metrics["kl_mean"].value < 1e-2
