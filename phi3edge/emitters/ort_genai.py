"""Writes an ONNX Runtime GenAI folder: model.onnx, its weights, genai_config.json, tokenizer files.

The graph comes from onnxruntime-genai's own builder (_genai_graph.py), the weights from the stream. A MatMul whose
weight is quantized becomes MatMulNBits, the Gather of the embedding GatherBlockQuantized. What is stored in another
float type than the graph computes in (float16 scales for the CPU's float32) goes through a Cast, which onnxruntime
computes once, at load.

Weights lie in model.onnx.data in the order in which they are used, each at a multiple of 64 KiB, so that Windows can
map them; those below 64 KiB stay in model.onnx. Offsets follow from the plan, so the data is written in one pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3edge.codecs import codec, is_float
from phi3edge.emitters import Job, Stream, WrittenFile
from phi3edge.emitters._genai_config import genai_config, hub_config
from phi3edge.emitters._genai_graph import Weight, build_graph
from phi3edge.emitters._genai_kv import quantize_kv_cache
from phi3edge.emitters._genai_tokenizer import tokenizer_files
from phi3edge.emitters._genai_versions import requires
from phi3edge.emitters._partial_file import PartialFile, next_tensor
from phi3edge.emitters._small_graph import build_small_graph
from phi3edge.errors import UnsupportedError, UsageError
from phi3edge.providers import check_graph, load_provider, read_nodes
from phi3edge.types import JSON, TensorPlan

if TYPE_CHECKING:
    import onnx_ir as ir

MODEL, DATA, CONFIG = "model.onnx", "model.onnx.data", "genai_config.json"
ALIGNMENT = 65536  # Windows maps files at multiples of it
MICROSOFT = "com.microsoft"
ACCURACY_LEVELS = {"cpu": 4, "cuda": 0, "dml": 0, "webgpu": 4}
"""accuracy_level of MatMulNBits: 4 lets the kernel round activations to 8 bits, 0 computes in their own type."""

FLOAT_CODECS = {"float32": "f32", "float16": "f16"}
KV_TYPES = {"float32": "f32", "float16": "f16"}


@dataclass(slots=True)
class _Section:
    """Bytes of one tensor of the graph.

    Attributes:
        values: the graph's values that read it: several for a tied embedding.
        columns: which bytes of a packed row it is made of.
        file: number of the data file, or None if it stays in the model.
        offset: in that file.
        transposed: written as (columns, rows).
    """

    values: list[ir.Value]
    columns: slice
    bytes: int
    transposed: bool = False
    file: int | None = None
    offset: int = 0

    def empty(self) -> np.ndarray:
        """An array for all of it."""
        value = self.values[0]
        return np.empty(value.shape.numpy(), value.dtype.numpy())


@dataclass(slots=True)
class _Piece:
    """Rows of a tensor of the plan that are a weight of their own in the graph: q of attn_qkv, or all of them."""

    start: int
    stop: int
    sections: list[_Section] = field(default_factory=list)


class Emitter:
    """Writes an ONNX Runtime GenAI folder; see phi3edge.emitters.Emitter.

    Raises:
        UnsupportedError: a codec, a KV-cache type or a graph that the provider has no kernels for.
        UsageError: a tensor that is larger than `split_max_size`.
        CheckpointError: a sampling setting that the runtime cannot read.
        MissingExtraError: a package that the builder needs is not installed.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._provider = job, job.runtime.provider
        spec = job.plan.model
        self._io = load_provider(self._provider).io
        if job.runtime.kv_cache not in (KV_TYPES[self._io], "int8"):
            raise UnsupportedError(
                f"the KV cache of provider {self._provider} is {KV_TYPES[self._io]}, not {job.runtime.kv_cache}",
                "change kv_cache in the target",
            )
        if job.runtime.kv_cache == "int8" and job.kv_scales is None:
            raise UnsupportedError("an int8 KV cache needs calibrated scales, and the job has none")
        self.requires = requires(job.plan, job.runtime.kv_cache)
        tokenizer, self.notes = tokenizer_files(job.checkpoint.path, spec)
        if spec.family == "phi3small":
            self._model, weights = build_small_graph(spec, self._provider)
        else:
            self._model, weights = build_graph(spec, self._provider, self._io)
        self._pieces = self._connect(weights)
        if job.runtime.kv_cache == "int8" and job.kv_scales is not None:
            quantize_kv_cache(self._model, job.kv_scales)
        self._tables = self._find_tables()
        self._files = self._place(job.split_max_size)
        self._small = {CONFIG: _text(self._config()), **self._hub_files(), **tokenizer}
        if problems := check_graph(read_nodes(self._model), self._provider):
            raise UnsupportedError(f"provider {self._provider} cannot run this graph: {problems[0]}")

    @property
    def total_bytes(self) -> int:
        """What the files will take, at most: the model is counted with a place in a file for what stays in it."""
        sections = [section for section, _ in self._tables]
        sections += [s for pieces in self._pieces.values() for piece in pieces for s in piece.sections]
        ends: dict[int | None, int] = {None: 0}
        for section in sections:
            if section.file is None:
                ends[None] += section.bytes * len(section.values)
            else:
                ends[section.file] = max(ends.get(section.file, 0), section.offset + section.bytes)
        return sum(ends.values()) + len(self._serialize()) + sum(map(len, self._small.values()))

    def emit(self, stream: Stream, folder: Path, on_bytes: Callable[[int], None] | None = None) -> list[WrittenFile]:
        """Write the folder's files; the model first in the result."""
        with ExitStack() as stack:
            data = [stack.enter_context(PartialFile(folder / name)) for name in self._files]
            for section, numbers in self._tables:
                _finish(section, numbers, data)
            tensors = iter(stream)
            for expected in self._job.plan.tensors:
                chunks = _counted(next_tensor(tensors, expected), expected, on_bytes)
                self._write(self._pieces[expected.tensor.name], chunks, data)
            if (extra := next(tensors, None)) is not None:
                raise RuntimeError(f"expected no tensor after the plan's last, got {extra[0].tensor.name!r}")
            small = {MODEL: self._serialize(), **self._small}
            files = [*data]
            for name, content in small.items():
                _require_below(self._job.split_max_size, name, len(content))
                file = stack.enter_context(PartialFile(folder / name))
                file.write(content)
                files.append(file)
            for file in files:
                file.close()
            files.sort(key=lambda file: file.path.name != MODEL)
            for file in reversed(files):  # the model last: a folder without it does not load
                file.publish()
        return [WrittenFile(file.path, file.bytes, file.sha256) for file in files]

    def _connect(self, weights: list[Weight]) -> dict[str, list[_Piece]]:
        """Gives every weight of the graph its tensor of the plan; the pieces of each tensor by its name, in order."""
        spec = self._job.plan.model
        plans = {(t.tensor.role, t.tensor.layer, t.tensor.expert): t for t in self._job.plan.tensors}
        pieces: dict[str, dict[str, _Piece]] = {}
        for weight in weights:
            tied = weight.role == "head" and spec.tied
            plan = plans[("embedding", None, None) if tied else (weight.role, weight.layer, weight.expert)]
            parts = {p.name: p for p in plan.tensor.parts}
            rows = plan.tensor.shape[0] if len(plan.tensor.shape) == 2 else 1
            start, stop = (parts[weight.part].start, parts[weight.part].stop) if weight.part else (0, rows)
            piece = pieces.setdefault(plan.tensor.name, {}).setdefault(weight.part, _Piece(start, stop))
            self._use(weight, plan, piece)
        found = {name: sorted(by_part.values(), key=lambda p: p.start) for name, by_part in pieces.items()}
        for planned in self._job.plan.tensors:
            ends = [0, *(piece.stop for piece in found.get(planned.tensor.name, []))]
            starts = [piece.start for piece in found.get(planned.tensor.name, [])]
            if ends != [*starts, _rows(planned)]:
                raise UnsupportedError(
                    f"the graph of onnxruntime-genai's builder does not use all of {planned.tensor.name}"
                )
        self._model.graph.sort()
        return found

    def _use(self, weight: Weight, plan: TensorPlan, piece: _Piece) -> None:
        """Makes the node that reads a weight read it as the plan stores it."""
        [node] = weight.value.consumers()
        index = next(i for i, value in enumerate(node.inputs) if value is weight.value)
        name, columns, rows = weight.value.name or "", plan.tensor.shape[-1], piece.stop - piece.start
        grid = codec(plan.codec)
        if "onnx" not in grid.FORMATS:
            raise UnsupportedError(f"{plan.tensor.name}: codec {plan.codec} is not one of ONNX Runtime's")
        del self._model.graph.initializers[name]
        if is_float(plan.codec):
            stored = "float32" if plan.codec == "f32" else "float16"
            turn = node.op_type == "MatMul" and not piece.sections
            shape = (columns,) if len(plan.tensor.shape) == 1 else (columns, rows) if turn else (rows, columns)
            if node.op_type == "MatMul" and not turn:  # a tied head reads the embedding's rows
                shape = (rows, columns)
            value = self._section(piece, 0, name, stored, shape, slice(None), rows * plan.bytes // _rows(plan), turn)
            value = self._cast(value, weight.value.dtype)
            if node.op_type == "MatMul" and not turn:
                dtype = _ir_type(self._io)
                value = self._node("Transpose", f"{name}/Transpose", [value], (columns, rows), dtype, perm=[1, 0])
            node.replace_input_with(index, value)
            return
        blocks = columns // grid.BLOCK_SIZE
        codes, scales, zeros = grid.sections(columns)
        matmul = node.op_type == "MatMul"
        layout = (rows, blocks, codes // blocks) if matmul else (rows, codes)
        inputs = [
            self._section(piece, 0, f"{name}_q", "uint8", layout, slice(0, codes), rows * codes),
            self._cast(
                self._section(
                    piece, 1, f"{name}_scales", "float16", (rows, blocks), slice(codes, codes + scales), rows * scales
                )
            ),
        ]
        if zeros:
            at = slice(codes + scales, codes + scales + zeros)
            inputs.append(self._section(piece, 2, f"{name}_zero_points", "uint8", (rows, zeros), at, rows * zeros))
        if matmul:
            level = ACCURACY_LEVELS[self._provider]
            attributes = {"K": columns, "N": rows, "bits": grid.bits, "block_size": grid.BLOCK_SIZE}
            self._become(node, "MatMulNBits", [node.inputs[0], *inputs], {**attributes, "accuracy_level": level})
        else:
            attributes = {"bits": grid.bits, "block_size": grid.BLOCK_SIZE, "gather_axis": 0, "quantize_axis": 1}
            self._become(node, "GatherBlockQuantized", [inputs[0], node.inputs[1], *inputs[1:]], attributes)

    def _become(self, node: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, int]) -> None:
        """Turns a node into another operator of onnxruntime's own, with the same name and outputs."""
        import onnx_ir as ir

        node.op_type, node.domain = op_type, MICROSOFT
        node.resize_inputs(len(inputs))
        for i, value in enumerate(inputs):
            node.replace_input_with(i, value)
        node.attributes.clear()
        for key, number in attributes.items():
            node.attributes[key] = ir.AttrInt64(key, number)

    def _section(
        self,
        piece: _Piece,
        number: int,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        columns: slice,
        size: int,
        transposed: bool = False,
    ) -> ir.Value:
        """A new initializer of the graph that reads section `number` of a piece, which is made if it is not there."""
        import onnx_ir as ir

        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(_ir_type(dtype)))
        if number < len(piece.sections):
            piece.sections[number].values.append(value)
        else:
            piece.sections.append(_Section([value], columns, size, transposed))
        value.const_value = ir.ExternalTensor("", 0, size, value.dtype, shape=value.shape, name=name)
        self._model.graph.register_initializer(value)
        return value

    def _cast(self, value: ir.Value, wanted: ir.DataType | None = None) -> ir.Value:
        """The value in a dtype, or else in that which the graph computes in."""
        wanted = wanted or _ir_type(self._io)
        if value.dtype == wanted:
            return value
        return self._node("Cast", f"{value.name}/Cast", [value], tuple(value.shape or ()), wanted, to=int(wanted))

    def _node(
        self,
        op_type: str,
        name: str,
        inputs: list[ir.Value],
        shape: tuple[Any, ...],
        dtype: ir.DataType,
        **attributes: Any,
    ) -> ir.Value:
        """A new node that computes from weights alone; its output."""
        import onnx_ir as ir

        output = ir.Value(name=f"{name}/output_0", shape=ir.Shape(shape), type=ir.TensorType(dtype))
        node = ir.node(op_type, inputs=inputs, attributes=attributes, outputs=[output], name=name)
        self._model.graph.insert_before(self._model.graph[0], node)
        return output

    def _find_tables(self) -> list[tuple[_Section, np.ndarray]]:
        """What the builder computed itself, such as the rotary tables; they grow with the model's context."""
        import onnx_ir as ir

        return [
            (_Section([value], slice(None), value.const_value.nbytes), np.ascontiguousarray(value.const_value.numpy()))
            for value in self._model.graph.initializers.values()
            if not isinstance(value.const_value, ir.ExternalTensor)
        ]

    def _place(self, limit: int | None) -> list[str]:
        """Gives every section its place, in the order in which they are written; the names of the data files."""
        pieces = [piece for tensor in self._job.plan.tensors for piece in self._pieces[tensor.tensor.name]]
        sections = [section for section, _ in self._tables] + [s for piece in pieces for s in piece.sections]
        placed = [section for section in sections if section.bytes >= ALIGNMENT]
        file = end = 0
        for section in placed:
            _require_below(limit, section.values[0].name or "", section.bytes)
            offset = -(-end // ALIGNMENT) * ALIGNMENT
            if limit is not None and offset + section.bytes > limit:
                file, offset = file + 1, 0
            section.file, section.offset, end = file, offset, offset + section.bytes
        names = [DATA] if file == 0 else [f"{DATA}.{number}" for number in range(file + 1)]
        for section in placed:
            assert section.file is not None
            for value in section.values:
                value.const_value = _external(value, names[section.file], section)
        return names if placed else []

    def _write(self, pieces: list[_Piece], chunks: Iterator[np.ndarray], data: list[PartialFile]) -> None:
        """Writes a tensor's rows: what comes first in a piece as it arrives, the rest at the piece's end."""
        row = 0
        waiting = iter(pieces)
        piece = next(waiting)
        kept: dict[int, np.ndarray] = {}
        for chunk in chunks:
            while len(chunk):
                rows, chunk = chunk[: piece.stop - row], chunk[piece.stop - row :]
                at = slice(row - piece.start, row - piece.start + len(rows))
                row += len(rows)
                for number, section in enumerate(piece.sections):
                    part = np.ascontiguousarray(rows[:, section.columns])
                    if number == 0 and section.file is not None and not section.transposed:
                        _pad(data[section.file], section.offset)
                        data[section.file].write(part)
                    else:
                        _keep(section, kept.setdefault(number, section.empty()), at, part)
                if row == piece.stop:
                    for number, whole in kept.items():
                        _finish(piece.sections[number], whole, data)
                    piece, kept = next(waiting, piece), {}

    def _serialize(self) -> bytes:
        import onnx_ir as ir

        self._model.producer_name = "phi3edge"
        return ir.serde.serialize_model(self._model).SerializeToString(deterministic=True)

    def _config(self) -> JSON:
        checkpoint = self._job.checkpoint
        names = [value.name or "" for value in self._model.graph.inputs]
        return genai_config(
            self._job.plan.model, names, self._provider, self._job.context, MODEL, checkpoint.generation_config or {}
        )

    def _hub_files(self) -> dict[str, bytes]:
        """config.json and generation_config.json, which other loaders of ONNX models ask for."""
        checkpoint = self._job.checkpoint
        found = {"config.json": hub_config(self._job.plan.model, checkpoint.config)}
        if checkpoint.generation_config is not None:
            found["generation_config.json"] = checkpoint.generation_config
        return {name: _text(content) for name, content in found.items()}


def _require_below(limit: int | None, name: str, size: int) -> None:
    """Raises if something that is not split is larger than a file may be."""
    if limit is not None and size > limit:
        raise UsageError(f"{name} has {size} bytes, files hold {limit}", f"allow files of {size} bytes or more")


def _counted(
    chunks: Iterable[np.ndarray], expected: TensorPlan, on_bytes: Callable[[int], None] | None
) -> Iterator[np.ndarray]:
    """The chunks, counted against the plan."""
    size = 0
    for chunk in chunks:
        yield chunk
        size += chunk.nbytes
        if on_bytes is not None:
            on_bytes(chunk.nbytes)
    if size != expected.bytes:
        raise RuntimeError(f"tensor {expected.tensor.name!r}: expected {expected.bytes} bytes, got {size}")


def _keep(section: _Section, whole: np.ndarray, rows: slice, part: np.ndarray) -> None:
    """Copies packed rows of a section to where they belong in all of it."""
    if section.transposed:
        whole[:, rows] = part.view(whole.dtype).T
    else:
        flat = whole.reshape(-1).view(np.uint8)
        flat[rows.start * part.shape[1] : rows.stop * part.shape[1]] = part.reshape(-1)


def _finish(section: _Section, whole: np.ndarray, data: list[PartialFile]) -> None:
    """Writes a section that is in memory, into its file or the model."""
    import onnx_ir as ir

    if section.file is not None:
        _pad(data[section.file], section.offset)
        data[section.file].write(whole)
        return
    for value in section.values:  # a tied embedding's codes have other dimensions for the head
        value.const_value = ir.Tensor(whole.reshape(value.shape.numpy()), name=value.name)


def _pad(file: PartialFile, offset: int) -> None:
    """Fills a file with zeros up to where a section begins."""
    if offset > file.bytes:
        file.write(bytes(offset - file.bytes))


def _external(value: ir.Value, location: str, section: _Section) -> ir.ExternalTensor:
    import onnx_ir as ir

    return ir.ExternalTensor(
        location, section.offset, section.bytes, value.dtype, shape=value.shape, name=value.name or ""
    )


def _ir_type(dtype: str) -> ir.DataType:
    import onnx_ir as ir

    return ir.DataType.from_numpy(np.dtype(dtype))


def _rows(plan: TensorPlan) -> int:
    return plan.tensor.shape[0] if len(plan.tensor.shape) == 2 else 1


def _text(content: JSON) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
