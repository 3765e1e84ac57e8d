"""An artifact's own weights as floats, under the names and in the shapes of the checkpoint it was made from.

What a runtime computes with is read back from the file, and nothing is rounded again. GGUF files of llama.cpp's
architectures phi3 and phimoe and folders whose graph onnxruntime-genai's builder made are understood, whoever wrote
them; of Phi-3-small, which the builder does not know, our own folders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3edge import registry
from phi3edge.artifact import Artifact
from phi3edge.emitters import _genai_graph, _small_graph
from phi3edge.errors import CheckpointError, MissingExtraError, UnsupportedError
from phi3edge.genai_folder import read_folder
from phi3edge.gguf_file import GGUFTensor, ggml_types, read_header
from phi3edge.gguf_names import TENSOR_NAMES, tensor_name
from phi3edge.runners.llama_cpp import files
from phi3edge.types import ModelSpec, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

HEAD = "head"
SEPARATE = {"attn_q": "q", "attn_k": "k", "attn_v": "v"}


@dataclass(frozen=True, slots=True)
class Stored:
    """A weight as an artifact holds it.

    Attributes:
        codec: name of its codec, or of ggml's type or ONNX's dtype where phi3edge has none for it.
        bytes: of its data; those that a tied head shares with the embedding are the embedding's.
        read: gives it as float32, in the checkpoint's shape.
    """

    codec: str
    bytes: int
    read: Callable[[], np.ndarray]


class Dequantized:
    """The weights of an artifact; `read` is that of a checkpoint."""

    def __init__(self, artifact: Artifact, spec: ModelSpec) -> None:
        """Reads headers only.

        Args:
            artifact: a GGUF file or an ONNX Runtime GenAI folder.
            spec: the model that it should be.

        Raises:
            CheckpointError: a weight that is missing, or has another shape; a damaged file.
            UnsupportedError: another architecture or layout, or a type that phi3edge cannot read.
            MissingExtraError: onnx-ir is not installed.
        """
        wanted = [*spec.tensors, *([_tied_head(spec)] if spec.tied else [])]
        names = _small_graph.WEIGHTS if spec.family == "phi3small" else _genai_graph.WEIGHTS
        found = _onnx(artifact.file, wanted, names) if artifact.is_onnx else _gguf(artifact.file, wanted, spec.family)
        embedding = next(t.name for t in spec.tensors if t.role == "embedding")
        if spec.tied and HEAD not in found:
            found[HEAD] = found[embedding]
        self._found = found
        for tensor in wanted:
            if tensor.name not in found:
                raise CheckpointError(
                    f"{artifact.file.name} has no {tensor.role}" + ("" if tensor.layer is None else f" {tensor.layer}"),
                    "is it an export of this checkpoint? --checkpoint names another one",
                )

    def __getitem__(self, name: str) -> Stored:
        """A weight by its name in the checkpoint; "head" for what a tied head reads."""
        return self._found[name]

    def read(self, name: str) -> np.ndarray:
        """A weight, float32, in its own shape."""
        return self._found[name].read()


def _tied_head(spec: ModelSpec) -> TensorSpec:
    """A tied model's head, which an artifact may hold by itself."""
    return TensorSpec(HEAD, HEAD, None, next(t.shape for t in spec.tensors if t.role == "embedding"))


def _gguf(file: Path, wanted: list[TensorSpec], family: str) -> dict[str, Stored]:
    """The wanted tensors of a GGUF file, or of all parts of a split one; its architecture is named as the family is."""
    headers = {part: read_header(part) for part in files(file)}
    architecture = headers[file].metadata.get("general.architecture")
    if architecture != family:
        raise UnsupportedError(f"{file.name} is of architecture {architecture!r}, expected {family!r}")
    experts = 1 + max((t.expert for t in wanted if t.expert is not None), default=0)
    tensors = {t.name: (part, t) for part, header in headers.items() for t in header.tensors}
    found = {}
    for tensor in wanted:
        name = TENSOR_NAMES[HEAD] if tensor.name == HEAD else tensor_name(tensor)
        if name in tensors:
            part, entry = tensors[name]
            size = entry.nbytes
            if tensor.expert is None:
                _require_shape(file, tensor, entry.shape)
            else:  # one after the other
                _require_shape(file, replace(tensor, shape=(experts, *tensor.shape)), entry.shape)
                size //= experts
            start = entry.offset + size * (tensor.expert or 0)
            found[tensor.name] = Stored(
                ggml_types()[entry.ggml_type].name, size, _reader(part, entry, tensor.shape, start, size)
            )
    return found


