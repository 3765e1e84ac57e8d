"""Where an ONNX folder of Phi-3-small loses quality: a known culprit is named, and the weights are the runtime's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from _small import SMALL, Small, small_tensors, write_small

from phi3edge.artifact import find_artifact
from phi3edge.build import export
from phi3edge.checkpoint import open_checkpoint
from phi3edge.dequantized import HEAD, Dequantized
from phi3edge.errors import UnsupportedError
from phi3edge.families import parse_config
from phi3edge.layers import By, Losses, find_losses
from phi3edge.phi3small import Phi3Small
from phi3edge.rounding import Rounding
from phi3edge.runners import ort_genai
from phi3edge.text import Text

pytest.importorskip("onnxruntime_genai")

TEXT = Text("some text", " ".join(f"the {n} in {n * n} an" for n in range(400)), "0" * 64)
LENGTH = 128  # eight blocks, of which a query sees the last two and every third
ROLES = {"embedding", "attn_qkv", "attn_output", "ffn_gate_up", "ffn_down"}


def make(folder: Path, recipe: str, shape: Small = SMALL, rounding: Rounding | None = None) -> tuple[Path, Path]:
    """A checkpoint and an export of it."""
    model = write_small(folder / "model", shape, max_position_embeddings=LENGTH)
    options = {"rounding": rounding} if rounding else {}
    return model, export(str(model), "cpu", format_="onnx", recipe=recipe, out=folder / "out", **options).folder


def losses(artifact: Path, model: Path, by: By = "role") -> Losses:
    with open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        return find_losses(find_artifact(artifact), checkpoint, spec, by, TEXT, chunks=1)


@pytest.mark.parametrize("culprit", ["mlp.down_proj", "self_attn.query_key_value"])
def test_a_damaged_block_and_role_are_named(tmp_path: Path, culprit: str) -> None:
    from safetensors.torch import save_file

    model, layer = write_small(tmp_path / "model", max_position_embeddings=LENGTH), 1
    damaged, tensors = write_small(tmp_path / "damaged", max_position_embeddings=LENGTH), small_tensors()
    for kind in ("weight", "bias"):
        tensor = tensors[f"model.layers.{layer}.{culprit}.{kind}"]
        tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) * tensor.float().std()
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    out = export(str(damaged), "cpu", format_="onnx", recipe="f32", out=tmp_path / "out").folder
    for by in ("block", "role"):
        found = losses(out, model, by)
        first, *others = found.rows
        assert (first.layer, first.role) == (
            (layer, None) if by == "block" else (None, "ffn_down" if "mlp" in culprit else "attn_qkv")
        )
        assert found.kl > 0.01
        assert first.kl_without == pytest.approx(0, abs=1e-6)
        assert first.kl_only == pytest.approx(found.kl, rel=1e-4)
        assert all(row.kl_only == pytest.approx(0, abs=1e-6) for row in others)


@pytest.mark.parametrize("shape", [SMALL, Small(tied=False)], ids=["tied", "untied"])
def test_the_weights_are_those_that_the_runtime_computes_with(tmp_path: Path, shape: Small) -> None:
    model, out = make(tmp_path, "int4", shape)
    ids = np.random.default_rng(3).integers(0, shape.vocab, LENGTH)
    with open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        ours = Dequantized(find_artifact(out), spec)
        both = [Phi3Small(source, spec) for source in (ours, checkpoint)]
        if spec.tied:
            assert (ours.read(HEAD) == ours.read("model.embed_tokens.weight")).all()
    rounded, exact = (one(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1) for one in both)
    with ort_genai.open(out, context=LENGTH, threads=1) as runner:
        found = torch.from_numpy(runner.logits(ids)).log_softmax(-1)

    def kl(q: torch.Tensor) -> float:
        return float((found.exp() * (found - q)).sum(-1).mean())

    assert kl(rounded) < 1e-3  # activations are rounded to 8 bits there
    assert kl(exact) > 10 * kl(rounded)


def test_losses_of_roles_add_up(tmp_path: Path) -> None:
    model, out = make(tmp_path, "int4")
    found = losses(out, model)
    assert found.basis == "the checkpoint's own"
    assert {row.role for row in found.rows} == ROLES
    assert found.kl / 2 < sum(row.kl_only for row in found.rows) < 2 * found.kl
    assert all(row.next and row.next.bytes > 0 for row in found.rows)


def test_scaled_channels_are_exchanged_by_block_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"ring {n} thing er {n % 7}" for n in range(3000)))
    model, out = make(tmp_path, "int4", rounding=Rounding("awq", str(text), sequences=8))
    with pytest.raises(UnsupportedError, match="are scaled"):
        losses(out, model)
    found = losses(out, model, "block")
    assert len(found.rows) == SMALL.layers + 1
    assert all(0 < row.kl_without < 1.5 * found.kl for row in found.rows)
