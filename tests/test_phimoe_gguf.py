"""Phi-3.5-MoE as GGUF: llama.cpp's `phimoe` computes another function, which the written weights make up for."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from _moe import (
    CONTEXT,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    MSCALE,
    ORIGINAL,
    PAIRS,
    write_phimoe,
)

from phi3edge import rounding
from phi3edge.build import export, prepare
from phi3edge.centring import ROUTER_SHIFT, Centred
from phi3edge.checkpoint import open_checkpoint
from phi3edge.errors import UnsupportedError
from phi3edge.families import parse_config
from phi3edge.gguf_names import tensor_name
from phi3edge.mixture import load_mixture
from phi3edge.proof import Protocol, validate_artifact
from phi3edge.rounding import Rounding
from phi3edge.runners import llama_cpp
from phi3edge.validate import Windows

SEQUENCES = np.random.default_rng(0).integers(0, 320, (24, 40))
NEVER_SHARED = {"router_jitter_noise": 1e-9}
"""A checkpoint whose two experts always have weights of 1, whatever the scores."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_phimoe(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def sharp(tmp_path_factory) -> Path:
    return write_phimoe(tmp_path_factory.mktemp("model") / "sharp", **NEVER_SHARED)


def log_probs(model: Path, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return load_mixture(model)(torch.from_numpy(ids)).logits.log_softmax(-1).numpy()


def gguf_log_probs(artifact: Path, sequences: np.ndarray, context: int = ORIGINAL) -> np.ndarray:
    with llama_cpp.open(artifact, context=context, threads=1, kv_type="f32", plain=True) as runner:
        rows = np.array([runner.logits(ids) for ids in sequences])
    return torch.from_numpy(rows).log_softmax(-1).numpy()


def kl(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (np.exp(reference) * (reference - other)).sum(-1)


def export_gguf(model: Path, out: Path, recipe: str = "f32", **options):
    return export(str(model), "cpu", format_="gguf", recipe=recipe, out=out, **{"context": ORIGINAL} | options)


def test_it_is_the_model_until_the_first_token_with_another_expert_near(model: Path, tmp_path: Path) -> None:
    with torch.inference_mode():
        found = load_mixture(model)(torch.from_numpy(SEQUENCES))
    expected, shared = found.logits.log_softmax(-1).numpy(), found.shared.numpy()
    before = np.cumsum(shared, 1) == 0
    found = kl(expected, gguf_log_probs(export_gguf(model, tmp_path / "out").artifact, SEQUENCES))
    assert before.mean() > 0.2
    assert found[before].mean() < 1e-7
    assert found[before].max() < 1e-5
    assert 0.02 < shared.mean() < 0.12  # the rest, of this model
    assert 0.0005 < found.mean() < 0.01


@pytest.mark.parametrize("length", [40, ORIGINAL, 400])
def test_without_such_tokens_it_is_the_model_on_the_side_it_is_opened_for(sharp: Path, tmp_path, length: int) -> None:
    ids = np.random.default_rng(1).integers(0, 320, (1, length))
    artifact = export_gguf(sharp, tmp_path / "out").artifact
    expected = log_probs(sharp, ids)
    assert kl(expected, gguf_log_probs(artifact, ids, max(length, ORIGINAL))).mean() < 1e-6
    if length == 40:
        assert kl(expected, gguf_log_probs(artifact, ids, CONTEXT)).mean() > 0.01  # the other side's factors


def test_the_weights_as_they_are_are_another_model(sharp: Path, tmp_path: Path, monkeypatch) -> None:
    """What a plain conversion gives; centring alone is not enough."""
    expected = log_probs(sharp, SEQUENCES)
    monkeypatch.setattr(rounding, "Centred", lambda source, spec: source)
    plain = kl(expected, gguf_log_probs(export_gguf(sharp, tmp_path / "plain").artifact, SEQUENCES)).mean()
    assert plain > 0.5

    class NotRouted(Centred):
        def rows(self, name: str, start: int, stop: int) -> np.ndarray:
            rows = super().rows(name, start, stop)
            return rows * 2**ROUTER_SHIFT if "gate.weight" in name else rows / 2 if ".w2." in name else rows

    monkeypatch.setattr(rounding, "Centred", NotRouted)
    assert kl(expected, gguf_log_probs(export_gguf(sharp, tmp_path / "n").artifact, SEQUENCES)).mean() > 0.02


def test_the_file_holds_every_tensor_in_llama_cpps_shapes(model: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    made = export_gguf(model, tmp_path / "out")
    reader = GGUFReader(made.artifact)
    keys = {key: field.contents() for key, field in reader.fields.items() if key.startswith(("phimoe.", "general."))}
    assert keys["general.architecture"] == "phimoe"
    assert (keys["phimoe.expert_count"], keys["phimoe.expert_used_count"]) == (EXPERTS, 2)
    assert keys["phimoe.rope.scaling.attn_factor"] == pytest.approx(MSCALE)
    assert keys["phimoe.rope.freq_base"] == 5000
    assert keys["phimoe.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-2)
    assert (keys["phimoe.feed_forward_length"], keys["phimoe.context_length"]) == (INTERMEDIATE, ORIGINAL)
    held = {t.name: t.data for t in reader.tensors}
    with open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        weights = Centred(checkpoint, spec)
        for tensor in spec.tensors:
            data = held[tensor_name(tensor)]
            np.testing.assert_array_equal(
                data if tensor.expert is None else data[tensor.expert], weights.read(tensor.name)
            )
        down = "model.layers.1.block_sparse_moe.experts.4.w2.weight"
        original = checkpoint.read(down)
        np.testing.assert_allclose(weights.read(down), 2 * (original - original.mean(0)), atol=1e-6)
    assert len(held) == len({tensor_name(t) for t in spec.tensors}) + 2
    assert held["blk.0.ffn_up_exps.weight"].shape == (EXPERTS, INTERMEDIATE, HIDDEN)
    assert held["rope_factors_long.weight"].shape == (PAIRS,)
    assert abs(held["token_embd.weight"].mean(1)).max() < 1e-6


@pytest.mark.parametrize(("recipe", "limit"), [("q8_0", 0.02), ("q4_0", 0.2), ("q4_k_m", 0.12)])
def test_round_to_nearest_recipes_round_experts_and_nothing_that_is_compared(
    sharp: Path, tmp_path: Path, recipe: str, limit: float
) -> None:
    made = export_gguf(sharp, tmp_path / "out", recipe)
    codecs = {(t.tensor.role): t.codec for t in made.prepared.plan.tensors}
    assert {codecs[role] for role in codecs if role.endswith(("norm", "bias")) or role == "router"} == {"f32"}
    assert {codecs[role] for role in ("ffn_gate", "ffn_up", "attn_output")} == {recipe.replace("q4_k_m", "q4_k")}
    assert codecs["ffn_down"] == ("q6_k" if recipe == "q4_k_m" else recipe)
    found = kl(log_probs(sharp, SEQUENCES), gguf_log_probs(made.artifact, SEQUENCES)).mean()
    assert 1e-5 < found < limit


def test_a_router_in_f16_is_refused(model: Path, tmp_path: Path) -> None:
    """Shrunk, its weights would be subnormal numbers there."""
    own = tmp_path / "own.toml"
    own.write_text('summary = "x"\nformats = ["gguf"]\n[codecs]\nlinear = "q8_0"\nnorm = "f32"\nrouter = "f16"\n')
    with pytest.raises(UnsupportedError, match="router is too small for f16"):
        export_gguf(model, tmp_path / "out", str(own))


def test_parts_hold_whole_tensors(sharp: Path, tmp_path: Path) -> None:
    made = export_gguf(sharp, tmp_path / "out", split_max_size=4_000_000)
    assert len(made.files) > 3
    assert max(path.stat().st_size for path in made.files) <= 4_000_000
    assert kl(log_probs(sharp, SEQUENCES[:2]), gguf_log_probs(made.artifact, SEQUENCES[:2])).mean() < 1e-6


def test_a_report_holds_it_against_our_reference_on_both_sides(sharp: Path, tmp_path: Path) -> None:
    made = export_gguf(sharp, tmp_path / "out", kv_cache="f32", context=512)
    report, *_ = validate_artifact(made.folder, protocol=Protocol(windows=Windows(2, 64), threads=1))
    bands = {(b.first, b.tokens, b.allocated): b.kl.value for b in report.positions}
    right = [(240, 256, 256), (256, 512, 512), (495, 512, 512)]
    assert all(bands[place] < 1e-4 for place in right)
    assert bands[240, 256, 512] > 0.01
    assert report.metrics["experts_shared"].value == 0
    assert report.protocol.reference == "phi3edge, float32"


def test_a_report_says_how_many_tokens_stay_different(model: Path, tmp_path: Path) -> None:
    made = export_gguf(model, tmp_path / "out", kv_cache="f32")
    report, *_ = validate_artifact(made.folder, protocol=Protocol(windows=Windows(2, 128), threads=1))
    figures = {key: metric.value for key, metric in report.metrics.items()}
    assert 0.01 < figures["experts_shared"] < 0.15
    assert figures["kl_unshared"] < figures["kl_mean"] < 0.01


def test_memory_is_a_few_experts_whatever_there_are(tmp_path: Path) -> None:
    """48 matrices of experts, 2 MB each as float32, of which a few are in memory at once."""
    experts, width = 8, 2048
    folder = write_phimoe(tmp_path / "in", "bfloat16", num_local_experts=experts, intermediate_size=width)
    export_gguf(folder, tmp_path / "warm", "q4_0", threads=1)  # compiles
    tracemalloc.start()
    export_gguf(folder, tmp_path / "out", "q4_0", threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * width * HIDDEN * 4 < LAYERS * experts * 3 * width * HIDDEN * 4 / 4


def test_what_is_not_made_is_refused_before_any_work(model: Path) -> None:
    for options, reason in (
        ({"rounding": Rounding("gptq")}, "a mixture of experts does not write its own text"),
        ({"rounding": Rounding("awq", "self+python")}, "a mixture of experts does not write its own text"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            prepare(str(model), "cpu", format_="gguf", **options)


def test_calibration_on_a_gpu_is_refused(model: Path, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(UnsupportedError, match="--device cuda is not for a mixture of experts"):
        prepare(str(model), "cpu", format_="gguf", rounding=Rounding("gptq", "python", device="cuda"))


def test_a_plan_says_what_stays_different_and_reads_two_experts_a_token(model: Path) -> None:
    ready = prepare(str(model), "cpu", format_="gguf", recipe="f32", context=64)
    assert any("within 2 % of a chosen one's" in note for note in ready.notes)
    assert any(f"up to {ORIGINAL} tokens" in note for note in ready.notes)
    plan = ready.plan
    of_experts = sum(t.bytes for t in plan.tensors if t.tensor.expert is not None)
    embedding = next(t.bytes for t in plan.tensors if t.tensor.role == "embedding")
    read = plan.weight_bytes - embedding - of_experts * (EXPERTS - 2) // EXPERTS
    assert ready.fit.roofline_tokens_per_s == pytest.approx(ready.target.bandwidth.gb_per_s * 1e9 / read, rel=1e-3)
