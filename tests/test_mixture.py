"""Our float reference of Phi-3.5-MoE against transformers, and where transformers is not the model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from _moe import CONTEXT, EXPERTS, MSCALE, ORIGINAL, phimoe_config, phimoe_tensors, write_phimoe

from phi3edge.mixture import Mixture, load_mixture, sparse_mixer
from phi3edge.reference import _greedy, _transformers, load_model
from phi3edge.types import Experts

LENGTHS = (40, ORIGINAL - 1, ORIGINAL)


def ids(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 320, count))[None]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_phimoe(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def theirs(model: Path):
    return _transformers().PhimoeForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(model: Path) -> Mixture:
    found = load_model(model)
    assert isinstance(found, Mixture)
    return found


def test_up_to_the_original_context_it_is_transformers(ours: Mixture, theirs):
    with torch.inference_mode():
        for length in LENGTHS:
            expected = theirs(ids(length)).logits
            torch.testing.assert_close(ours(ids(length)).logits, expected, atol=2e-4, rtol=0)
            assert expected.std() > 0.5


def test_beyond_it_transformers_still_rotates_by_the_short_factors(ours: Mixture, theirs, tmp_path: Path):
    scaling = phimoe_config()["rope_scaling"]
    only_short = write_phimoe(tmp_path / "short", rope_scaling=scaling | {"long_factor": scaling["short_factor"]})
    tokens = ids(ORIGINAL + 100)
    with torch.inference_mode():
        expected = theirs(tokens).logits
        torch.testing.assert_close(load_mixture(only_short)(tokens).logits, expected, atol=2e-4, rtol=0)
        assert (ours(tokens).logits - expected).abs().mean() > 0.05


def test_beyond_it_every_position_is_rotated_by_the_long_factors(ours: Mixture, model: Path, tmp_path: Path):
    """As if the long factors were the short ones of a model with a longer original context."""
    scaling = phimoe_config()["rope_scaling"]
    changes = {"short_factor": scaling["long_factor"], "original_max_position_embeddings": CONTEXT}
    long = write_phimoe(tmp_path / "long", rope_scaling=scaling | changes, original_max_position_embeddings=CONTEXT)
    theirs = _transformers().PhimoeForCausalLM.from_pretrained(long, dtype=torch.float32).eval()
    for length in (ORIGINAL + 1, ORIGINAL + 100):
        with torch.inference_mode():
            torch.testing.assert_close(ours(ids(length)).logits, theirs(ids(length)).logits, atol=2e-4, rtol=0)


def test_sparse_mixer_is_transformers_on_ties_and_signs():
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, EXPERTS, generator=generator)
    scores[1000:2000] = -scores[1000:2000].abs()
    scores[2000:] = scores[2000:, :1] * (1 + 0.03 * torch.rand(2000, EXPERTS, generator=generator))
    scores[:10] = 0
    weights, chosen = sparse_mixer(scores, Experts(EXPERTS, 2, 0.01))
    expected, experts = sparsemixer(scores, 0.01, training=False)
    torch.testing.assert_close(weights, expected)
    assert (chosen == experts).all()
    shared = (weights < 1).any(-1)
    assert shared[2000:].float().mean() > 0.9
    assert 0.01 < shared[10:1000].float().mean() < 0.4


def test_every_value_of_the_configuration_counts(ours: Mixture, tmp_path: Path):
    scaling = phimoe_config()["rope_scaling"]
    tokens = ids(64)
    changes = {
        "rope_theta": 1e6,
        "rms_norm_eps": 1.0,
        "router_jitter_noise": 0.2,
        "rope_scaling": scaling | {"short_mscale": MSCALE / 2, "long_mscale": MSCALE / 2},
        "sliding_window": 8,
    }
    with torch.inference_mode():
        expected = ours(tokens).logits
        for number, (key, value) in enumerate(changes.items()):
            other = load_mixture(write_phimoe(tmp_path / str(number), **{key: value}))
            assert (other(tokens).logits - expected).abs().mean() > 0.01, key


def test_every_tensor_counts(ours: Mixture):
    """No bias is forgotten, nor any expert."""
    tokens = ids(200)
    with torch.inference_mode():
        expected = ours(tokens).logits
        for tensor in ours.spec.tensors:
            kept = ours._kept.get(tensor.name)
            assert kept is not None, tensor.name
            ours._kept[tensor.name] = torch.zeros_like(kept)
            changed = (ours(tokens).logits - expected).abs().max()
            ours._kept[tensor.name] = kept
            assert changed > 1e-3, tensor.name


def test_parts_of_the_logits_and_a_past(ours: Mixture):
    tokens = ids(30)
    with torch.inference_mode():
        whole = ours(tokens).logits
        torch.testing.assert_close(ours(tokens, logits_to_keep=3).logits, whole[:, -3:])
        torch.testing.assert_close(ours(tokens, logits_to_keep=torch.tensor([4, 20])).logits, whole[:, [4, 20]])
        begun = ours(tokens[:, :25], use_cache=True).past_key_values
        torch.testing.assert_close(ours(tokens[:, 25:], past_key_values=begun).logits, whole[:, 25:])
        begun.crop(-5)
        torch.testing.assert_close(ours(tokens[:, 20:], past_key_values=begun).logits, whole[:, 20:])


def test_greedy_is_the_most_likely_token_of_the_whole_sequence_across_the_original_context(ours: Mixture):
    prompt = ids(ORIGINAL - 2)[0].tolist()
    with torch.inference_mode():
        [(found, ended)] = _greedy(ours, [prompt], 6, ())
        for n, token in enumerate(found):
            assert token == int(ours(torch.tensor([prompt + found[:n]])).logits[0, -1].argmax())
    assert (len(found), ended) == (6, False)


def test_weights_that_do_not_fit_are_read_as_they_are_used(model: Path, ours: Mixture, monkeypatch):
    from phi3edge import machine

    size = sum(4 * t.numel() for t in phimoe_tensors().values())
    monkeypatch.setattr(machine, "free_memory", lambda: size)
    streamed = load_mixture(model)
    with torch.inference_mode():
        torch.testing.assert_close(streamed(ids(20)).logits, ours(ids(20)).logits)
    assert not streamed._kept
