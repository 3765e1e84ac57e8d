"""ONNX Runtime GenAI folders on disk: bytes where they should be, settings, least versions, nothing left on errors."""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from _models import GROUPED, Shape, write_model
from _onnx_folders import make, write_recipe
from _onnx_graphs import external, logits

from phi3edge import manifest
from phi3edge.build import prepare
from phi3edge.checkpoint import Checkpoint, open_checkpoint
from phi3edge.emitters import Emitter, Job, _genai_config, _genai_graph, _genai_versions, open_emitter, ort_genai
from phi3edge.errors import CheckpointError, OutputError, UnsupportedError, UsageError
from phi3edge.quantize import quantize

pytest.importorskip("onnxruntime_genai")

KIB64 = 65536
IDS = [(7919 * n + 13) % 300 for n in range(20)]
WIDE = Shape(layers=2, hidden=512, intermediate=1024)
WIDE_TIED = replace(WIDE, tied=True)
TINY = Shape(layers=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Shape, Path]:
    """Checkpoints, written once."""
    shapes = (GROUPED, WIDE, WIDE_TIED, TINY)
    return {shape: write_model(tmp_path_factory.mktemp("models") / "tiny", shape) for shape in shapes}


@pytest.fixture
def tiny(models: dict[Shape, Path]) -> Iterator[Checkpoint]:
    with open_checkpoint(models[TINY]) as source:
        yield source


def open_job(source: Checkpoint, folder: Path, linear: str = "f32", target: str = "cpu", **changes: Any) -> Emitter:
    ready = prepare(str(source.path), target, recipe=write_recipe(folder, linear), format_="onnx")
    job = Job(ready.plan, ready.recipe, source, ready.runtime, ready.fit.context, "tiny")
    return open_emitter("onnx", replace(job, **changes))


def used_in_order(graph: onnx.GraphProto) -> list[str]:
    """Initializers in the order in which nodes need them, straight or through nodes of weights alone."""
    weights = {tensor.name for tensor in graph.initializer}
    behind = {n.output[0]: n.input[0] for n in graph.node if n.op_type in ("Cast", "Transpose")}
    found: dict[str, None] = {}
    for node in graph.node:
        if node.op_type not in ("Cast", "Transpose"):
            for name in node.input:
                while name in behind:
                    name = behind[name]
                if name in weights:
                    found[name] = None
    return list(found)


@pytest.mark.parametrize("recipe", ["uint4_b32", "f16"])
def test_weights_lie_in_the_order_of_their_use(models, tmp_path, recipe):
    made = make(models[WIDE], tmp_path / "out", recipe)
    places = external(made.artifact)
    tables = {name for name in places if name.endswith("_cache")}
    in_file = sorted(places, key=lambda name: places[name][1])
    graph = onnx.load(made.artifact, load_external_data=False).graph
    used = [name for name in used_in_order(graph) if name in places and name not in tables]
    assert [name for name in in_file if name not in tables] == used
    assert len(used) >= 2 + 4 * WIDE.layers
    end = 0
    for name in in_file:
        file, offset, length = places[name]
        assert file == "model.onnx.data"
        assert offset % KIB64 == 0
        assert end <= offset < end + KIB64
        end = offset + length
    assert (made.folder / "model.onnx.data").stat().st_size == end


def test_only_what_is_below_64_kib_stays_in_the_model(models, tmp_path):
    made = make(models[WIDE], tmp_path / "out", "uint4_b32")
    tensors = onnx.load(made.artifact, load_external_data=False).graph.initializer
    inside = [tensor for tensor in tensors if not tensor.external_data]
    assert inside
    assert all(tensor.ByteSize() < KIB64 + 200 for tensor in inside)
    assert all(length >= KIB64 for _, _, length in external(made.artifact).values())


def test_rotary_tables_of_a_long_context_are_not_in_the_model(tmp_path):
    checkpoint = write_model(tmp_path / "tiny", TINY, max_position_embeddings=4096)
    made = make(checkpoint, tmp_path / "out", "uint4_b32")
    tables = [length for name, (_, _, length) in external(made.artifact).items() if name.endswith("_cache")]
    assert tables == [4096 * 32 * 4] * 2


@pytest.mark.parametrize("recipe", ["uint4_b32", "f16"])
def test_a_tied_heads_bytes_are_there_once(models, tmp_path, recipe):
    made = make(models[WIDE_TIED], tmp_path / "out", recipe)
    places = external(made.artifact)
    [head] = [place for name, place in places.items() if name.startswith("lm_head")]
    [embedding] = [place for name, place in places.items() if "embed_tokens" in name]
    assert head == embedding


