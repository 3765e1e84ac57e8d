"""Where an artifact loses quality, on small models with a known culprit; llama.cpp and ONNX Runtime are the oracles."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from _gguf import gguf_name, write_gguf
from _models import TIED, Shape, write_model
from gguf import GGMLQuantizationType, GGUFReader

from phi3edge import build, layers
from phi3edge.artifact import find_artifact
from phi3edge.checkpoint import open_checkpoint
from phi3edge.dequantized import Dequantized
from phi3edge.errors import UnsupportedError, UsageError
from phi3edge.families import parse_config
from phi3edge.forward import Decoder, Readable
from phi3edge.layers import By, Losses, find_losses
from phi3edge.rounding import Rounding
from phi3edge.runners import llama_cpp, ort_genai
from phi3edge.targets import Format
from phi3edge.text import Text
from phi3edge.types import ModelSpec

FOUR = Shape(layers=4, kv_heads=2)
SHORT = {"max_position_embeddings": 128, "original_max_position_embeddings": 128, "sliding_window": 127}
TEXT = Text("some text", " ".join(f"the {n} in {n * n} an" for n in range(400)), "0" * 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "four", FOUR, **SHORT)


def losses(artifact: Path, model: Path, by: By = "role", chunks: int = 1) -> Losses:
    with open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        return find_losses(find_artifact(artifact), checkpoint, spec, by, TEXT, chunks)


def export(model: Path, folder: Path, recipe: str, format_: Format, rounding: Rounding = build.PLAIN) -> Path:
    options = {"recipe": recipe, "format_": format_, "rounding": rounding, "out": folder / "out"}
    return build.export(str(model), "cpu", **options, threads=1, force=True).folder


def damage(file: Path, name: str) -> None:
    """Noise as large as the weights, in one float32 tensor of a GGUF file."""
    tensor = next(t for t in GGUFReader(file).tensors if t.name == gguf_name(name))
    values = np.memmap(file, np.float32, "r+", offset=int(tensor.data_offset), shape=(int(tensor.n_elements),))
    values += np.random.default_rng(0).standard_normal(len(values), np.float32) * values.std()
    values.flush()


@pytest.mark.parametrize("layer", [1, 3])
def test_a_damaged_block_is_named(model: Path, tmp_path: Path, layer: int) -> None:
    file = write_gguf(model, tmp_path / "damaged.gguf")
    damage(file, f"model.layers.{layer}.mlp.down_proj.weight")
    found = losses(file, model, "block")
    first, *others = found.rows
    assert (first.layer, first.role) == (layer, None)
    assert found.kl > 0.01
    assert first.kl_without == pytest.approx(0, abs=1e-6)
    assert first.kl_only == pytest.approx(found.kl, rel=1e-4)
    for row in others:
        assert row.kl_without > found.kl / 3
        assert row.kl_only == pytest.approx(0, abs=1e-6)
    assert len(found.rows) == FOUR.layers + 2


def test_a_damaged_role_is_named(model: Path, tmp_path: Path) -> None:
    file = write_gguf(model, tmp_path / "damaged.gguf")
    damage(file, "model.layers.2.self_attn.o_proj.weight")
    found = losses(file, model)
    assert found.rows[0].role == "attn_output"
    assert found.rows[0].kl_without == pytest.approx(0, abs=1e-6)
    assert {row.role for row in found.rows} == {
        *("embedding", "attn_qkv", "attn_output", "ffn_gate_up", "ffn_down", "head")
    }


def test_a_damaged_head_is_named(model: Path, tmp_path: Path) -> None:
    file = write_gguf(model, tmp_path / "damaged.gguf")
    damage(file, "lm_head.weight")
    for by in ("role", "block"):
        assert losses(file, model, by).rows[0].role == "head"


def test_full_precision_loses_nothing(model: Path, tmp_path: Path) -> None:
    found = losses(write_gguf(model, tmp_path / "whole.gguf"), model)
    assert found.basis == "the checkpoint's own"
    assert abs(found.kl) < 1e-6
    assert all(abs(row.kl_only) < 1e-6 and abs(row.kl_without) < 1e-6 for row in found.rows)


@pytest.mark.parametrize(
    ("format_", "recipe", "method"), [("gguf", "q4_0", "gptq"), ("onnx", "int4", "gptq"), ("gguf", "q4_0", "awq")]
)
def test_calibrated_weights_are_exchanged_in_their_own_basis(
    model: Path, tmp_path: Path, format_: Format, recipe: str, method: str
) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text(" ".join(f"ring {n} thing er {n % 7}" for n in range(3000)))
    out = export(model, tmp_path, recipe, format_, Rounding(method, calibration=str(text), sequences=8))
    by: By = "block" if method == "awq" else "role"
    found = losses(out, model, by)
    assert found.basis.startswith("rotated" if method == "gptq" else "the checkpoint's own")
    assert 0 < found.kl < 0.5
    for row in found.rows:  # a unit in another basis would cost several nats; errors of calibrated units cancel in part
        assert 0 < row.kl_without < 1.5 * found.kl
        assert 0 < row.kl_only < 1.5 * found.kl
    if method == "awq":
        with pytest.raises(UnsupportedError, match="are scaled"):
            losses(out, model, "role")


@pytest.mark.parametrize(("format_", "recipe"), [("gguf", "q4_0"), ("onnx", "int4")])
def test_what_is_computed_is_what_the_runtime_computes(
    model: Path, tmp_path: Path, format_: Format, recipe: str
) -> None:
    out = export(model, tmp_path, recipe, format_)
    found, ids = find_artifact(out), np.random.default_rng(3).integers(0, 320, 64)
    with open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        reference, ours = forward(checkpoint, ids, spec), forward(Dequantized(found, spec), ids, spec)
    module, options = (ort_genai, {}) if format_ == "onnx" else (llama_cpp, {"kv_type": "f32"})
    with module.open(found.file, context=128, threads=1, plain=True, **options) as runner:
        theirs = torch.from_numpy(runner.logits(ids))
    assert kl(ours, theirs) < 1e-3  # activations are rounded to 8 bits there
    assert kl(reference, theirs) > 10 * kl(ours, theirs)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.inference_mode()
def forward(weights: Readable, ids: np.ndarray, spec: ModelSpec) -> torch.Tensor:
    decoder = Decoder(spec)
    names = {(t.role, t.layer): t.name for t in spec.tensors}

    def read(role: str, layer: int | None = None) -> torch.Tensor:
        return torch.from_numpy(weights.read(names[role, layer]))

    h = read("embedding")[torch.from_numpy(ids)][None]
    for n in range(spec.layers):
        h = decoder.block(h, {role: read(role, layer) for role, layer in names if layer == n})
    return (decoder.norm(h, read("output_norm")) @ read("head").T)[0]


def test_a_tied_head_goes_with_the_embedding(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", TIED, **SHORT)
    out = export(model, tmp_path, "q4_0", "gguf")
    found = losses(out, model)
    assert [row.role for row in found.rows if row.role in ("embedding", "head")] == ["embedding"]
    assert found.kl / 2 < sum(row.kl_only for row in found.rows) < 2 * found.kl


def test_the_next_codec_and_its_bytes(model: Path, tmp_path: Path) -> None:
    found = losses(write_gguf(model, tmp_path / "q.gguf", GGMLQuantizationType.Q4_0), model)
    row = next(row for row in found.rows if row.role == "ffn_down")
    weights = FOUR.layers * FOUR.hidden * FOUR.intermediate
    assert (row.codecs, row.bytes) == (["q4_0"], weights * 9 // 16)
    assert row.next is not None
    assert row.next.codecs == ["q5_k"]
    assert row.next.bytes == weights // 8
    assert row.next.kl_saved == pytest.approx((found.kl - row.kl_without) * 0.75)
    assert row.next.kl_saved_per_mb == pytest.approx(row.next.kl_saved / row.next.bytes * 1e6)


@pytest.mark.parametrize(
    ("bits", "ladder", "expected"),
    [
        (5.0, ["uint4_b32", "uint4_b16", "int8_b128"], "uint4_b16"),  # 4 bits with float32 scales of 32 weights
        (4.5, ["q4_k", "q5_k", "q6_k"], "q5_k"),
        (8.5, ["q8_0", "f16"], "f16"),
        (32, ["q8_0", "f16"], None),
    ],
)
def test_the_next_codec_is_the_one_with_the_next_more_bytes(bits: float, ladder: list[str], expected: str) -> None:
    assert layers._bigger(bits * 256 / 8, 256, ladder) == expected


def test_chunks_in_batches_give_the_same(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(model, tmp_path / "q.gguf", GGMLQuantizationType.Q4_0)
    whole = losses(file, model, chunks=3)
    monkeypatch.setattr(layers, "TOGETHER", 2)
    parts = losses(file, model, chunks=3)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-5)
    assert [row.role for row in parts.rows] == [row.role for row in whole.rows]


def test_another_checkpoint_is_refused(model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", FOUR, seed=1, **SHORT)
    with pytest.raises(UnsupportedError, match="in no basis that is known"):
        losses(write_gguf(other, tmp_path / "other.gguf"), model)


def test_a_short_text_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has .* tokens"):
        losses(write_gguf(model, tmp_path / "whole.gguf"), model, chunks=1000)


def test_the_file_holds_what_was_found(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    found = losses(write_gguf(model, tmp_path / "q.gguf", GGMLQuantizationType.Q4_0), model)
    said = json.loads(layers.write(found, tmp_path).read_text())
    assert said == layers.to_data(found)
    assert (said["schema"], said["chunks"], said["kl"]) == (1, 1, found.kl)
    assert {"layer", "role", "kl_without", "kl_only", "bytes"} <= set(said["rows"][0])
