"""The ONNX container: a strict reader of everything in a model but its weights.

An ONNX file is one protobuf message (onnx.proto): a graph of nodes, its inputs and outputs, and its tensors, whose
bytes are in the message or in files beside it. The reader believes nothing: every length is checked against what holds
it, a tensor's size against its type and shape, and a file beside it is a plain name. Needs no protobuf and no onnx
package.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import NoReturn

from phi3edge.errors import CheckpointError

HINT = "the file is damaged, or its download is incomplete: get it again"
DEEPEST = 16  # graphs within nodes within graphs

DTYPES = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    16: ("bfloat16", 16),
    17: ("float8_e4m3fn", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    25: ("uint2", 2),
    26: ("int2", 2),
}
"""Name and bits of an element by TensorProto.DataType; types that weights and inputs never have are left out."""

_STRING = 8  # a DataType too, of no fixed size
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf's wire types; 3 and 4, groups, are in no ONNX file
_Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ONNXValue:
    """An input or output of the graph.

    Attributes:
        dtype: name of its type, "?" for one that is no tensor.
        shape: its dimensions: a number, a name, or "?".
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class ONNXTensor:
    """A constant: an initializer, or an attribute of a node.

    Attributes:
        nbytes: size of its data, by type and shape.
        location: name of the file beside the model that holds it; None if the model itself does.
        offset: of its data in that file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    location: str | None
    offset: int


@dataclass(frozen=True, slots=True)
class ONNXNode:
    """A node.

    Attributes:
        operator: "domain.operator", or the operator alone in ONNX's own domain.
        inputs: names of the values that it reads; "" for one left out.
        outputs: names of the values that it computes.
    """

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ONNXModel:
    """A model without its weights.

    Attributes:
        opsets: version by domain; "" is ONNX's own.
        nodes: those of subgraphs and of functions too.
        file_size: of the model's own file, in bytes.
    """

    ir_version: int
    producer: str
    opsets: dict[str, int]
    inputs: tuple[ONNXValue, ...]
    outputs: tuple[ONNXValue, ...]
    nodes: tuple[ONNXNode, ...] = field(repr=False)
    tensors: tuple[ONNXTensor, ...] = field(repr=False)
    file_size: int

    @property
    def operators(self) -> dict[str, int]:
        """How many nodes of each operator, the most frequent first."""
        return dict(Counter(node.operator for node in self.nodes).most_common())

    @property
    def data_files(self) -> list[str]:
        """Names of the files beside the model that hold its tensors, in order of appearance."""
        return list(dict.fromkeys(t.location for t in self.tensors if t.location is not None))


def read_model(path: Path) -> ONNXModel:
    """Reads a model; its data files need not exist.

    Raises:
        CheckpointError: no ONNX file, or a damaged or hostile one.
    """
    size = path.stat().st_size
    if not size:
        raise CheckpointError(f"{path}: an empty file, expected an ONNX model", HINT)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(data, path).model()


def check_data(model: ONNXModel, folder: Path) -> list[Path]:
    """The files that hold the model's tensors, in order.

    Raises:
        CheckpointError: one is missing, or shorter than the tensors in it.
    """
    ends: dict[str, int] = {}
    for t in model.tensors:
        if t.location is not None:
            ends[t.location] = max(ends.get(t.location, 0), t.offset + t.nbytes)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the model's weights are in it", "copy or export it again")
        if (size := path.stat().st_size) < end:
            raise CheckpointError(f"{path} has {size:,} bytes, the model's weights end at {end:,}", HINT)
    return [folder / name for name in ends]


class _Reader:
    """Reads one file; gathers tensors and nodes on the way through graphs, nodes and attributes."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path = data, path
        self._tensors: list[ONNXTensor] = []
        self._nodes: list[ONNXNode] = []

    def model(self) -> ONNXModel:
        whole = 0, len(self._data)
        ir_version, producer, graph = 0, "", None
        opsets: dict[str, int] = {}
        for number, value in self._fields(whole):
            if number == 1:
                ir_version = self._int(value)
            elif number in (2, 3):  # name and version
                producer = f"{producer} {self._text(value)}".strip()
            elif number == 7:
                graph = self._span(value)
            elif number == 8:
                opsets.update([self._opset(self._span(value))])
            elif number == 25:
                self._function(self._span(value))
        if graph is None or not opsets:
            self._fail("no ONNX model: it has no graph, or names no operator set")
        inputs, outputs = self._graph(graph, 0)
        nodes, tensors = tuple(self._nodes), tuple(self._tensors)
        return ONNXModel(ir_version, producer, opsets, inputs, outputs, nodes, tensors, whole[1])

    def _graph(self, span: _Span, depth: int) -> tuple[tuple[ONNXValue, ...], tuple[ONNXValue, ...]]:
        if depth > DEEPEST:
            self._fail(f"graphs within graphs, more than {DEEPEST} deep")
        inputs, outputs = [], []
        for number, value in self._fields(span):
            if number == 1:
                self._node(self._span(value), depth)
            elif number == 5:
                self._tensors.append(self._tensor(self._span(value)))
            elif number == 11:
                inputs.append(self._value(self._span(value)))
            elif number == 12:
                outputs.append(self._value(self._span(value)))
            elif number == 15:
                self._fail("a sparse initializer, which is not supported")
        return tuple(inputs), tuple(outputs)

    def _function(self, span: _Span) -> None:
        for number, value in self._fields(span):
            if number == 7:
                self._node(self._span(value), 0)

    def _node(self, span: _Span, depth: int) -> None:
        operator = domain = ""
        inputs: list[str] = []
        outputs: list[str] = []
        for number, value in self._fields(span):
            if number == 1:
                inputs.append(self._text(value))
            elif number == 2:
                outputs.append(self._text(value))
            elif number == 4:
                operator = self._text(value)
            elif number == 5:
                self._attribute(self._span(value), depth)
            elif number == 7:
                domain = self._text(value)
        name = f"{domain}.{operator}" if domain not in ("", "ai.onnx") else operator
        self._nodes.append(ONNXNode(name, tuple(inputs), tuple(outputs)))

    def _attribute(self, span: _Span, depth: int) -> None:
        for number, value in self._fields(span):
            if number in (5, 10):
                self._tensors.append(self._tensor(self._span(value)))
            elif number in (6, 11):
                self._graph(self._span(value), depth + 1)
            elif number in (22, 23):
                self._fail("a sparse tensor, which is not supported")

    def _tensor(self, span: _Span) -> ONNXTensor:
        name, kind, external, raw = "", 0, False, None
        shape: list[int] = []
        entries: dict[str, str] = {}
        for number, value in self._fields(span):
            if number == 1:
                shape += self._ints(value)
            elif number == 2:
                kind = self._int(value)
            elif number == 8:
                name = self._text(value)
            elif number == 9:
                raw = self._span(value)
            elif number == 13:
                entries.update([self._entry(self._span(value))])
            elif number == 14:
                external = self._int(value) == 1
        if min(shape, default=0) < 0:
            self._fail(f"tensor {name!r} has shape {shape}")
        if kind == _STRING and not external:
            return ONNXTensor(name, "string", tuple(shape), 0, None, 0)
        if kind not in DTYPES:
            self._fail(f"tensor {name!r} has the unknown type {kind}")
        dtype, bits = DTYPES[kind]
        nbytes = -(-prod(shape) * bits // 8)
        if raw and raw[1] - raw[0] != nbytes:
            self._fail(f"tensor {name!r} has {raw[1] - raw[0]} bytes, its shape and type {nbytes}")
        if not external:
            return ONNXTensor(name, dtype, tuple(shape), nbytes, None, 0)
        location, offset = self._place(name, entries, nbytes)
        return ONNXTensor(name, dtype, tuple(shape), nbytes, location, offset)

    def _place(self, name: str, entries: dict[str, str], nbytes: int) -> tuple[str, int]:
        """File and offset of a tensor that is not in the model's own file."""
        location = entries.get("location", "")
        if location in ("", ".", "..") or any(c in location for c in "/\\:\0"):
            self._fail(f"tensor {name!r} is in {location!r}, expected the name of a file beside the model")
        numbers = {key: entries.get(key, "0") for key in ("offset", "length")}
        for key, text in numbers.items():
            if not (text.isascii() and text.isdecimal() and len(text) < 20):
                self._fail(f"tensor {name!r} has the {key} {text[:40]!r}")
        if "length" in entries and int(numbers["length"]) != nbytes:
            self._fail(f"tensor {name!r} has {numbers['length']} bytes, its shape and type {nbytes}")
        return location, int(numbers["offset"])

    def _value(self, span: _Span) -> ONNXValue:
        name, dtype = "", "?"
        shape: tuple[int | str, ...] = ()
        for number, value in self._fields(span):
            if number == 1:
                name = self._text(value)
            elif number == 2:
                dtype, shape = self._type(self._span(value))
        return ONNXValue(name, dtype, shape)

    def _type(self, span: _Span) -> tuple[str, tuple[int | str, ...]]:
        """Element type and shape of a TypeProto, if it is a tensor's."""
        dtype, shape = "?", list[int | str]()
        tensors = [self._span(value) for number, value in self._fields(span) if number == 1]
        for number, value in (f for tensor in tensors for f in self._fields(tensor)):
            if number == 1:
                dtype = DTYPES.get(self._int(value), ("?", 0))[0]
            elif number == 2:
                shape = [self._dimension(self._span(v)) for n, v in self._fields(self._span(value)) if n == 1]
        return dtype, tuple(shape)

    def _dimension(self, span: _Span) -> int | str:
        for number, value in self._fields(span):
            if number == 1:
                return self._int(value)
            if number == 2:
                return self._text(value)
        return "?"

    def _opset(self, span: _Span) -> tuple[str, int]:
        domain, version = "", 0
        for number, value in self._fields(span):
            if number == 1:
                domain = self._text(value)
            elif number == 2:
                version = self._int(value)
        return "" if domain == "ai.onnx" else domain, version

    def _entry(self, span: _Span) -> tuple[str, str]:
        texts = {number: self._text(value) for number, value in self._fields(span) if number in (1, 2)}
        return texts.get(1, ""), texts.get(2, "")

    def _fields(self, span: _Span) -> Iterator[tuple[int, int | _Span]]:
        """The fields of one message: number and value, which is a place in the file where it has a length."""
        at, end = span
        while at < end:
            key, at = self._varint(at, end)
            number, wire = key >> 3, key & 7
            if wire == _VARINT:
                value, at = self._varint(at, end)
                yield number, value
                continue
            if wire == _BYTES:
                length, at = self._varint(at, end)
            elif wire in (_FIXED32, _FIXED64):
                length = 4 if wire == _FIXED32 else 8
            else:
                self._fail(f"no protobuf: wire type {wire} at byte {at}")
            if length > end - at:
                self._fail(f"truncated: {length} bytes wanted at byte {at}, {end - at} are there")
            yield number, (at, at + length)
            at += length

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self._data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at
        return self._fail(f"truncated, or no protobuf: an unfinished number at byte {at}")

    def _int(self, value: int | _Span) -> int:
        if isinstance(value, tuple):
            self._fail("no ONNX model: a length where a number belongs")
        return struct.unpack("<q", struct.pack("<Q", value & 2**64 - 1))[0]

    def _ints(self, value: int | _Span) -> list[int]:
        """A repeated number, packed or not."""
        if isinstance(value, int):
            return [self._int(value)]
        at, end = value
        numbers = []
        while at < end:
            number, at = self._varint(at, end)
            numbers.append(self._int(number))
        return numbers

    def _span(self, value: int | _Span) -> _Span:
        if isinstance(value, int):
            self._fail("no ONNX model: a number where a length belongs")
        return value

    def _text(self, value: int | _Span) -> str:
        start, end = self._span(value)
        try:
            return self._data[start:end].decode("utf-8")
        except UnicodeDecodeError:
            return self._fail(f"no ONNX model: a name that is no UTF-8 at byte {start}")

    def _fail(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._path}: {what}", HINT)
