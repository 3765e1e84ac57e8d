"""What a config.json means: one file per model family, found by config.json's model_type."""

from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.prequantized import mark
from phi3edge.registry import load, names
from phi3edge.types import JSON, ModelSpec


def parse_config(config: JSON, generation_config: JSON | None, name: str) -> ModelSpec:
    """The ModelSpec of a checkpoint.

    Raises:
        UnsupportedError: no family file for this model_type, or linears stored in a way that is not read.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError("config.json: model_type is missing; expected a string such as 'phi3'")
    if kind not in names("families"):
        raise UnsupportedError(
            f"config.json: model_type {kind!r} is not supported", f"supported: {', '.join(names('families'))}"
        )
    return mark(load("families", kind).parse(config, generation_config, name), config)
