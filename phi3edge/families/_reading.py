"""Reads values of a config.json strictly; what every family needs."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.registry import did_you_mean
from phi3edge.types import JSON

DTYPES = ("bfloat16", "float16", "float32")
MOST_LAYERS = 1000  # a plan lists every tensor; the largest models have a tenth of it


def refuse_unknown(
    config: JSON, family: str, used: Collection[str], no_effect: Collection[str], fixed: Mapping[str, tuple[Any, ...]]
) -> None:
    """Raise UnsupportedError for a key that is not known, or a fixed key with another value than we compute with.

    Args:
        config: config.json.
        family: for the message.
        used: keys that the family reads.
        no_effect: keys that change nothing, or that are read elsewhere.
        fixed: keys that change the function, with the values that phi3edge computes with.
    """
    known = {*used, *no_effect, *fixed}
    for key, value in config.items():
        if key in fixed and value not in fixed[key]:
            raise UnsupportedError(
                f"config.json: {key} is {short(value)}; family {family} computes with {short(fixed[key][0])} only"
            )
        if key not in known:
            raise UnsupportedError(
                f"config.json: unknown key {key!r} (value {short(value)}): it may change what the model computes",
                did_you_mean(key, sorted(known)),
            )


def dtype_of(config: JSON) -> str:
    """Dtype of the weights in the checkpoint."""
    dtype = config.get("torch_dtype") or config.get("dtype") or "float32"
    if dtype not in DTYPES:
        raise UnsupportedError(f"config.json: dtype is {dtype!r}; supported: {', '.join(DTYPES)}")
    return str(dtype)


def layer_count(config: JSON) -> int:
    """num_hidden_layers, of which a plan lists every tensor."""
    layers = positive(config, "num_hidden_layers")
    if layers > MOST_LAYERS:
        raise UnsupportedError(f"config.json: num_hidden_layers is {layers}; supported: at most {MOST_LAYERS}")
    return layers


def factors(parameters: JSON, key: str, dim: int) -> tuple[float, ...]:
    """LongRoPE's factors, one for each pair of `dim` channels."""
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
    """An id of the vocabulary, or None."""
    if value is None:
        return None
    if not is_int(value) or not 0 <= value < vocab:
        raise CheckpointError(f"{key} is {short(value)}; expected an id from 0 to {vocab - 1}")
    return int(value)


def positive(config: JSON, key: str, default: int | None = None) -> int:
    """A positive integer; `default` where the key is missing or null."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json: {key} is missing")
    if not is_int(value) or not 0 < value < 2**31:
        raise CheckpointError(f"config.json: {key} is {short(value)}; expected a positive integer below 2^31")
    return int(value)


def number(config: JSON, key: str, default: float) -> float:
    """A positive number; `default` where the key is missing or null."""
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
    """Whether it is an integer, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def short(value: Any) -> str:
    """A value, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