def test_the_same_bytes_whatever_the_number_of_threads(models, tmp_path):
    one, two = (make(models[GROUPED], tmp_path / str(n), "uint4_b32", threads=n) for n in (1, 2))
    names = sorted(path.name for path in one.folder.iterdir())
    assert names == sorted(path.name for path in two.folder.iterdir())
    assert [name for name in names if (one.folder / name).read_bytes() != (two.folder / name).read_bytes()] == []


def test_split_data_is_the_same_model(models, tmp_path):
    whole = make(models[GROUPED], tmp_path / "whole", "f16")
    limit = 600_000
    split = make(models[GROUPED], tmp_path / "split", "f16", split_max_size=limit)
    data = sorted(path.name for path in split.folder.glob("model.onnx.data*"))
    assert data == [f"model.onnx.data.{n}" for n in range(len(data))]
    assert len(data) > 2
    assert all(path.stat().st_size <= limit for path in split.folder.iterdir())
    assert {file for file, _, _ in external(split.artifact).values()} == set(data)
    np.testing.assert_array_equal(logits(split.artifact, IDS), logits(whole.artifact, IDS))


def test_what_is_larger_than_a_file_may_be_is_refused(models, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"gate_up.*has 524288 bytes, files hold 300000"):
        make(models[GROUPED], tmp_path / "out", "f16", split_max_size=300_000)
    monkeypatch.setattr(ort_genai, "ALIGNMENT", 10**9)
    with pytest.raises(UsageError, match=r"model\.onnx has \d+ bytes, files hold 600000"):
        make(models[GROUPED], tmp_path / "out", "f16", split_max_size=600_000)
    assert not (tmp_path / "out").exists()


def swapped(stream: list) -> list:
    return [stream[1], stream[0], *stream[2:]]


