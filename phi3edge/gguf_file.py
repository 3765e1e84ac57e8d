"""The GGUF container: a strict reader and a writer of everything before the tensor data.

Layout (ggml's docs/gguf.md, version 3, little endian): magic, version, number of tensors, number of metadata pairs,
the pairs, one record per tensor, padding, tensor data. Version 2 is the same in little endian. The reader believes
nothing: every count, length and offset is checked against the size of the file before it is used.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from phi3edge import registry
from phi3edge.errors import CheckpointError

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
HINT = "the file is damaged, or its download is incomplete: get it again"


class ValueType(IntEnum):
    """Type of a metadata value, or of the elements of an array, as the file numbers it."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


ARRAY = 9  # not a ValueType: an array is a list of values of one ValueType
SCALAR_FORMATS = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
SMALLEST_PAIR = 8 + 4 + 1  # empty key, type, one byte
SMALLEST_RECORD = 8 + 4 + 4 + 8  # empty name, number of dimensions, type, offset


@dataclass(frozen=True, slots=True)
class GGMLType:
    """How a tensor type stores weights: `block_size` weights along a row in `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


# ggml's types that phi3edge has no codec for, by number; a codec's file describes its own.
OTHER_TYPES = {
    9: GGMLType("q8_1", 32, 40),
    15: GGMLType("q8_k", 256, 292),
    16: GGMLType("iq2_xxs", 256, 66),
    17: GGMLType("iq2_xs", 256, 74),
    18: GGMLType("iq3_xxs", 256, 98),
    19: GGMLType("iq1_s", 256, 50),
    21: GGMLType("iq3_s", 256, 110),
    22: GGMLType("iq2_s", 256, 82),
    24: GGMLType("i8", 1, 1),
    25: GGMLType("i16", 1, 2),
    26: GGMLType("i32", 1, 4),
    27: GGMLType("i64", 1, 8),
    28: GGMLType("f64", 1, 8),
    29: GGMLType("iq1_m", 256, 56),
    34: GGMLType("tq1_0", 256, 54),
    35: GGMLType("tq2_0", 256, 66),
    39: GGMLType("mxfp4", 32, 17),
    40: GGMLType("nvfp4", 64, 36),
    41: GGMLType("q1_0", 128, 18),
}


@cache
def ggml_types() -> dict[int, GGMLType]:
    """Every known tensor type by its number in the file."""
    codecs = [registry.load("codecs", name) for name in registry.names("codecs")]
    ours = {c.GGML_TYPE: GGMLType(c.NAME, c.BLOCK_SIZE, c.BLOCK_BYTES) for c in codecs if "gguf" in c.FORMATS}
    return OTHER_TYPES | ours


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor's record.

    Attributes:
        ggml_type: number of its type, a key of `ggml_types()`.
        shape: (rows, columns) as numpy has it; the file stores the reverse.
        offset: of its data, in bytes from the start of the file.
        nbytes: size of its data.
    """

    name: str
    ggml_type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything before the tensor data.

    Attributes:
        metadata: values by key, in file order: int, float, bool, str, or a list of these.
        value_types: type of each value; of the elements where the value is a list.
        data_offset: where tensor data starts, in bytes from the start of the file.
        file_size: in bytes.
    """

    version: int
    alignment: int
    metadata: dict[str, Any] = field(repr=False)
    value_types: dict[str, ValueType] = field(repr=False)
    tensors: tuple[GGUFTensor, ...] = field(repr=False)
    data_offset: int
    file_size: int


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file; tensor data is not touched.

    Raises:
        CheckpointError: not a GGUF file that this code knows, or a damaged one.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < len(MAGIC) + 4 + 8 + 8:
                raise CheckpointError(f"{path.name}: expected a GGUF file, got {size} bytes", HINT)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path.name, data).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


class _Reader:
    """A position in the bytes of one file."""

    def __init__(self, name: str, data: mmap.mmap) -> None:
        self.name, self.data, self.size, self.at = name, data, len(data), 0

    def fail(self, problem: str, hint: str = HINT) -> NoReturn:
        raise CheckpointError(f"{self.name}: {problem}", hint)

    def header(self) -> GGUFHeader:
        magic = self.data[:4]
        if magic != MAGIC:
            self.fail(f"expected a GGUF file, which starts with {MAGIC!r}, got {magic!r}", "is it the right file?")
        self.at = len(MAGIC)
        version = self.scalar("I", "version")
        if version not in (2, 3):
            got = "a big-endian file" if version in (2 << 24, 3 << 24) else f"version {version}"
            self.fail(f"expected GGUF version 2 or 3 in little endian, got {got}", "convert the model again")
        tensor_count = self.count("tensors", SMALLEST_RECORD)
        pair_count = self.count("metadata pairs", SMALLEST_PAIR)

        metadata: dict[str, Any] = {}
        types: dict[str, ValueType] = {}
        for _ in range(pair_count):
            key = self.strings(1, "metadata key")[0]
            if key in metadata:
                self.fail(f"metadata key {key!r} occurs twice")
            types[key], metadata[key] = self.value(key)

        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        kind = types.get("general.alignment", ValueType.UINT32)
        if kind is not ValueType.UINT32 or isinstance(alignment, list) or alignment < 1 or alignment & (alignment - 1):
            self.fail(f"expected general.alignment to be a power of two (uint32), got {alignment!r}")

        records = [self.record() for _ in range(tensor_count)]
        data_offset = _align(self.at, alignment)
        tensors = tuple(self.tensor(data_offset, alignment, *record) for record in records)
        self.check(tensors)
        return GGUFHeader(version, alignment, metadata, types, tensors, data_offset, self.size)

    def need(self, nbytes: int, what: str) -> int:
        """Move past `nbytes` and return where they start."""
        start, self.at = self.at, self.at + nbytes
        if self.at > self.size:
            self.fail(f"{what} needs {nbytes} bytes at {start}, but the file ends at {self.size}")
        return start

    def scalar(self, fmt: str, what: str) -> Any:
        return struct.unpack_from("<" + fmt, self.data, self.need(struct.calcsize("<" + fmt), what))[0]

    def count(self, what: str, smallest: int) -> int:
        """A number of things of at least `smallest` bytes each, all of which must still fit into the file."""
        count: int = self.scalar("Q", f"the number of {what}")
        if count * smallest > self.size - self.at:
            self.fail(f"{count} {what} cannot fit into the {self.size - self.at} bytes that follow")
        return count

    def strings(self, count: int, what: str) -> list[str]:
        # The hot loop (two strings per vocabulary entry): locals only, one bounds check per string.
        data, size, at, length_of = self.data, self.size, self.at, struct.Struct("<Q").unpack_from
        found = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_of(data, at)[0]
                if at > size:
                    self.fail(f"a string of {what} needs {at - start} bytes at {start}, but the file ends at {size}")
                found.append(data[start:at].decode())
        except struct.error:
            self.fail(f"a string of {what} is expected at {at}, but the file ends at {size}")
        except UnicodeDecodeError:
            self.fail(f"a string of {what} is not UTF-8: {data[start:at][:40]!r}")
        self.at = at
        return found

    def value_type(self, key: str) -> int:
        number: int = self.scalar("I", f"the type of {key!r}")
        if number != ARRAY and number not in ValueType._value2member_map_:
            self.fail(f"expected a value type from 0 to {max(ValueType)} for metadata key {key!r}, got {number}")
        return number

    def value(self, key: str) -> tuple[ValueType, Any]:
        number = self.value_type(key)
        if number != ARRAY:
            return ValueType(number), self.values(ValueType(number), 1, key)[0]
        number = self.value_type(key)
        if number == ARRAY:
            self.fail(f"metadata key {key!r} is an array of arrays, which no known model needs")
        element = ValueType(number)
        smallest = 8 if element is ValueType.STRING else struct.calcsize(SCALAR_FORMATS[element])
        return element, self.values(element, self.count(f"elements of {key!r}", smallest), key)

    def values(self, kind: ValueType, count: int, key: str) -> list[Any]:
        if kind is ValueType.STRING:
            return self.strings(count, repr(key))
        fmt = f"<{count}{SCALAR_FORMATS[kind]}"
        found = list(struct.unpack_from(fmt, self.data, self.need(struct.calcsize(fmt), repr(key))))
        if kind is not ValueType.BOOL:
            return found
        if not set(found) <= {0, 1}:
            self.fail(f"expected 0 or 1 for the boolean {key!r}, got {max(found)}")
        return [bool(v) for v in found]

    def record(self) -> tuple[str, int, tuple[int, ...], int]:
        """Name, type, shape and relative offset of one tensor."""
        name = self.strings(1, "tensor name")[0]
        dimensions = self.scalar("I", f"tensor {name!r}")
        if dimensions > MAX_DIMENSIONS:
            self.fail(f"tensor {name!r}: expected at most {MAX_DIMENSIONS} dimensions, got {dimensions}")
        shape = tuple(self.scalar("Q", f"tensor {name!r}") for _ in range(dimensions))[::-1]
        kind = self.scalar("I", f"tensor {name!r}")
        return name, kind, shape, self.scalar("Q", f"tensor {name!r}")

    def tensor(self, start: int, alignment: int, name: str, kind: int, shape: tuple[int, ...], at: int) -> GGUFTensor:
        if kind not in ggml_types():
            self.fail(f"tensor {name!r}: unknown type {kind}", "a newer or a withdrawn ggml type")
        layout, columns = ggml_types()[kind], shape[-1] if shape else 1
        if min(shape, default=1) < 1 or columns % layout.block_size:
            self.fail(f"tensor {name!r}: expected rows in blocks of {layout.block_size} ({layout.name}), got {shape}")
        if at % alignment:
            self.fail(f"tensor {name!r}: expected an offset that is a multiple of {alignment}, got {at}")
        nbytes = prod(shape) // layout.block_size * layout.block_bytes
        if start + at + nbytes > self.size:
            self.fail(f"tensor {name!r}: its data ends at {start + at + nbytes}, but the file ends at {self.size}")
        return GGUFTensor(name, kind, shape, start + at, nbytes)

    def check(self, tensors: tuple[GGUFTensor, ...]) -> None:
        seen: set[str] = set()
        for tensor in tensors:
            if tensor.name in seen:
                self.fail(f"tensor {tensor.name!r} occurs twice")
            seen.add(tensor.name)
        ordered = sorted(tensors, key=lambda t: t.offset)
        for before, after in pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                self.fail(f"tensors {before.name!r} and {after.name!r} overlap at byte {after.offset}")


def write_header(
    file: BinaryIO,
    metadata: dict[str, tuple[ValueType, Any]],
    tensors: list[tuple[str, int, tuple[int, ...], int]],
    alignment: int = DEFAULT_ALIGNMENT,
) -> list[int]:
    """Write a GGUF header (version 3) and the padding up to the tensor data.

    Args:
        file: at its start, open for writing bytes.
        metadata: (type, value) by key, written in this order; a list or tuple is an array of that type.
            "general.alignment" is added where `alignment` is not the default.
        tensors: (name, ggml type, shape (rows, columns), bytes of data), in the order of their data.
        alignment: each tensor's data starts at a multiple of it, in bytes; the caller pads between tensors.

    Returns:
        Where the data of each tensor goes, in bytes from the start of the file.

    Raises:
        ValueError: a value that its type cannot hold.
    """
    if alignment != DEFAULT_ALIGNMENT:
        metadata = metadata | {"general.alignment": (ValueType.UINT32, alignment)}
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, (kind, value) in metadata.items():
        is_array = isinstance(value, (list, tuple))
        header += _string(key)
        header += struct.pack("<IIQ", ARRAY, kind, len(value)) if is_array else struct.pack("<I", kind)
        try:
            header += _values(kind, value if is_array else [value])
        except (struct.error, AttributeError, OverflowError) as error:
            raise ValueError(f"metadata key {key!r}: {kind.name} cannot hold the value: {error}") from error

    relative = 0
    offsets = []
    for name, ggml_type, shape, nbytes in tensors:
        header += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += struct.pack("<IQ", ggml_type, relative)
        offsets.append(relative)
        relative = _align(relative + nbytes, alignment)

    data_offset = _align(len(header), alignment)
    file.write(header.ljust(data_offset, b"\0"))
    return [data_offset + offset for offset in offsets]


def _align(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _values(kind: ValueType, values: list[Any] | tuple[Any, ...]) -> bytes:
    if kind is ValueType.STRING:
        return b"".join(map(_string, values))
    return struct.pack(f"<{len(values)}{SCALAR_FORMATS[kind]}", *values)
