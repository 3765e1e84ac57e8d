"""Reading the fields of a config.json: what every family checks alike, each error naming the field and what came."""

import math
from typing import Any

from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.registry import did_you_mean
from phi3edge.types import JSON

DTYPES = ("bfloat16", "float16", "float32")
LONGROPE = ("longrope", "su")
"""Names of LongRoPE: the second is that of the first checkpoints."""

MOST_LAYERS = 1000  # a plan lists every tensor; the largest models have a tenth of it


def refuse_unknown(config: JSON, family: str, known: set[str], fixed: dict[str, tuple[Any, ...]]) -> None:
    """Raise UnsupportedError for a key that is neither known nor fixed, or a fixed one with another value than its."""
    for key, value in config.items():
        if key in fixed and value not in fixed[key]:
            raise UnsupportedError(
                f"config.json: {key} is {short(value)}; family {family} computes with {short(fixed[key][0])} only"
            )
        if key not in known and key not in fixed:
            raise UnsupportedError(
                f"config.json: unknown key {key!r} (value {short(value)}): it may change what the model computes",
                did_you_mean(key, sorted(known | set(fixed))),
            )


def head_shape(config: JSON) -> tuple[int, int, int, int]:
    """Hidden size, attention heads, KV heads and head size, which divide each other as they must."""
    hidden, heads = positive(config, "hidden_size"), positive(config, "num_attention_heads")
    if hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    kv_heads = positive(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    head_dim = hidden // heads
    if config.get("head_dim") not in (None, head_dim):
        raise UnsupportedError(
            f"config.json: head_dim is {config['head_dim']}; supported: hidden_size / num_attention_heads = {head_dim}"
        )
    return hidden, heads, kv_heads, head_dim


def layer_count(config: JSON) -> int:
    """Number of decoder blocks."""
    layers = positive(config, "num_hidden_layers")
    if layers > MOST_LAYERS:
        raise UnsupportedError(f"config.json: num_hidden_layers is {layers}; supported: at most {MOST_LAYERS}")
    return layers


def window(config: JSON) -> int | None:
    """Positions that attention looks back at, or None for all."""
    value = config.get("sliding_window")
    if value is not None and (not is_int(value) or value <= 0):
        raise CheckpointError(f"config.json: sliding_window is {value!r}; expected a positive integer or null")
    return value


def float_dtype(config: JSON) -> str:
    """The dtype of the weights."""
    dtype = config.get("torch_dtype") or config.get("dtype") or "float32"
    if dtype not in DTYPES:
        raise UnsupportedError(f"config.json: dtype is {dtype!r}; supported: {', '.join(DTYPES)}")
    return dtype


def rope_parameters(config: JSON) -> tuple[JSON, str]:
    """The rotary embedding's parameters, from rope_scaling (Microsoft's) over rope_parameters (transformers 5's).

    Returns:
        Them, and the name of the place that errors should speak of.
    """
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    for key, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(f"config.json: {key} is {short(value)}; expected an object")
    return {**(parameters or {}), **(scaling or {})}, "rope_scaling" if scaling else "rope_parameters"


def attention_factor(context: int, original: int) -> float:
    """What LongRoPE scales cosine and sine by: sqrt(1 + ln(context / original) / ln(original)), 1 if not longer.

    Source: Microsoft's modeling_phi3.py, Phi3LongRoPEScaledRotaryEmbedding.
    """
    return math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original else 1.0


def factors(parameters: JSON, key: str, dim: int) -> tuple[float, ...]:
    """LongRoPE's factors of `dim` rotated channels: dim / 2 positive numbers."""
    values = parameters.get(key)
    if not isinstance(values, list) or len(values) != dim // 2:
        raise CheckpointError(f"config.json: {key} is {short(values)}; expected a list of {dim // 2} numbers")
    return tuple(number({key: value}, key, math.nan) for value in values)


def eos_ids(config_ids: Any, generation_ids: Any, vocab: int) -> tuple[int, ...]:
    """All ids that end a generation, from an id or a list in each of the two files, first seen first."""
    ids: list[int] = []
    for key, value in (
        ("config.json: eos_token_id", config_ids),
        ("generation_config.json: eos_token_id", generation_ids),
    ):
        for one in value if isinstance(value, list) else [value]:
            token = token_id(key, one, vocab)
            if token is not None and token not in ids:
                ids.append(token)
    return tuple(ids)


def token_id(key: str, value: Any, vocab: int) -> int | None:
    """A token id, or None where there is none."""
    if value is None:
        return None
    if not is_int(value) or not 0 <= value < vocab:
        raise CheckpointError(f"{key} is {short(value)}; expected an id from 0 to {vocab - 1}")
    return value


def positive(config: JSON, key: str, default: int | None = None) -> int:
    """An integer above 0; `default` where the key is missing, which is an error without one."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json: {key} is missing")
    if not is_int(value) or not 0 < value < 2**31:
        raise CheckpointError(f"config.json: {key} is {short(value)}; expected a positive integer below 2^31")
    return value


def number(config: JSON, key: str, default: float) -> float:
    """A positive number; `default` where the key is missing."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise CheckpointError(f"config.json: {key} is {short(value)}; expected a positive number")
    return float(value)


def boolean(config: JSON, key: str, default: bool) -> bool:
    """True or false; `default` where the key is missing."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {value!r}; expected true or false")
    return value


def is_int(value: Any) -> bool:
    """Whether a value is an integer: true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def short(value: Any) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
