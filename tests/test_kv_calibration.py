"""Calibration of an 8-bit KV cache, and the graph that has one."""

from pathlib import Path

import _models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from phi3edge.checkpoint import open_checkpoint
from phi3edge.emitters import Job, open_emitter
from phi3edge.errors import UnsupportedError
from phi3edge.families import parse_config
from phi3edge.kv_calibration import CHUNK_TOKENS, CHUNKS, HEADROOM, LARGEST_CODE, calibrate_kv
from phi3edge.plan import make_plan
from phi3edge.quantize import quantize
from phi3edge.recipes import load_recipe
from phi3edge.reference import load_model, load_tokenizer
from phi3edge.targets import load_target
from phi3edge.text import cut, default_text
from phi3edge.types import KVScales

SHAPE = _models.GROUPED
HEAD = SHAPE.hidden // SHAPE.heads


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _models.write_model(tmp_path_factory.mktemp("model") / "tiny", SHAPE)


@pytest.fixture(scope="module")
def scales(checkpoint: Path) -> KVScales:
    return calibrate_kv(checkpoint)


def write_folder(checkpoint: Path, out: Path, kv_cache: str, scales: KVScales | None) -> Path:
    """The checkpoint in full precision with a KV cache of a type."""
    name, recipe = load_recipe("f32")
    runtime = load_target("cpu")[1].formats["onnx"].model_copy(update={"kv_cache": kv_cache})
    out.mkdir()
    with open_checkpoint(checkpoint) as source:
        plan = make_plan(parse_config(source.config, source.generation_config, source.name), name, recipe)
        job = Job(plan, recipe, source, runtime, 512, "tiny", kv_scales=scales)
        open_emitter("onnx", job).emit(quantize(source, plan), out)
    return out


def logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits by plain onnxruntime, the second half of the tokens on a cache of the first."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    dtype = np.int8 if session.get_inputs()[-1].type == "tensor(int8)" else np.float32
    names = [i.name for i in session.get_inputs() if i.name.startswith("past")]
    cache = {name: np.zeros((1, SHAPE.kv_heads, 0, HEAD), dtype) for name in names}
    rows, half = [], len(ids) // 2
    for stop, part in ((half, ids[:half]), (len(ids), ids[half:])):
        mask = np.ones((1, stop), np.int64)
        out = session.run(None, {"input_ids": part[None], "attention_mask": mask, **cache})
        rows.append(out[0][0])
        cache = dict(zip(names, out[1:], strict=True))
    return np.concatenate(rows)


def test_values_are_the_projections_largest(checkpoint: Path, scales: KVScales) -> None:
    """The first layer's values by hand: rows v of its projection times the normalized embedding."""
    tensors = {k: v.float() for f in checkpoint.glob("*.safetensors") for k, v in load_file(f).items()}
    x = tensors[_models.EMBEDDING][torch.from_numpy(text_ids(checkpoint))]
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * tensors["model.layers.0.input_layernorm.weight"]
    rows = tensors["model.layers.0.self_attn.qkv_proj.weight"][SHAPE.q :]
    keys, values = ((x @ part.T).reshape(-1, SHAPE.kv_heads, HEAD) for part in (rows[: SHAPE.kv], rows[SHAPE.kv :]))
    largest = [side[0] * LARGEST_CODE / HEADROOM for side in (scales.keys, scales.values)]
    np.testing.assert_allclose(largest[1], values.abs().amax(0), rtol=1e-4)
    # the rotary embedding turns each pair of channels: no key leaves its pair's circle, some leave their own range
    pairs = keys.unflatten(-1, (2, HEAD // 2)).norm(dim=2).amax(0).repeat(1, 2).numpy()
    assert (largest[0] <= pairs * 1.0001).all()
    assert (largest[0] > keys.abs().amax(0).numpy() * 1.01).any()


def text_ids(checkpoint: Path) -> np.ndarray:
    last = load_tokenizer(checkpoint)(default_text().text)["input_ids"][-CHUNKS * CHUNK_TOKENS :]
    return cut(last, CHUNKS, CHUNK_TOKENS, CHUNK_TOKENS, "")


def test_shapes(scales: KVScales) -> None:
    for side in (scales.keys, scales.values):
        assert side.shape == (SHAPE.layers, SHAPE.kv_heads, HEAD)
        assert side.dtype == np.float32
        assert (side > 0).all()


def test_the_graph_keeps_int8_and_computes_the_same(checkpoint: Path, scales: KVScales, tmp_path: Path) -> None:
    ids = text_ids(checkpoint)[1, :64]
    with torch.inference_mode():
        expected = load_model(checkpoint)(torch.from_numpy(ids)[None]).logits[0].numpy()
    exact = logits(write_folder(checkpoint, tmp_path / "f32", "f32", None), ids)
    folder = write_folder(checkpoint, tmp_path / "int8", "int8", scales)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    cached = [v for v in (*graph.input, *graph.output) if v.name.startswith(("past", "present"))]
    assert len(cached) == 4 * SHAPE.layers
    assert {v.type.tensor_type.elem_type for v in cached} == {onnx.TensorProto.INT8}
    np.testing.assert_allclose(exact, expected, atol=1e-4)
    rounded = logits(folder, ids)
    error = np.sqrt(np.mean((rounded - expected) ** 2)) / expected.std()
    assert 0 < error < 0.02
    coarse = KVScales(scales.keys * 8, scales.values * 8)
    worse = logits(write_folder(checkpoint, tmp_path / "coarse", "int8", coarse), ids)
    assert np.mean((worse - expected) ** 2) > 4 * np.mean((rounded - expected) ** 2)


def test_int8_without_scales_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="int8 KV cache needs calibrated scales"):
        write_folder(checkpoint, tmp_path / "out", "int8", None)
