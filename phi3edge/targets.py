"""Targets: what a device can hold and what must be true of a model on it, as data (targets/*.toml)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from phi3edge import _toml
from phi3edge._toml import Strict
from phi3edge.errors import UsageError
from phi3edge.registry import did_you_mean, names
from phi3edge.units import parse_size

Format = Literal["gguf", "onnx"]

KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
"""Bytes that one number of the KV cache takes, scales included."""


def _size(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except UsageError as error:
        raise ValueError(f"{error.message}; {error.hint}") from None


def _known_codecs(value: tuple[str, ...]) -> tuple[str, ...]:
    """For a validator: refuses a codec that does not exist."""
    for name in value:
        if name not in names("codecs"):
            raise ValueError(f"unknown codec {name!r}; {did_you_mean(name, names('codecs'))}")
    return value


Size = Annotated[int, BeforeValidator(_size), Field(gt=0)]


class Memory(Strict):
    """Memory of the device, in bytes.

    Attributes:
        device: RAM of the device.
        app: what the app's process may use, all told.
        source: where `app` comes from, and how sure it is.
    """

    device: Size
    app: Size
    source: str


class Bandwidth(Strict):
    """Memory bandwidth in 10^9 bytes a second, and where the figure comes from."""

    gb_per_s: float = Field(gt=0)
    source: str


class Files(Strict):
    """Limits on the files of an artifact.

    Attributes:
        max_bytes: largest file that the way of delivery takes; larger artifacts are split.
        source: who says so.
    """

    max_bytes: Size
    source: str


class Target(Strict):
    """A target file.

    Attributes:
        runtime: what runs the artifact there, for people.
        formats: artifact formats that the runtime takes, the preferred one first.
        codecs: codecs that the runtime has kernels for, or empty for all of the format.
        recipes: default recipe by format.
        context: default number of tokens that the KV cache must hold.
        kv_cache: type of the KV cache.
        notes: what an engineer should know before shipping there.
        gates: metric to limit; see phi3edge.validate for the metrics.
    """

    summary: str
    runtime: str
    formats: tuple[Format, ...] = Field(min_length=1)
    codecs: tuple[str, ...] = ()
    recipes: dict[Format, str] = {}
    context: int = Field(gt=0)
    kv_cache: Literal["f32", "f16", "q8_0", "q4_0"]
    memory: Memory
    bandwidth: Bandwidth
    files: Files | None = None
    notes: tuple[str, ...] = ()
    gates: dict[str, float] = {}

    _codecs = field_validator("codecs")(_known_codecs)


def load_target(name: str) -> tuple[str, Target]:
    """A shipped target by name, or a user's own by the path of its .toml file.

    Raises:
        ConfigError: unknown name, or a file that is not a target.
    """
    return _toml.load("targets", name, Target)


def shipped_targets() -> dict[str, Target]:
    """All targets that come with phi3edge, by name."""
    return {name: load_target(name)[1] for name in _toml.shipped("targets")}
