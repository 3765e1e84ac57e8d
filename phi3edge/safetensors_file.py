"""The header of a safetensors file, read strictly; and a writer of float32 tensors.

Layout (the format's own description): 8 bytes little endian with the header's length, the header as one JSON object,
then the data. Each entry is `name: {dtype, shape, data_offsets: [begin, end]}` with offsets from the start of the data;
`__metadata__` maps strings to strings. Entries cover the data exactly: no gap, no overlap, nothing left over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from phi3edge.errors import CheckpointError
from phi3edge.types import JSON

if TYPE_CHECKING:
    import numpy as np

MAX_HEADER_BYTES = 100_000_000
MAX_SIZE = 2**63
MAX_DIMENSIONS = 16
HINT = "the file is damaged, or its download is incomplete: get it again"
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Bytes of one element of each dtype that is a whole number of bytes."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies.

    Attributes:
        dtype: as the format names it: "BF16", "F16", "F32" ...
        offset: of its first byte, from the start of the file.
        nbytes: size of its data.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: BinaryIO, name: str) -> dict[str, TensorEntry]:
    """Read and check the header of an open safetensors file; tensor data is not touched.

    Args:
        file: opened for reading in binary, seekable.
        name: the file's name, for error messages.

    Returns:
        The tensors by name, in the order of their data.

    Raises:
        CheckpointError: the header is cut off, too long, not what the format says, or does not match the file's size.
    """
    file_size = file.seek(0, 2)
    file.seek(0)
    if file_size < 8:
        raise CheckpointError(f"{name}: {file_size} bytes; a safetensors file starts with 8 bytes", HINT)
    header_size = int.from_bytes(file.read(8), "little")
    if header_size > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{name}: not a safetensors file: header length {header_size}, at most {MAX_HEADER_BYTES}", HINT
        )
    data_start = 8 + header_size
    if data_start > file_size:
        raise CheckpointError(f"{name}: the header needs {data_start} bytes, the file has {file_size}", HINT)
    header = parse_object(file.read(header_size), f"{name}: header")
    _check_metadata(header.pop("__metadata__", {}), name)
    entries = {tensor: _entry(record, f"{name}: tensor {tensor!r}", data_start) for tensor, record in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_cover(entries, name, data_start, file_size)
    return entries


def parse_object(data: bytes, name: str) -> JSON:
    """Parse one JSON object, strictly: UTF-8, no duplicate keys, no NaN or Infinity.

    Args:
        data: the text's bytes.
        name: what is parsed, for error messages.

    Raises:
        CheckpointError: anything else than one such object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> JSON:
        result = dict(pairs)
        if len(result) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise ValueError(f"key {key!r} comes twice")
                seen.add(key)
        return result

    def constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise CheckpointError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{name} is not valid JSON: {error}", HINT) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} is not a JSON object but a {type(value).__name__}")
    return value


def _check_metadata(metadata: Any, name: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{name}: __metadata__ does not map strings to strings", HINT)


def _entry(record: Any, where: str, data_start: int) -> TensorEntry:
    """One checked record; its size must be what dtype and shape say."""
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets", HINT)
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where}: unknown dtype {str(dtype)[:40]!r}", f"known: {', '.join(DTYPE_BYTES)}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS or prod(shape) >= MAX_SIZE:
        raise CheckpointError(f"{where}: shape {str(shape)[:60]} is not a list of sizes", HINT)
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {str(offsets)[:60]} are not [begin, end]", HINT)
    nbytes = offsets[1] - offsets[0]
    expected = prod(shape) * DTYPE_BYTES[dtype]
    if nbytes != expected:
        raise CheckpointError(f"{where}: {dtype} of shape {shape} is {expected} bytes, the header says {nbytes}", HINT)
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], nbytes)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < MAX_SIZE for n in value)


def _check_cover(entries: dict[str, TensorEntry], name: str, data_start: int, file_size: int) -> None:
    """Entries sorted by offset must tile the data from its first byte to the file's last."""
    position = data_start
    for tensor, entry in entries.items():
        if entry.offset != position:
            fault = "overlaps the tensor before it" if entry.offset < position else "leaves a gap before it"
            raise CheckpointError(
                f"{name}: tensor {tensor!r} {fault}: begins at byte {entry.offset}, expected {position}", HINT
            )
        position += entry.nbytes
    if position != file_size:
        raise CheckpointError(f"{name}: tensors end at byte {position}, the file has {file_size}", HINT)


def write(file: BinaryIO, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a whole safetensors file of float32 tensors; their data starts at a multiple of 8 bytes."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.astype("<f4", order="C", copy=False).data)
