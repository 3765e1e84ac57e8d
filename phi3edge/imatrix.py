"""llama.cpp's importance matrix as a GGUF file: for each linear the sum of its squared inputs, and of how many tokens.

Tensors `<name>.in_sum2`, float32 (1, columns), and `<name>.counts`, float32 (1, 1), by the linears' names in a
model's GGUF file, with a row for each expert where one tensor holds a layer's experts; keys general.type = "imatrix",
imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size.
Source: llama.cpp, tools/imatrix/README.md and the loader that llama-quantize uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from phi3edge.errors import UsageError
from phi3edge.gguf_file import DEFAULT_ALIGNMENT, MAGIC, GGUFHeader, GGUFTensor, ValueType, read_header, write_header
from phi3edge.gguf_names import tensor_name
from phi3edge.types import ModelSpec, Statistics, TensorSpec, stays_float

F32 = 0
"""ggml's number of the type."""

SUMS, COUNTS = ".in_sum2", ".counts"
AGAIN = "make it from a GGUF file of this model: llama-imatrix -m MODEL.gguf -f TEXT -o imatrix.gguf"


@dataclass(frozen=True, slots=True)
class ImatrixFile:
    """A file's content.

    Attributes:
        datasets: names of the texts that it was made from, as its maker gave them.
        statistics: by the model's own tensor names; tokens and squares only.
    """

    datasets: tuple[str, ...]
    statistics: dict[str, Statistics]


def linears(spec: ModelSpec) -> list[TensorSpec]:
    """The tensors of a model that statistics are of: the linears of its blocks, then the head, be it the embedding."""
    head = "embedding" if spec.tied else "head"
    inner = [t for t in spec.tensors if t.layer is not None and len(t.shape) == 2 and not stays_float(t.role)]
    return inner + [t for t in spec.tensors if t.role == head]


def read_imatrix(path: Path, spec: ModelSpec) -> ImatrixFile:
    """Read the importance matrix of a model. It may lack the head: llama-imatrix leaves it out by default.

    Raises:
        UsageError: another kind of file, a matrix of another model, or one without all linears of the blocks.
        CheckpointError: a damaged GGUF file.
    """
    header = _header(path)
    by_name = {tensor.name: tensor for tensor in header.tensors}
    expected = _stacked(spec)
    for name in by_name:
        if name.removesuffix(SUMS).removesuffix(COUNTS) not in expected:
            raise UsageError(f"{path.name}: {name!r} is of no linear of {spec.name}", AGAIN)
    missing = [name for name, t in expected.items() if t[0].layer is not None and name + SUMS not in by_name]
    if missing:
        count = f"{len(missing)} of {len(expected)} linears of {spec.name}"
        raise UsageError(f"{path.name} lacks {missing[0]!r}: it has nothing of {count}", AGAIN)
    found = {}
    for name, stack in expected.items():
        if name + SUMS in by_name:
            counts = _read(path, by_name, name + COUNTS, len(stack))
            sums = _read(path, by_name, name + SUMS, len(stack) * stack[0].shape[1]).reshape(len(stack), -1)
            if counts.max() < 1:
                raise UsageError(f"{path.name}: {name!r} saw no token", "a longer text, or more chunks")
            for linear, count, squares in zip(stack, map(round, counts.tolist()), sums, strict=True):
                if count >= 1:  # an expert that saw no token has none
                    found[linear.name] = Statistics(count, squares / np.float32(count))
    datasets = header.metadata.get("imatrix.datasets", [])
    return ImatrixFile(tuple(datasets) if isinstance(datasets, list) else (), found)


def _stacked(spec: ModelSpec) -> dict[str, list[TensorSpec]]:
    """The linears by their names in a model's GGUF file: one each, or all experts of a role and layer."""
    found: dict[str, list[TensorSpec]] = {}
    for linear in linears(spec):
        found.setdefault(tensor_name(linear), []).append(linear)
    return found


def _header(path: Path) -> GGUFHeader:
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise UsageError(f"cannot read the importance matrix {path}: {error.strerror}") from None
    if magic != MAGIC:
        raise UsageError(
            f"{path.name} is not an importance matrix in GGUF, but starts with {magic!r}",
            f"the old .dat format is not read; {AGAIN}",
        )
    header = read_header(path)
    if (kind := header.metadata.get("general.type")) != "imatrix":
        raise UsageError(f"{path.name} is a GGUF file of type {kind!r}; expected 'imatrix'", AGAIN)
    return header


def _read(path: Path, tensors: Mapping[str, GGUFTensor], name: str, size: int) -> np.ndarray:
    """The `size` finite numbers, float32, that a tensor must have."""
    tensor = tensors.get(name)
    if tensor is None:
        raise UsageError(f"{path.name} lacks {name!r}", AGAIN)
    if tensor.ggml_type != F32 or tensor.nbytes != 4 * size:
        raise UsageError(f"{path.name}: {name!r} has shape {tensor.shape}; expected {size} numbers as float32", AGAIN)
    values = np.fromfile(path, "<f4", size, offset=tensor.offset)
    if not np.isfinite(values).all():
        raise UsageError(f"{path.name}: {name!r} holds NaN or infinity", AGAIN)
    return values


def write_imatrix(
    file: BinaryIO, spec: ModelSpec, statistics: Mapping[str, Statistics], dataset: str, chunks: int, chunk_tokens: int
) -> None:
    """Write the importance matrix of a model.

    Args:
        file: open for writing bytes.
        spec: the model.
        statistics: by tensor name; what there is of the model's linears is written.
        dataset: name of the text.
        chunks: sequences of it.
        chunk_tokens: tokens of each.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, stack in sorted(_stacked(spec).items()):
        sums, counts = np.zeros((len(stack), stack[0].shape[1]), "<f4"), np.zeros((len(stack), 1), "<f4")
        for row, linear in enumerate(stack):
            if found := statistics.get(linear.name):
                sums[row] = found.squares.astype(np.float64) * found.tokens
                counts[row] = found.tokens
        if counts.any():
            arrays |= {name + SUMS: sums, name + COUNTS: counts}
    metadata = {
        "general.type": (ValueType.STRING, "imatrix"),
        "imatrix.datasets": (ValueType.STRING, [dataset]),
        "imatrix.chunk_count": (ValueType.UINT32, chunks),
        "imatrix.chunk_size": (ValueType.UINT32, chunk_tokens),
    }
    write_header(file, metadata, [(name, F32, a.shape, a.nbytes) for name, a in arrays.items()])
    for array in arrays.values():
        file.write(array.tobytes().ljust(-(-array.nbytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT, b"\0"))
