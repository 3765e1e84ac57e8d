"""Execution providers of ONNX Runtime: operators, types and attributes that each has kernels for (providers/*.toml).

Where a provider cannot be run, its graphs are held against this list, and every entry says where it comes from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from pydantic import Field

from phi3edge import _toml
from phi3edge._toml import Strict
from phi3edge.codecs import codec, is_float

DType = Literal["float32", "float16", "int64", "int32", "int8", "uint8", "bool"]

FLOATS = ("float32", "float16")


@dataclass(frozen=True, slots=True)
class Node:
    """A graph's node, as far as a provider's kernels care.

    Attributes:
        name: for messages.
        version: the operator's own version under the graph's opset: `onnx.defs.get_schema(...).since_version`.
        inputs: dtype of each input, "" for one that is left out.
        attributes: numbers and strings; others are not checked.
    """

    name: str
    op_type: str
    version: int
    inputs: tuple[str, ...]
    domain: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)


class Operator(Strict):
    """Kernels of one operator.

    Attributes:
        domain: "" for ONNX's own.
        versions: operator versions that kernels are registered for; a newer one is another operator to the runtime.
        inputs: dtypes that each input may have, none for one that must be left out; the last entry holds for all after.
        required: inputs that the standard lets out and the kernel does not.
        same: groups of inputs that have one dtype.
        attributes: values that an attribute may have; one that is not named is free.
    """

    domain: str = ""
    versions: tuple[int, ...]
    inputs: tuple[tuple[DType, ...], ...]
    required: tuple[int, ...] = ()
    same: tuple[tuple[int, ...], ...] = ()
    attributes: dict[str, tuple[int | float | str, ...]] = {}


class Provider(Strict):
    """A provider file.

    Attributes:
        io: dtype of a graph's activations and KV cache there.
        reads_window: whether its attention heeds a sliding window.
        source: where the list comes from.
        checked: how it was checked, beyond being read.
        operators: by their type.
    """

    summary: str
    io: Literal["float32", "float16"]
    reads_window: bool
    source: str
    checked: str
    operators: dict[str, Operator] = Field(min_length=1)

    @property
    def picks_rows(self) -> bool:
        """Whether each expert of a mixture can compute the tokens that chose it alone; else it computes all of them."""
        return "NonZero" in self.operators


@cache
def load_provider(name: str) -> Provider:
    """A provider by name ("cpu", "cuda", "dml", "webgpu").

    Raises:
        ConfigError: unknown name, or a file that is not a provider.
    """
    return _toml.load("providers", name, Provider)[1]


def check_graph(nodes: Iterable[Node], provider: str) -> list[str]:
    """What a provider has no kernel for: one line for each kind of node and reason, with the first such node's name.

    Nodes on integers only (shapes, the attention mask) may also run on the CPU, where the runtime places what a
    provider lacks; anything else there would move weights or activations between devices at every token.
    """
    here, cpu = load_provider(provider), load_provider("cpu")
    found: dict[tuple[str, str], str] = {}
    for node in nodes:
        reason = _lacks(node, here)
        if reason and not (not set(node.inputs) & set(FLOATS) and _lacks(node, cpu) is None):
            found.setdefault((node.op_type, reason), node.name)
    return [f"{op_type} ({name}): {reason}" for (op_type, reason), name in found.items()]


def read_nodes(model: Any) -> list[Node]:
    """The nodes of an `onnx_ir.Model`, whose values carry their dtypes, as `check_graph` takes them."""
    import onnx

    def own_version(op_type: str, domain: str) -> int:
        opset = model.opset_imports[domain]
        if not onnx.defs.has(op_type, opset, domain):  # one of the runtime's own: they are at version 1
            return 1
        return onnx.defs.get_schema(op_type, opset, domain).since_version

    return [
        Node(
            name=node.name or "",
            op_type=node.op_type,
            version=own_version(node.op_type, node.domain or ""),
            inputs=tuple(str(value.dtype.numpy()) if value is not None and value.name else "" for value in node.inputs),
            domain=node.domain or "",
            attributes={a.name: a.value for a in node.attributes.values() if isinstance(a.value, int | float | str)},
        )
        for node in model.graph
    ]


def codecs_for(provider: str, role: str, names: Sequence[str], tied: bool = False) -> list[str]:
    """Those of the codecs that a provider has kernels for, for a role of a model."""
    operators = load_provider(provider).operators
    used = ["GatherBlockQuantized"] if role == "embedding" else ["MatMulNBits"]
    if role == "embedding" and tied:
        used.append("MatMulNBits")
    return [n for n in names if is_float(n) or all(_holds(operators.get(op), n) for op in used)]


def _holds(kernel: Operator | None, name: str) -> bool:
    """Whether MatMulNBits or GatherBlockQuantized takes an affine codec; zero points are input 3 of both."""
    grid = codec(name)
    return (
        kernel is not None
        and "onnx" in grid.FORMATS
        and grid.bits in kernel.attributes["bits"]
        and grid.BLOCK_SIZE in kernel.attributes["block_size"]
        and (grid.signed or "uint8" in kernel.inputs[3])
    )


def _lacks(node: Node, provider: Provider) -> str | None:
    """Why a provider has no kernel for a node, or None if it has."""
    kernel = provider.operators.get(node.op_type)
    if kernel is None or kernel.domain != node.domain:
        return f"no kernel in {provider.summary}"
    if node.version not in kernel.versions:
        return f"version {node.version}, kernels are for {', '.join(map(str, kernel.versions))}"
    for n, dtype in enumerate(node.inputs):
        allowed = kernel.inputs[min(n, len(kernel.inputs) - 1)] if kernel.inputs else ()
        if dtype and dtype not in allowed:
            return f"input {n} is {dtype}, kernels take {' or '.join(allowed) or 'none'}"
    for n in kernel.required:
        if n >= len(node.inputs) or not node.inputs[n]:
            return f"input {n} is left out"
    for group in kernel.same:
        dtypes = sorted({node.inputs[n] for n in group if n < len(node.inputs) and node.inputs[n]})
        if len(dtypes) > 1:
            return f"inputs {', '.join(map(str, group))} are {' and '.join(dtypes)}, kernels take one dtype"
    for name, allowed_values in kernel.attributes.items():
        if name in node.attributes and node.attributes[name] not in allowed_values:
            return f"{name} is {node.attributes[name]}, kernels take {', '.join(map(str, allowed_values))}"
    return None
