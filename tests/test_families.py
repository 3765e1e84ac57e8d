"""config.json to ModelSpec: what is read, and what is refused."""

import contextlib

import pytest
from _models import GROUPED, MHA, TIED, phi3_config

from phi3edge.errors import CheckpointError, Phi3EdgeError, UnsupportedError
from phi3edge.families import parse_config
from phi3edge.types import Part

MINI_4K = {
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 32000,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.2",
    "use_cache": True,
    "attention_bias": False,
    "vocab_size": 32064,
}


def test_mini_4k_is_read_whole():
    spec = parse_config(MINI_4K, {"eos_token_id": [32000, 32001, 32007]}, "Phi-3-mini-4k-instruct")
    assert spec.parameters == 3_821_079_552
    assert (spec.layers, spec.heads, spec.kv_heads, spec.head_dim) == (32, 32, 32, 96)
    assert (spec.rope.theta, spec.rope.dim, spec.sliding_window) == (10000.0, 96, 2047)
    assert spec.eos_token_ids == (32000, 32001, 32007)
    assert spec.dtype == "bfloat16"


def test_fused_rows_are_named_under_grouped_heads():
    spec = parse_config(phi3_config(GROUPED), None, "tiny")
    qkv = next(t for t in spec.tensors if t.role == "attn_qkv")
    assert qkv.shape == (512, 256)
    assert qkv.parts == (Part("q", 0, 256), Part("k", 256, 384), Part("v", 384, 512))
    gate_up = next(t for t in spec.tensors if t.role == "ffn_gate_up")
    assert gate_up.parts == (Part("gate", 0, 512), Part("up", 512, 1024))


def test_a_tied_model_has_no_head():
    assert "head" not in {t.role for t in parse_config(phi3_config(TIED), None, "tiny").tensors}
    assert "head" in {t.role for t in parse_config(phi3_config(MHA), None, "tiny").tensors}


def test_transformers_5_style_rope_is_read():
    config = phi3_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    del config["rope_theta"], config["rope_scaling"]
    assert parse_config(config, None, "tiny").rope.theta == 5e5


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "default", "short_factor": [1.0]}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mscale": 1.2}},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"lm_head_bias": True},
        {"head_dim": 32},
        {"logit_scale": 8.0},
        {"quantization_config": {"quant_method": "awq"}},
        {"torch_dtype": "float8_e4m3fn"},
        {"architectures": ["LlamaForCausalLM"]},
        {"model_type": "phi4mm"},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"num_hidden_layers": 2**31 - 1},
    ],
    ids=lambda change: ",".join(change),
)
def test_what_would_change_the_function_is_refused_by_name(change):
    with pytest.raises(UnsupportedError) as error:
        parse_config(phi3_config(**change), None, "tiny")
    assert next(iter(change)).removeprefix("torch_") in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -256}, "positive"),
        ({"hidden_size": 256.0}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_attention_heads": 7}, "multiple"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"eos_token_id": 320}, "eos_token_id"),
        ({"eos_token_id": [0, -1]}, "eos_token_id"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"model_type": None}, "model_type"),
    ],
    ids=str,
)
def test_a_wrong_value_is_an_error_that_names_it(change, says):
    with pytest.raises(CheckpointError, match=says):
        parse_config(phi3_config(**change), None, "tiny")


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UnsupportedError) as error:
        parse_config(phi3_config(rope_thetta=1.0), None, "tiny")
    assert error.value.hint is not None
    assert "rope_theta" in error.value.hint


def test_every_end_of_generation_id_is_kept_in_order():
    spec = parse_config(phi3_config(eos_token_id=[3, 0]), {"eos_token_id": [0, 2]}, "tiny")
    assert spec.eos_token_ids == (3, 0, 2)


@pytest.mark.parametrize("key", phi3_config())
def test_whatever_a_key_holds_the_answer_is_a_spec_or_our_error(key):
    for value in (None, -1, "x", [], {}, 1e40):
        with contextlib.suppress(Phi3EdgeError):
            assert parse_config(phi3_config(**{key: value}), None, "tiny").parameters > 0
