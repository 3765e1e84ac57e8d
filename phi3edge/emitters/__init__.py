"""Formats an artifact is written in: one file each, with a class `Emitter`. Emitters pack and write, and never round.

An emitter is made from a `Job` before any weight is read: whatever the format or its runtime cannot hold is refused
then, and its notes are known. `emit` then takes the packed rows in the plan's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from phi3edge.recipes import Recipe
from phi3edge.registry import load
from phi3edge.targets import Format, Runtime
from phi3edge.types import KVScales, QuantPlan, TensorPlan

if TYPE_CHECKING:
    from phi3edge.checkpoint import Checkpoint

FILES = {"gguf": "gguf", "onnx": "ort_genai"}
"""The emitter's file by the format it writes."""

Stream = Iterable[tuple[TensorPlan, Iterable[Any]]]
"""Each tensor of a plan, in the plan's order, with its packed rows: C-contiguous uint8 arrays (rows, row bytes)."""


@dataclass(frozen=True, slots=True)
class Job:
    """What an artifact is made from.

    Attributes:
        checkpoint: the opened checkpoint: its folder, config.json and generation_config.json.
        runtime: what the target runs this format with.
        context: tokens that the KV cache must hold on the target.
        name: of the artifact's main file, without suffix, where the format leaves that open.
        split_max_size: largest file in bytes, or None.
        kv_scales: calibrated scales of the KV cache, where its type is int8.
    """

    plan: QuantPlan
    recipe: Recipe
    checkpoint: Checkpoint
    runtime: Runtime
    context: int
    name: str
    split_max_size: int | None = None
    kv_scales: KVScales | None = None


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A finished file, its size in bytes and the SHA-256 of its content, in hexadecimal."""

    path: Path
    bytes: int
    sha256: str


class Emitter(Protocol):
    """Writes one artifact.

    Attributes:
        notes: one line for everything that the format or its runtime cannot do for this model.
        requires: least version by the runtime's name, for the manifest; empty where none is known.
    """

    notes: list[str]
    requires: dict[str, str]

    @property
    def total_bytes(self) -> int:
        """What all files will take, at most."""
        ...

    def emit(self, stream: Stream, folder: Path, on_bytes: Callable[[int], None] | None = None) -> list[WrittenFile]:
        """Write the artifact's files into an existing folder.

        Args:
            stream: the packed weights.
            folder: where the files go.
            on_bytes: called with the number of bytes of each buffer once it is written.

        Returns:
            The files, the one that a runtime opens first.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
            UsageError: a tensor that is larger than the job's `split_max_size`.
        """
        ...


def open_emitter(format_: Format, job: Job) -> Emitter:
    """The emitter of a format, ready to write.

    Raises:
        UnsupportedError: something of the model or the plan that the format or its runtime cannot hold.
        MissingExtraError: a package that the emitter needs is not installed.
    """
    return load("emitters", FILES[format_]).Emitter(job)
