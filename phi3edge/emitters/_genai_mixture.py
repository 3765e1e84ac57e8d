"""A mixture of experts in the ONNX graph: SparseMixer from plain operators, each expert on the tokens that chose it.

onnxruntime's MoE operators have no SparseMixer on the CPU. Here the router's scores become a table of weights, (tokens,
experts), 0 where an expert is not chosen; each expert's linears are plain MatMuls (MatMulNBits, once quantized) on the
rows that its column picks. An expert that no token chose gets no rows, which costs almost nothing.
"""

from __future__ import annotations

from typing import Any

from phi3edge.types import Experts

OUT = -1e30
"""A score that is never the best, and whose share of a softmax is 0."""


class Mixture:
    """Makes the nodes of one layer; `builder` is onnxruntime-genai's."""

    def __init__(self, builder: Any, layer: int, experts: Experts, hidden: int, intermediate: int) -> None:
        import onnx_ir as ir

        self._builder, self._layer, self._experts = builder, layer, experts
        self._hidden, self._intermediate = hidden, intermediate
        self._float, self._int64, self._bool = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL

    def make(self, mlp: Any, root_input: str) -> str:
        """From the norm's output, shape (batch, sequence, hidden), to the mixture's; the output's name.

        Args:
            mlp: transformers' module, on the meta device: `router` and `experts`.
            root_input: name of the input.
        """
        x = self._node(
            "Reshape", "rows", [root_input, f"/model/constants/INT64/[-1, {self._hidden}]"], [None, self._hidden]
        )
        weights = self._weights(mlp.router, x)
        by_expert = self._node("Transpose", "weights/Transpose", [weights], [self._experts.count, None], perm=[1, 0])
        shape = self._node("Shape", "rows/Shape", [x], [2], self._int64)
        out = self._node("Expand", "zeros", [self._constant(0.0), shape], [None, self._hidden])
        for expert in range(self._experts.count):
            out = self._expert(mlp.experts, expert, x, by_expert, out)
        original = self._node("Shape", "Shape", [root_input], [3], self._int64)
        return self._node("Reshape", "Reshape", [out, original], ["batch_size", "sequence_length", self._hidden])

    def _weights(self, router: Any, x: str) -> str:
        """SparseMixer, see phi3edge.mixture: shape (tokens, experts)."""
        table, column = [None, self._experts.count], [None, 1]
        scores = self._linear("router", router.weight, x, self._experts.count)
        size = self._node("Abs", "router/Abs", [scores], table)
        left, found = scores, []
        for n in range(self._experts.used):
            at = f"choice.{n}"
            best = self._node("ReduceMax", f"{at}/best", [left, "/model/constants/INT64/[-1]"], column, keepdims=1)
            index = self._node("ArgMax", f"{at}/index", [left], column, self._int64, axis=-1, keepdims=1)
            below = self._node("Sub", f"{at}/below", [best, scores], table)
            scale = self._node("Max", f"{at}/scale", [size, best], table)
            share = self._node("Div", f"{at}/share", [below, scale], table)
            far = self._node(
                "Greater", f"{at}/far", [share, self._constant(2 * self._experts.jitter)], table, self._bool
            )
            near = self._node("Where", f"{at}/near", [far, self._constant(OUT), left], table)
            softmax = self._node("Softmax", f"{at}/softmax", [near], table, axis=-1)
            numbers = f"/model/constants/INT64/{list(range(self._experts.count))}"
            chosen = self._node("Equal", f"{at}/chosen", [index, numbers], table, self._bool)
            found.append(self._node("Where", f"{at}/weight", [chosen, softmax, self._constant(0.0)], table))
            left = self._node("Where", f"{at}/left", [chosen, self._constant(OUT), left], table)
        return self._node("Add", "weights", found, table)

    def _expert(self, experts: Any, expert: int, x: str, by_expert: str, out: str) -> str:
        """Adds one expert's share to the rows of the tokens that chose it."""
        at, width = f"experts.{expert}", self._intermediate
        mine = self._node("Gather", f"{at}/weights", [by_expert, f"/model/constants/INT64/{expert}"], [None], axis=0)
        found = self._node("NonZero", f"{at}/NonZero", [mine], [1, None], self._int64)
        rows = self._node("Reshape", f"{at}/rows", [found, "/model/constants/INT64/[-1]"], [None], self._int64)
        taken = self._node("Gather", f"{at}/Gather", [x, rows], [None, self._hidden], axis=0)
        gate = self._linear(f"{at}.gate", experts.gate_up_proj[expert, :width], taken, width)
        up = self._linear(f"{at}.up", experts.gate_up_proj[expert, width:], taken, width)
        sigmoid = self._node("Sigmoid", f"{at}/Sigmoid", [gate], [None, width])
        silu = self._node("Mul", f"{at}/silu", [gate, sigmoid], [None, width])
        mixed = self._node("Mul", f"{at}/mixed", [silu, up], [None, width])
        down = self._linear(f"{at}.down", experts.down_proj[expert], mixed, self._hidden)
        share = self._node("Gather", f"{at}/share", [mine, rows], [None], axis=0)
        column = self._node("Reshape", f"{at}/column", [share, "/model/constants/INT64/[-1, 1]"], [None, 1])
        weighed = self._node("Mul", f"{at}/weighed", [down, column], [None, self._hidden])
        places = self._node("Transpose", f"{at}/places", [found], [None, 1], self._int64, perm=[1, 0])
        return self._node("ScatterND", f"{at}/ScatterND", [out, places, weighed], [None, self._hidden], reduction="add")

    def _linear(self, name: str, weight: Any, x: str, outputs: int) -> str:
        """A MatMul with a weight (outputs, inputs) that the builder promises."""
        at = f"/model/layers.{self._layer}/moe/{name}/MatMul"
        promised = at[1:].replace("/", ".") + ".weight"
        self._builder.make_initializer(weight.T, promised, to=self._float)
        return self._node("MatMul", f"{name}/MatMul", [x, promised], [None, outputs])

    def _constant(self, value: float) -> str:
        return f"/model/constants/FLOAT/{value!r}"

    def _node(
        self, op_type: str, name: str, inputs: list[str], shape: list[Any], dtype: Any = None, **attributes: Any
    ) -> str:
        at = f"/model/layers.{self._layer}/moe/{name}"
        output = f"{at}/output_0"
        self._builder.make_node(op_type, inputs=inputs, outputs=[output], name=at, **attributes)
        self._builder.make_value(output, dtype or self._float, shape=shape)
        return output
