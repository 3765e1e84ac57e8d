"""Predicted KL of rounding, against what rounding does to small models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from _models import GROUPED, TIED, Shape, write_model

from phi3edge import sensitivity
from phi3edge.checkpoint import Checkpoint, open_checkpoint
from phi3edge.codecs import codec
from phi3edge.families import parse_config
from phi3edge.forward import Decoder, load_block, load_outer
from phi3edge.sensitivity import kept_losses, predict_losses
from phi3edge.types import ModelSpec

SEQUENCES, TOKENS = 24, 32
CODECS = ("q3_k", "q4_k", "q6_k", "q8_0")


def open_model(folder: Path, shape: Shape) -> tuple[Checkpoint, ModelSpec]:
    checkpoint = open_checkpoint(write_model(folder, shape))
    return checkpoint, parse_config(checkpoint.config, checkpoint.generation_config, "tiny")


def some_ids(spec: ModelSpec, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, spec.vocab_size, (SEQUENCES, TOKENS))


def rounded(weight: torch.Tensor, name: str) -> torch.Tensor:
    return torch.from_numpy(codec(name).dequantize(codec(name).quantize(weight.numpy())))


def log_probs(checkpoint: Checkpoint, spec: ModelSpec, ids: np.ndarray, codecs: dict[str, str]) -> torch.Tensor:
    """Of the model with some tensors rounded: codecs by tensor name."""
    names = {(t.role, t.layer): t.name for t in spec.tensors}

    def taken(role: str, layer: int | None, weight: torch.Tensor) -> torch.Tensor:
        chosen = codecs.get(names[role, layer])
        return rounded(weight, chosen) if chosen else weight

    decoder = Decoder(spec)
    h = taken("embedding", None, load_outer(checkpoint, spec, "embedding"))[torch.from_numpy(ids)]
    for layer in range(spec.layers):
        weights = {role: taken(role, layer, w) for role, w in load_block(checkpoint, spec, layer).items()}
        h = decoder.block(h, weights)
    head = taken("embedding" if spec.tied else "head", None, load_outer(checkpoint, spec, "head"))
    return (decoder.norm(h, load_outer(checkpoint, spec, "output_norm")) @ head.T).log_softmax(-1)


@torch.inference_mode()
def measured(checkpoint: Checkpoint, spec: ModelSpec, ids: np.ndarray, codecs: dict[str, str]) -> float:
    """Mean KL of the rounded model from the float one, nats per token."""
    p, q = (log_probs(checkpoint, spec, ids, chosen) for chosen in ({}, codecs))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("shape", [GROUPED, TIED], ids=["grouped", "tied"])
def test_predictions_are_near_what_rounding_each_tensor_does(tmp_path: Path, shape: Shape) -> None:
    checkpoint, spec = open_model(tmp_path / "model", shape)
    ids = some_ids(spec)
    names = [t.name for t in spec.tensors if len(t.shape) == 2]
    with checkpoint:
        found = predict_losses(checkpoint, spec, ids, dict.fromkeys(names, ("q4_k",)))
        assert set(found) == set(names)
        for name in names:
            truth = measured(checkpoint, spec, ids, {name: "q4_k"})
            assert truth / 2 < found[name]["q4_k"] < truth * 2, name
        total = measured(checkpoint, spec, ids, dict.fromkeys(names, "q4_k"))
    predicted = sum(by_codec["q4_k"] for by_codec in found.values())
    assert total / 1.6 < predicted < total * 1.6  # losses of tensors add up


def test_finer_codecs_cost_less_and_only_what_is_asked_for_is_predicted(tmp_path: Path) -> None:
    checkpoint, spec = open_model(tmp_path / "model", GROUPED)
    asked = {t.name: CODECS for t in spec.tensors if t.role in ("embedding", "attn_output", "ffn_down", "head")}
    with checkpoint:
        found = predict_losses(checkpoint, spec, some_ids(spec), asked)
    assert set(found) == set(asked)
    for by_codec in found.values():
        losses = [by_codec[name] for name in CODECS]
        assert losses == sorted(losses, reverse=True)
        assert losses[0] > 3 * losses[1] > 0


def test_float_codecs_cost_next_to_nothing(tmp_path: Path) -> None:
    checkpoint, spec = open_model(tmp_path / "model", GROUPED)
    [name] = [t.name for t in spec.tensors if t.role == "head"]
    with checkpoint:
        found = predict_losses(checkpoint, spec, some_ids(spec), {name: ("bf16", "f16", "q8_0")})[name]
    assert found["bf16"] == 0  # what the checkpoint holds
    assert 0 <= found["f16"] < found["q8_0"]


def test_a_sample_of_rows_tells_about_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, spec = open_model(tmp_path / "model", GROUPED)
    asked = {t.name: ("q4_k",) for t in spec.tensors if t.role in ("ffn_gate_up", "head")}
    with checkpoint:
        sampled = predict_losses(checkpoint, spec, some_ids(spec), asked)
        monkeypatch.setattr(sensitivity, "SAMPLED_ROWS", 10**6)
        whole = predict_losses(checkpoint, spec, some_ids(spec), asked)
    for name in asked:
        assert sampled[name]["q4_k"] == pytest.approx(whole[name]["q4_k"], rel=0.25)


def test_predictions_are_kept_and_made_anew_only_for_another_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "cache"))
    checkpoint, spec = open_model(tmp_path / "model", GROUPED)
    asked = {t.name: ("q4_k", "q8_0") for t in spec.tensors if t.role == "attn_qkv"}
    with checkpoint:
        first = kept_losses(checkpoint, spec, some_ids(spec), asked, "rtn", True)
        assert first == predict_losses(checkpoint, spec, some_ids(spec), asked)  # and the same each time
        with monkeypatch.context() as patched:
            patched.delattr(sensitivity, "predict_losses")
            assert kept_losses(checkpoint, spec, some_ids(spec), asked, "rtn", True) == first
        other = kept_losses(checkpoint, spec, some_ids(spec, seed=6), asked, "rtn", True)
    assert other != first
    assert set(other) == set(first)
