"""Targets: what a device can hold and what must be true of a model on it, as data (targets/*.toml)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from phi3edge import _toml
from phi3edge._toml import Size, Strict
from phi3edge.codecs import codec_names
from phi3edge.gates import Gates, known_gates
from phi3edge.registry import did_you_mean

Format = Literal["gguf", "onnx"]

Provider = Literal["cpu", "cuda", "dml", "webgpu"]
"""ONNX Runtime's execution providers that a graph can be made for."""

KV_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32, "int8": 1.0}
"""Bytes that one number of the KV cache takes, scales included; int8's are a few a channel for the whole cache."""

KV_TYPES = {"gguf": ("f32", "f16", "q8_0", "q4_0"), "onnx": ("f32", "f16", "int8")}
"""Types that a KV cache can have, by format."""


def _known_codecs(value: tuple[str, ...]) -> tuple[str, ...]:
    """For a validator: refuses a codec that does not exist."""
    for name in value:
        if name not in codec_names():
            raise ValueError(f"unknown codec {name!r}; {did_you_mean(name, codec_names())}")
    return value


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


class Runtime(Strict):
    """What runs artifacts of one format on the target, and how.

    Attributes:
        name: for people.
        recipe: the default recipe.
        kv_cache: type of the KV cache.
        context: default number of tokens that the KV cache must hold, where this runtime's differs from the target's.
        max_context: tokens beyond which the runtime is known to fail; None where no such limit is known.
        provider: ONNX Runtime's execution provider, for format onnx.
        codecs: codecs that it has kernels for, or empty for all of the format.
        runs_here: whether the runtime that validates here is the one that runs there, be it on another CPU.
        notes: what an engineer should know before shipping there.
    """

    name: str
    recipe: str
    kv_cache: Literal["f32", "f16", "q8_0", "q4_0", "int8"]
    context: int | None = Field(default=None, gt=0)
    max_context: int | None = Field(default=None, gt=0)
    provider: Provider = "cpu"
    codecs: tuple[str, ...] = ()
    runs_here: bool = True
    notes: tuple[str, ...] = ()

    _codecs = field_validator("codecs")(_known_codecs)


class Target(Strict):
    """A target file.

    Attributes:
        formats: what runs the artifact there by its format, the preferred one first.
        without: why a format is not offered, for those worth a word.
        context: default number of tokens that the KV cache must hold.
        notes: what an engineer should know before shipping there, whatever the format.
        gates: what an artifact for it is held to; see phi3edge.gates.
    """

    summary: str
    formats: dict[Format, Runtime] = Field(min_length=1)
    without: dict[Format, str] = {}
    context: int = Field(gt=0)
    memory: Memory
    bandwidth: Bandwidth
    files: Files | None = None
    notes: tuple[str, ...] = ()
    gates: Gates = {}

    _gates = field_validator("gates")(known_gates)

    @field_validator("formats")
    @classmethod
    def _kv_caches(cls, value: dict[Format, Runtime]) -> dict[Format, Runtime]:
        for name, runtime in value.items():
            if runtime.kv_cache not in KV_TYPES[name]:
                raise ValueError(f"kv_cache of {name} is one of {', '.join(KV_TYPES[name])}")
            if name != "onnx" and "provider" in runtime.model_fields_set:
                raise ValueError(f"provider is for onnx, not {name}")
        return value


def load_target(name: str) -> tuple[str, Target]:
    """A shipped target by name, or a user's own by the path of its .toml file.

    Raises:
        ConfigError: unknown name, or a file that is not a target.
    """
    return _toml.load("targets", name, Target)


def shipped_targets() -> dict[str, Target]:
    """All targets that come with phi3edge, by name."""
    return {name: load_target(name)[1] for name in _toml.shipped("targets")}
