"""Where artifacts of Phi-3.5-MoE lose quality: a known culprit is named, and the weights are the runtime's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from _moe import EXPERTS, LAYERS, phimoe_tensors, write_phimoe

from phi3edge.artifact import find_artifact
from phi3edge.build import export
from phi3edge.centring import Centred
from phi3edge.checkpoint import open_checkpoint
from phi3edge.dequantized import Dequantized
from phi3edge.families import parse_config
from phi3edge.layers import By, Losses, find_losses
from phi3edge.mixture import LlamaCppDecoder, Mixture
from phi3edge.runners import llama_cpp, ort_genai
from phi3edge.text import Text

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("llama_cpp")

TEXT = Text("some text", " ".join(f"the {n} in {n * n} an" for n in range(400)), "0" * 64)
LENGTH = 128
ROLES = {"embedding", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "head"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phimoe(tmp_path_factory.mktemp("model") / "tiny")


def make(model: Path, out: Path, recipe: str, format_: str) -> Path:
    return export(str(model), "cpu", format_=format_, recipe=recipe, out=out, context=LENGTH).folder


def losses(artifact: Path, model: Path, by: By = "role") -> Losses:
    with open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        return find_losses(find_artifact(artifact), checkpoint, spec, by, TEXT, chunks=1)


@pytest.mark.parametrize("format_", ["gguf", "onnx"])
@pytest.mark.parametrize("by", ["block", "role"])
def test_a_damaged_expert_is_named_by_block_and_by_role(model: Path, tmp_path: Path, format_: str, by: By) -> None:
    from safetensors.torch import save_file

    damaged, tensors = write_phimoe(tmp_path / "damaged"), phimoe_tensors()
    weight = tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    found = losses(make(damaged, tmp_path / "out", "f32", format_), model, by)
    first, *others = found.rows
    assert (first.layer, first.role) == ((1, None) if by == "block" else (None, "ffn_down"))
    assert found.basis == ("centred for llama.cpp" if format_ == "gguf" else "the checkpoint's own")
    assert found.kl > 1e-3
    assert first.kl_without == pytest.approx(0, abs=1e-6)
    assert first.kl_only == pytest.approx(found.kl, rel=1e-4)
    assert all(row.kl_only == pytest.approx(0, abs=1e-6) for row in others)
    if by == "role":
        assert {row.role for row in found.rows} == ROLES


@pytest.mark.parametrize(("format_", "recipe", "codec"), [("gguf", "q4_0", "q4_0"), ("onnx", "int4", "uint4_b64")])
def test_the_weights_are_those_that_the_runtime_computes_with(
    model: Path, tmp_path: Path, format_: str, recipe: str, codec: str
) -> None:
    out = find_artifact(make(model, tmp_path / "out", recipe, format_))
    ids = np.random.default_rng(3).integers(0, 320, LENGTH)
    with open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        ours = Dequantized(out, spec)
        assert ours[f"model.layers.0.block_sparse_moe.experts.{EXPERTS - 1}.w1.weight"].codec == codec
        reference = Centred(checkpoint, spec) if format_ == "gguf" else checkpoint
        decoder = LlamaCppDecoder(spec) if format_ == "gguf" else None
        with torch.inference_mode():
            rounded, exact = (
                Mixture(source, spec, True, decoder)(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
                for source in (ours, reference)
            )
    module, options = (ort_genai, {}) if format_ == "onnx" else (llama_cpp, {"kv_type": "f32"})
    with module.open(out.file, context=LENGTH, threads=1, plain=True, **options) as runner:
        theirs = torch.from_numpy(runner.logits(ids)).log_softmax(-1)

    def kl(q: torch.Tensor) -> float:
        return float((theirs.exp() * (theirs - q)).sum(-1).mean())

    assert kl(exact) > 3 * kl(rounded)  # what is left: activations in 8 bits, and choices of experts that they change


def test_rows_of_an_export_have_the_bytes_of_all_experts(model: Path, tmp_path: Path) -> None:
    found = losses(make(model, tmp_path / "out", "q4_0", "gguf"), model)
    rows = {row.role: row for row in found.rows}
    assert rows["ffn_gate"].bytes == LAYERS * EXPERTS * 512 * 256 * 18 // 32
    assert rows["ffn_gate"].next
    assert rows["ffn_gate"].next.codecs == ["q5_k"]
    assert all(row.kl_without > 0 and row.kl_only > 0 for row in found.rows)