def short(stream: list) -> list:
    return [(stream[0][0], stream[0][1][:-1]), *stream[1:]]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (swapped, "expected tensor .* next, got"),
        (short, "bytes, got"),
        (lambda stream: [*stream, stream[0]], "expected no tensor after"),
        (lambda stream: stream[:-1], "got the end"),
    ],
)
def test_a_stream_that_is_not_the_plan_is_our_bug(tiny, tmp_path, damage, says):
    emitter = open_job(tiny, tmp_path)
    ready = prepare(str(tiny.path), "cpu", recipe=write_recipe(tmp_path, "f32"), format_="onnx")
    stream = [(t, np.split(rows, 2) if len(rows) % 2 == 0 else [rows]) for t, rows in whole_tensors(tiny, ready.plan)]
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match=says):
        emitter.emit(damage(stream), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def whole_tensors(source: Checkpoint, plan: Any) -> Iterator[tuple[Any, np.ndarray]]:
    return ((t, np.concatenate(list(chunks))) for t, chunks in quantize(source, plan, 1))


def test_an_interrupted_run_leaves_everything_as_it_was(tiny, tmp_path):
    def interrupted() -> Iterator[Any]:
        yield tensors[0][0], [tensors[0][1]]
        raise KeyboardInterrupt

    emitter = open_job(tiny, tmp_path)
    tensors = list(whole_tensors(tiny, prepare(str(tiny.path), "cpu", recipe="f32", format_="onnx").plan))
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx").write_bytes(b"kept")
    with pytest.raises(KeyboardInterrupt):
        emitter.emit(interrupted(), out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {"model.onnx": b"kept"}


def test_a_full_disk_is_one_clear_line(models, tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"model\.onnx\.data: cannot be written: No space left") as caught:
        make(models[TINY], tmp_path / "out", "f32")
    assert "free some space" in str(caught.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["f32.toml"]


@pytest.mark.parametrize(("target", "kv_cache"), [("cpu", "f16"), ("webgpu", "f32"), ("directml", "q8_0")])
def test_a_kv_cache_that_the_provider_does_not_keep_is_refused(tiny, tmp_path, target, kv_cache):
    ready = prepare(str(tiny.path), target, recipe=write_recipe(tmp_path, "f16"), format_="onnx")
    with pytest.raises(UnsupportedError, match=f"not {kv_cache}"):
        open_job(tiny, tmp_path, "f16", target, runtime=ready.runtime.model_copy(update={"kv_cache": kv_cache}))


LEFT_OUT = {"diversity_penalty", "early_stopping", "length_penalty", "no_repeat_ngram_size"}
"""Search settings that the builder writes with the runtime's own defaults; they are of beam search, or off."""


@pytest.mark.parametrize("target", ["cpu", "cuda", "directml", "webgpu"])
def test_settings_are_the_builders_but_for_what_is_chosen(tmp_path, target):
    checkpoint = write_model(tmp_path / "tiny", GROUPED, sliding_window=47)
    provider = {"directml": "dml"}.get(target, target)
    theirs = builders_config(checkpoint, provider, tmp_path)
    made = make(checkpoint, tmp_path / "out", "f16", target, context=256)
    ours = json.loads((made.folder / "genai_config.json").read_text())
    theirs["model"]["decoder"].pop("sliding_window", None)  # bounds the cache, and fails on prompts beyond it
    assert {key for key in theirs["search"] if key not in ours["search"]} == LEFT_OUT
    kept = {key: value for key, value in theirs["search"].items() if key not in LEFT_OUT}
    assert ours["search"] == kept | {"max_length": 256}  # theirs is the whole context: all of it would be allocated
    assert ours["model"] == theirs["model"]


def builders_config(checkpoint: Path, provider: str, folder: Path) -> dict[str, Any]:
    import onnx_ir as ir
    import transformers
    from onnxruntime_genai.models.builders.phi import Phi3MiniModel

    with open_checkpoint(checkpoint) as source:
        spec = prepare(str(source.path), "cpu", format_="onnx").plan.model
    config = _genai_graph._config(spec, transformers)
    config._name_or_path = str(checkpoint)
    dtype = ir.DataType.FLOAT if provider == "cpu" else ir.DataType.FLOAT16
    Phi3MiniModel(config, dtype, dtype, provider, "", {}).make_genai_config(config, {}, str(folder))
    return json.loads((folder / "genai_config.json").read_text())


def search(checkpoint: Path, **settings: Any) -> dict[str, Any]:
    spec = prepare(str(checkpoint), "cpu", format_="onnx").plan.model
    return _genai_config.genai_config(spec, ["input_ids"], "cpu", 64, "model.onnx", settings)["search"]


def test_sampling_is_the_checkpoints(models):
    chosen = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1}
    found = search(models[TINY], **chosen)
    assert {key: found[key] for key in chosen} == chosen
    assert search(models[TINY], temperature=None) == search(models[TINY])


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", "hot"), ("top_k", 2.5), ("do_sample", 1), ("top_p", True), ("top_p", 1e400)]
)
def test_a_sampling_setting_of_another_kind_is_refused(models, key, value):
    with pytest.raises(CheckpointError, match=f"generation_config.json: {key} is") as caught:
        search(models[TINY], **{key: value})
    assert f"remove {key}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("shape", "window", "codec", "kv_cache", "least"),
    [
        (Shape(layers=1), None, "uint4_b32", "f32", "1.23"),
        (Shape(layers=1), 512, "uint4_b32", "f32", "1.23"),
        (Shape(layers=1), 511, "uint4_b32", "f32", "1.24"),
        (Shape(layers=1), 511, "uint4_b32", "int8", "1.27"),
        (Shape(layers=1, hidden=288, heads=3, kv_heads=3), None, "uint4_b32", "f32", "1.27"),
        (Shape(layers=1, hidden=288, heads=3, kv_heads=3), None, "int4_b32", "f32", "1.23"),
        (Shape(layers=1, hidden=288, heads=3, kv_heads=3), None, "uint8_b32", "f32", "1.23"),
        (Shape(layers=1, hidden=288, heads=3, kv_heads=3), None, "f16", "f32", "1.23"),
    ],
)
def test_the_least_version_follows_from_what_is_used(tmp_path, shape, window, codec, kv_cache, least):
    checkpoint = write_model(tmp_path / "tiny", shape, sliding_window=window)
    ready = prepare(str(checkpoint), "cpu", recipe=write_recipe(tmp_path, codec), format_="onnx")
    expected = {"onnxruntime-genai": ">=0.9", "onnxruntime": f">={least}"}
    assert _genai_versions.requires(ready.plan, kv_cache) == expected


def test_the_manifest_says_the_least_versions(models, tmp_path):
    made = make(models[TINY], tmp_path / "out", "f32")
    assert manifest.read_manifest(made.folder)["requires"] == {"onnxruntime-genai": ">=0.9", "onnxruntime": ">=1.24"}