def _reader(file: Path, entry: GGUFTensor, shape: tuple[int, ...], start: int, size: int) -> Callable[[], np.ndarray]:
    """Reads a tensor of a GGUF file, or that of one expert: `size` bytes from `start`."""
    if entry.ggml_type not in _codecs():
        kind = ggml_types()[entry.ggml_type].name
        raise UnsupportedError(f"{file.name}: phi3edge has no codec for {kind}, which {entry.name} is in")
    module = _codecs()[entry.ggml_type]

    def read() -> np.ndarray:
        rows = shape[0] if len(shape) == 2 else 1
        data = np.fromfile(file, np.uint8, size, offset=start).reshape(rows, -1)
        return module.dequantize(module.unpack(data)).reshape(shape)

    return read


@cache
def _codecs() -> dict[int, Any]:
    """The codecs for GGUF by ggml's number of their type."""
    modules = [registry.load("codecs", name) for name in registry.names("codecs")]
    return {m.GGML_TYPE: m for m in modules if "gguf" in m.FORMATS}


def _onnx(path: Path, wanted: list[TensorSpec], patterns: Mapping[str, str]) -> dict[str, Stored]:
    """The wanted tensors of a graph, by patterns of their names in it; parts of fused ones are put together."""
    try:
        import onnx_ir as ir
    except ImportError:
        raise MissingExtraError("reading the weights of ONNX folders", "onnx") from None
    folder = read_folder(path)  # which checks names and sizes before anything is opened
    model = ir.load(folder.model_file)
    parts: dict[tuple[str, int | None, int | None], dict[str, Stored]] = {}
    for node in model.graph:
        for place, value in enumerate(node.inputs):
            if value is not None and (match := _weight(value, patterns)) is not None:
                role, layer, expert, part = match
                parts.setdefault((role, layer, expert), {}).setdefault(part, _onnx_stored(node, place, path))
    found = {}
    for tensor in wanted:
        held = parts.get((tensor.role, tensor.layer, tensor.expert), {})
        if tensor.role in SEPARATE:  # which a graph names as a part of a fused linear
            fused = parts.get(("attn_qkv", tensor.layer, None), {})
            held = {part: stored for part, stored in fused.items() if part == SEPARATE[tensor.role]}
        names = [p.name for p in tensor.parts] if set(held) == {p.name for p in tensor.parts} else list(held)
        if tensor.role == "attn_qkv" and "qkv" in held:
            names = ["qkv"]
        if tensor.role == "ffn_gate_up" and "gate_up" in held:
            names = ["gate_up"]
        if names:
            found[tensor.name] = _joined([held[name] for name in names], tensor, path)
    return found


def _weight(value: ir.Value, patterns: Mapping[str, str]) -> tuple[str, int | None, int | None, str] | None:
    """Role, layer, expert and part of the weight that a value is, before or after a Cast or Transpose, or None."""
    origin = _initializer(value)
    if origin.const_value is None:
        return None
    for role, pattern in patterns.items():
        if match := re.fullmatch(rf"{pattern}(?:_[qQ]\w*)?", origin.name or ""):
            said = match.groupdict()
            layer, expert = (int(said[key]) if said.get(key) else None for key in ("layer", "expert"))
            return role, layer, expert, said.get("part") or ""
    return None


def _initializer(value: ir.Value) -> ir.Value:
    """What a Cast or Transpose of a weight reads, or the value itself."""
    while (node := value.producer()) is not None and node.op_type in ("Cast", "Transpose"):
        assert node.inputs[0] is not None
        value = node.inputs[0]
    return value


