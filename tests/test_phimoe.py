"""Phi-3.5-MoE: read strictly, and computed as Microsoft's code computes it."""

import contextlib
import json
from pathlib import Path

import pytest
from _moe import CONTEXT, EXPERTS, HIDDEN, INTERMEDIATE, MSCALE, ORIGINAL, PAIRS, phimoe_config, write_phimoe

from phi3edge.checkpoint import open_checkpoint
from phi3edge.errors import CheckpointError, Phi3EdgeError, UnsupportedError
from phi3edge.families import parse_config
from phi3edge.types import Experts

MOE_3_5 = phimoe_config(
    "bfloat16",
    eos_token_id=32000,
    hidden_size=4096,
    intermediate_size=6400,
    max_position_embeddings=131072,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    num_local_experts=16,
    original_max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=131072,
    vocab_size=32064,
    rope_scaling={
        "long_factor": [2.0] * 64,
        "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096,
        "short_factor": [1.0] * 64,
        "short_mscale": 1.243163121016122,
        "type": "longrope",
    },
)


def scaling(**changes) -> dict:
    return {"rope_scaling": phimoe_config()["rope_scaling"] | changes}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_phimoe(tmp_path_factory.mktemp("model") / "tiny")


def test_the_original_configuration_is_read_whole():
    spec = parse_config(MOE_3_5, {"eos_token_id": [32000, 32001, 32007]}, "Phi-3.5-MoE-instruct")
    assert spec.parameters == 41_873_153_344
    assert spec.experts == Experts(count=16, used=2, jitter=0.01)
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.norm, spec.norm_eps) == (32, 8, 128, "layer", 1e-5)
    assert (spec.context_length, spec.original_context_length, spec.rope.dim) == (131072, 4096, 128)
    assert spec.rope.attention_factor == 1.243163121016122
    assert spec.eos_token_ids == (32000, 32001, 32007)


def test_every_tensor_has_its_role_and_expert(model: Path):
    with open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        checkpoint.check(spec)
        assert len(spec.tensors) == len(checkpoint.names)
    assert spec.rope.attention_factor == MSCALE
    down = [t for t in spec.tensors if (t.role, t.layer) == ("ffn_down", 1)]
    assert [t.expert for t in down] == list(range(EXPERTS))
    assert {t.shape for t in down} == {(HIDDEN, INTERMEDIATE)}
    assert {t.role for t in spec.tensors if t.expert is not None} == {"ffn_gate", "ffn_up", "ffn_down"}


def test_transformers_5_writes_it_again_and_the_same_is_read(model: Path, tmp_path: Path):
    from phi3edge.reference import _transformers

    transformers = _transformers()
    transformers.PhimoeForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "again")
    with open_checkpoint(model) as first, open_checkpoint(tmp_path / "again") as second:
        one, other = (parse_config(c.config, first.generation_config, "tiny") for c in (first, second))
        assert second.config["architectures"] == ["PhimoeForCausalLM"]
        assert one == other
        second.check(other)
        name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
        assert (first.read(name) == second.read(name)).all()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"attention_bias": False}, UnsupportedError, "attention_bias is False"),
        ({"lm_head_bias": False}, UnsupportedError, "lm_head_bias is False"),
        ({"num_experts_per_tok": 4}, UnsupportedError, "num_experts_per_tok is 4"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act"),
        ({"tie_word_embeddings": True}, UnsupportedError, "tie_word_embeddings"),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedError, "quantization_config"),
        ({"architectures": ["Phi3ForCausalLM"]}, UnsupportedError, "architectures is"),
        ({"shared_experts": 1}, UnsupportedError, "unknown key 'shared_experts'"),
        ({"num_local_experts": 1}, UnsupportedError, "num_local_experts is 1"),
        ({"router_jitter_noise": -1}, CheckpointError, "router_jitter_noise"),
        ({"original_max_position_embeddings": 512}, CheckpointError, "original_max_position_embeddings is .256, 512"),
        ({"rope_scaling": None}, UnsupportedError, "type None.*computes longrope"),
        (scaling(type="yarn"), UnsupportedError, "type 'yarn'"),
        (scaling(long_mscale=1.0), UnsupportedError, "equal ones only"),
        (scaling(short_mscale=None), CheckpointError, "short_mscale or long_mscale is missing"),
        (scaling(short_factor=[1.0]), CheckpointError, f"short_factor.*list of {PAIRS} numbers"),
        (scaling(extra=1), UnsupportedError, "unknown key 'extra' in rope_scaling"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes: dict, error: type, match: str):
    with pytest.raises(error, match=match):
        parse_config(phimoe_config(**changes), None, "x")


@pytest.mark.parametrize("key", ["attention_bias", "lm_head_bias", "rope_theta"])
def test_a_missing_key_is_named(key: str):
    config = phimoe_config()
    del config[key]
    with pytest.raises(Phi3EdgeError, match=f"{key} is missing"):
        parse_config(config, None, "x")


@pytest.mark.parametrize("key", phimoe_config())
def test_whatever_a_key_holds_the_answer_is_a_spec_or_our_error(key: str):
    for value in (None, -1, "x", [], {}, 1e40):
        with contextlib.suppress(Phi3EdgeError):
            assert parse_config(phimoe_config(**{key: value}), None, "tiny").parameters > 0


def test_lengths_are_those_of_the_configuration(model: Path):
    config = json.loads((model / "config.json").read_text())
    assert (config["original_max_position_embeddings"], config["max_position_embeddings"]) == (ORIGINAL, CONTEXT)


def test_what_other_families_are_calibrated_with_refuses_this_one():
    from phi3edge.forward import Decoder

    with pytest.raises(UnsupportedError, match="not computed for family phimoe"):
        Decoder(parse_config(phimoe_config(), None, "tiny"))
