"""Phi-3-small's config.json: what is read, and what is refused by name."""

import contextlib
import json
import math
from pathlib import Path

import pytest
from _small import CONTEXT, ORIGINAL, SMALL, Small, longrope, small_config, write_small

from phi3edge.build import prepare
from phi3edge.checkpoint import open_checkpoint
from phi3edge.errors import CheckpointError, Phi3EdgeError, UnsupportedError
from phi3edge.families import parse_config
from phi3edge.types import BlockSparse, Part

SMALL_8K = small_config(
    blocksparse_block_size=64,
    blocksparse_num_local_blocks=16,
    blocksparse_vert_stride=8,
    bos_token_id=100257,
    eos_token_id=100257,
    ff_intermediate_size=14336,
    gegelu_limit=20.0,
    hidden_size=4096,
    layer_norm_epsilon=1e-5,
    max_position_embeddings=8192,
    mup_attn_multiplier=1.0,
    mup_embedding_multiplier=10.0,
    mup_width_multiplier=8.0,
    num_attention_heads=32,
    num_hidden_layers=32,
    num_key_value_heads=8,
    rope_embedding_base=1000000,
    torch_dtype="bfloat16",
    vocab_size=100352,
)
del SMALL_8K["dummy_token_indices"]


def test_small_8k_is_read_whole() -> None:
    spec = parse_config(SMALL_8K, {"eos_token_id": [100257, 100266]}, "Phi-3-small-8k-instruct")
    assert spec.parameters == 7_392_272_384
    assert spec.tied
    assert (spec.layers, spec.heads, spec.kv_heads, spec.head_dim) == (32, 32, 8, 128)
    assert (spec.rope.theta, spec.rope.dim, spec.rope.by_length) == (1e6, 128, False)
    assert (spec.embedding_scale, spec.logit_scale, spec.attention_scale) == (10, 1 / 8, 1 / 128)
    assert (spec.activation, spec.activation_limit, spec.norm, spec.norm_eps) == ("gegelu", 20, "layer", 1e-5)
    assert spec.block_sparse == BlockSparse(block=64, local=16, stride=8, shift=1, dense_every=2)
    assert [spec.block_sparse.is_sparse(n) for n in range(4)] == [True, False, True, False]
    assert spec.block_sparse.patterns == 8
    assert len(spec.masked_ids) == 91
    assert not {100257, 100261, 100262, 100263, 100266} & set(spec.masked_ids)
    assert spec.eos_token_ids == (100257, 100266)


def test_128k_is_read_whole() -> None:
    changes = longrope(pairs=64) | {"max_position_embeddings": 131072, "original_max_position_embeddings": 8192}
    for key in ("short_mscale", "long_mscale"):
        del changes["rope_scaling"][key]
    spec = parse_config(SMALL_8K | changes, None, "Phi-3-small-128k-instruct")
    assert (spec.context_length, spec.original_context_length) == (131072, 8192)
    assert spec.rope.attention_factor == spec.rope.long_attention_factor == pytest.approx(1.1435437497937313)


def test_the_factors_on_both_sides_are_read() -> None:
    spec = parse_config(small_config(**longrope()), None, "tiny")
    assert (spec.rope.attention_factor, spec.rope.long_attention_factor) == (1.1, 1.3)
    inner = longrope(original_max_position_embeddings=128)
    del inner["original_max_position_embeddings"]
    assert parse_config(small_config(**inner), None, "tiny").original_context_length == 128


def test_the_checkpoints_tensors_are_the_specs(tmp_path: Path) -> None:
    for shape in (SMALL, Small(tied=False)):
        with open_checkpoint(write_small(tmp_path / str(shape.tied), shape)) as checkpoint:
            spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
            checkpoint.check(spec)
            assert {t.name for t in spec.tensors} == set(checkpoint.names)


def test_rows_of_the_interleaved_linear_are_named() -> None:
    spec = parse_config(small_config(), None, "tiny")
    qkv = next(t for t in spec.tensors if t.role == "attn_qkv")
    assert qkv.shape == (320, 192)
    assert qkv.parts[:3] == (Part("q0", 0, 96), Part("k0", 96, 128), Part("v0", 128, 160))
    assert qkv.parts[3:] == (Part("q1", 160, 256), Part("k1", 256, 288), Part("v1", 288, 320))