def _onnx_stored(node: ir.Node, place: int, path: Path) -> Stored:
    """The weight that a node reads at a place."""
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        return _blocks(node, path)
    value = node.inputs[place]
    assert value is not None
    origin = _initializer(value)
    assert origin.const_value is not None
    turned = node.op_type == "MatMul" and value is origin

    def read() -> np.ndarray:
        weight = _array(value)
        return weight.T if turned or node.op_type == "MatMul" else weight

    kind = {"FLOAT": "f32", "FLOAT16": "f16", "BFLOAT16": "bf16"}.get(origin.const_value.dtype.name)
    if kind is None:
        raise UnsupportedError(f"{path.name}: {origin.name} is of type {origin.const_value.dtype.name}")
    return Stored(kind, origin.const_value.nbytes, read)


def _blocks(node: ir.Node, path: Path) -> Stored:
    """A weight of MatMulNBits or GatherBlockQuantized: scale * (code - zero point), by blocks of a row."""
    first = 1 if node.op_type == "MatMulNBits" else 0
    codes, scales = node.inputs[first], node.inputs[2]
    zeros = node.inputs[3] if len(node.inputs) > 3 else None
    bits, block = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    if bits not in (4, 8) or codes is None or scales is None or (len(node.inputs) > 4 and node.inputs[4] is not None):
        raise UnsupportedError(
            f"{path.name}: {node.name} has {bits} bits or an order of columns, which is not read here"
        )
    values = [value for value in (codes, scales, zeros) if value is not None]

    def read() -> np.ndarray:
        found = _array(scales)
        rows, blocks = found.reshape(_array(codes).shape[0], -1).shape
        levels = _unpacked(_array(codes).reshape(rows, -1), bits).reshape(rows, blocks, block)
        zero: np.ndarray | float = 2.0 ** (bits - 1)
        if zeros is not None:
            zero = _unpacked(_array(zeros).reshape(rows, -1), bits)[:, :blocks, None]
        return ((levels - zero) * found.reshape(rows, blocks, 1)).reshape(rows, -1).astype(np.float32, copy=False)

    stored = sum(_initializer(value).const_value.nbytes for value in values)
    return Stored(f"{'u' if zeros is not None else ''}int{bits}_b{block}", stored, read)


def _unpacked(data: np.ndarray, bits: int) -> np.ndarray:
    """Codes of packed rows as float32: two of 4 bits in a byte, the first one low."""
    if data.dtype != np.uint8 or bits == 8:  # zero points may be floats
        return data.astype(np.float32)
    return np.stack([data & 15, data >> 4], -1).reshape(len(data), -1).astype(np.float32)


def _array(value: ir.Value) -> np.ndarray:
    """A constant through its Cast or Transpose, floats as float32."""
    node = value.producer()
    if node is None:
        assert value.const_value is not None
        found = value.const_value.numpy()
        return found.astype(np.float32) if found.dtype.kind == "f" else found
    assert node.inputs[0] is not None
    found = _array(node.inputs[0])
    return found.T if node.op_type == "Transpose" else found


def _joined(held: list[Stored], tensor: TensorSpec, path: Path) -> Stored:
    """A tensor from its parts, in the order of their rows."""

    def read() -> np.ndarray:
        found = np.concatenate([np.atleast_1d(part.read()) for part in held])[..., : tensor.shape[-1]]
        _require_shape(path, tensor, found.shape)
        return np.ascontiguousarray(found)

    return Stored(held[0].codec, sum(part.bytes for part in held), read)


def _require_shape(path: Path, tensor: TensorSpec, shape: tuple[int, ...]) -> None:
    if tuple(shape) != tensor.shape:
        raise CheckpointError(
            f"{path.name}: {tensor.role} has shape {tuple(shape)}, the checkpoint's {tensor.shape}",
            "is it an export of this checkpoint? --checkpoint names another one",
        )