@pytest.mark.parametrize(("homogeneous", "stride", "shift"), [(True, 8, 0), (False, 8, 1), (False, 12, 2)])
def test_heads_shift_the_stripes(homogeneous: bool, stride: int, shift: int) -> None:
    config = small_config(blocksparse_homo_head_pattern=homogeneous, blocksparse_vert_stride=stride)
    sparse = parse_config(config, None, "tiny").block_sparse
    assert sparse is not None
    assert sparse.shift == shift
    assert sparse.patterns == (1 if homogeneous else stride // math.gcd(shift, stride))


def test_what_may_be_left_out() -> None:
    null = dict.fromkeys(("gegelu_limit", "mup_embedding_multiplier", "mup_width_multiplier"))
    spec = parse_config(small_config(**null, mup_use_scaling=False), None, "tiny")
    assert (spec.activation_limit, spec.embedding_scale, spec.logit_scale) == (None, 1, 1)
    assert spec.attention_scale is None


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"reorder_and_upcast_attn": True},
        {"rope_position_scale": 2.0},
        {"ff_dim_multiplier": 4},
        {"sliding_window": 2047},
        {"rope_scaling": {"type": "yarn"}},
        {"rope_scaling": longrope(extra=1)["rope_scaling"]},
        {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}},
        {"torch_dtype": "float8_e4m3fn"},
        {"architectures": ["Phi3SmallForSequenceClassification"]},
    ],
    ids=lambda change: ",".join(change),
)
def test_what_would_change_the_function_is_refused_by_name(change: dict) -> None:
    with pytest.raises(UnsupportedError) as error:
        parse_config(small_config(**change), None, "tiny")
    assert next(iter(change)).removeprefix("torch_") in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dummy_token_indices": None}, "dummy_token_indices is None.*vocab_size of 100352"),
        ({"dummy_token_indices": [320]}, "dummy_token_indices"),
        ({"dense_attention_every_n_layers": None}, "dense_attention_every_n_layers is missing"),
        ({"blocksparse_vert_stride": 0}, "blocksparse_vert_stride"),
        ({"ff_intermediate_size": None}, "ff_intermediate_size is missing"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4"),
        ({"gegelu_limit": -1}, "gegelu_limit"),
        ({"mup_use_scaling": 1}, "mup_use_scaling"),
        (longrope(short_factor=[1.0]), "short_factor.*16 numbers"),
        (longrope(long_mscale=0), "long_mscale"),
        (longrope(original_max_position_embeddings=4096), f"is {ORIGINAL}, but 4096"),
        ({"rope_scaling": [1]}, "expected an object"),
    ],
    ids=str,
)
def test_a_wrong_value_is_an_error_that_names_it(change: dict, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        parse_config(small_config(**change), None, "tiny")


@pytest.mark.parametrize("key", ["gegelu_limit", "mup_width_multiplier", "rope_embedding_base", "layer_norm_epsilon"])
def test_a_missing_key_is_not_guessed(key: str) -> None:
    config = small_config()
    del config[key]
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        parse_config(config, None, "tiny")


@pytest.mark.parametrize("key", small_config(**longrope()))
def test_whatever_a_key_holds_the_answer_is_a_spec_or_our_error(key: str) -> None:
    for value in (None, -1, "x", [], {}, 1, 1e40):
        with contextlib.suppress(Phi3EdgeError):
            assert parse_config(small_config(**longrope() | {key: value}), None, "tiny").parameters > 0


def test_what_no_artifact_can_hold_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small_config()))
    with pytest.raises(UnsupportedError, match=r"cannot be a GGUF file: llama\.cpp has no architecture.*block-sparse"):
        prepare(str(tmp_path), "cpu", format_="gguf")
    ready = prepare(str(tmp_path), "cpu", format_="onnx")
    assert ready.fit.context == CONTEXT
    assert {t.codec for t in ready.plan.tensors if t.tensor.role.endswith("bias")} == {"f32"}
