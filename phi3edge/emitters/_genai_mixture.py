"""A mixture of experts in the ONNX graph: SparseMixer from plain operators, each expert on the tokens that chose it.

onnxruntime's MoE operators have no SparseMixer on the CPU. Here the router's scores become a table of weights, (tokens,
experts), 0 where an expert is not chosen; each expert's linears are plain MatMuls (MatMulNBits, once quantized) on the
rows that its column picks. An expert that no token chose gets no rows, which costs almost nothing.

A provider that cannot pick rows (WebGPU has no NonZero) computes every expert on all tokens, and takes of each what its
column weighs: the same sums, more work. What is compared and what is summed is float32, whatever the rest is.
"""

from __future__ import annotations

from typing import Any

from phi3edge.types import Experts

OUT = -1e30
"""A score that is never the best, and whose share of a softmax is 0."""


class Mixture:
    """Makes the nodes of one layer; `builder` is onnxruntime-genai's, `picks_rows` its provider's (see Provider)."""

    def __init__(
        self, builder: Any, layer: int, experts: Experts, hidden: int, intermediate: int, picks_rows: bool
    ) -> None:
        import onnx_ir as ir

        self._builder, self._layer, self._experts, self._picks_rows = builder, layer, experts, picks_rows
        self._hidden, self._intermediate = hidden, intermediate
        self._float, self._int64, self._bool = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
        self._io = builder.io_dtype

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
        out = self._of_picked(mlp.experts, x, weights) if self._picks_rows else self._of_all(mlp.experts, x, weights)
        out = self._cast("sum", out, [None, self._hidden], self._io)
        original = self._node("Shape", "Shape", [root_input], [3], self._int64)
        return self._node("Reshape", "Reshape", [out, original], ["batch_size", "sequence_length", self._hidden])

    def _weights(self, router: Any, x: str) -> str:
        """SparseMixer, see phi3edge.mixture: float32, shape (tokens, experts)."""
        table = [None, self._experts.count]
        x = self._cast("rows", x, [None, self._hidden], self._float)
        scores = self._linear("router", router.weight, x, self._experts.count, self._float)
        size = self._node("Abs", "router/Abs", [scores], table, self._float)
        left, found = scores, []
        for n in range(self._experts.used):
            at = f"choice.{n}"
            best, chosen = self._choose(at, left)
            below = self._node("Sub", f"{at}/below", [best, scores], table, self._float)
            larger = self._node("Greater", f"{at}/larger", [size, best], table, self._bool)
            scale = self._node("Where", f"{at}/scale", [larger, size, best], table, self._float)
            share = self._node("Div", f"{at}/share", [below, scale], table, self._float)
            far = self._node(
                "Greater", f"{at}/far", [share, self._constant(2 * self._experts.jitter)], table, self._bool
            )
            near = self._node("Where", f"{at}/near", [far, self._constant(OUT), left], table, self._float)
            softmax = self._node("Softmax", f"{at}/softmax", [near], table, self._float, axis=-1)
            weight = [chosen, softmax, self._constant(0.0)]
            found.append(self._node("Where", f"{at}/weight", weight, table, self._float))
            left = self._node("Where", f"{at}/left", [chosen, self._constant(OUT), left], table, self._float)
        return self._node("Add", "weights", found, table, self._float)

    def _choose(self, at: str, left: str) -> tuple[str, str]:
        """The best score of each token, (tokens, 1), and where it is, (tokens, experts): in the first place of several.

        CUDA has no ReduceMax and no Equal of today's versions, WebGPU no comparison of 64-bit integers.
        """
        table, column, count = [None, self._experts.count], [None, 1], self._experts.count
        if self._picks_rows:
            numbers = f"/model/constants/INT64/{list(range(count))}"
            index = self._node("ArgMax", f"{at}/index", [left], column, self._int64, axis=-1, keepdims=1)
            best = self._node("GatherElements", f"{at}/best", [left, index], column, self._float, axis=-1)
            bounds = [
                self._node(op_type, f"{at}/{op_type}", [index, numbers], table, self._bool)
                for op_type in ("GreaterOrEqual", "LessOrEqual")
            ]
            return best, self._node("And", f"{at}/chosen", bounds, table, self._bool)
        numbers = f"/model/constants/FLOAT/{[float(n) for n in range(count)]}"
        axis = "/model/constants/INT64/[-1]"
        best = self._node("ReduceMax", f"{at}/best", [left, axis], column, self._float, keepdims=1)
        equal = self._node("Equal", f"{at}/equal", [left, best], table, self._bool)
        places = self._node("Where", f"{at}/places", [equal, numbers, self._constant(float(count))], table, self._float)
        first = self._node("ReduceMin", f"{at}/first", [places, axis], column, self._float, keepdims=1)
        return best, self._node("Equal", f"{at}/chosen", [numbers, first], table, self._bool)

    def _of_picked(self, experts: Any, x: str, weights: str) -> str:
        """The sum of the experts' shares, each computed for the tokens that chose it: float32, (tokens, hidden)."""
        by_expert = self._node(
            "Transpose", "weights/Transpose", [weights], [self._experts.count, None], self._float, perm=[1, 0]
        )
        shape = self._node("Shape", "rows/Shape", [x], [2], self._int64)
        out = self._node("Expand", "zeros", [self._constant(0.0), shape], [None, self._hidden], self._float)
        for expert in range(self._experts.count):
            at, number = f"experts.{expert}", f"/model/constants/INT64/{expert}"
            mine = self._node("Gather", f"{at}/weights", [by_expert, number], [None], self._float, axis=0)
            found = self._node("NonZero", f"{at}/NonZero", [mine], [1, None], self._int64)
            rows = self._node("Reshape", f"{at}/rows", [found, "/model/constants/INT64/[-1]"], [None], self._int64)
            taken = self._node("Gather", f"{at}/Gather", [x, rows], [None, self._hidden], axis=0)
            share = self._node("Gather", f"{at}/share", [mine, rows], [None], self._float, axis=0)
            turned = [share, "/model/constants/INT64/[-1, 1]"]
            column = self._node("Reshape", f"{at}/column", turned, [None, 1], self._float)
            places = self._node("Transpose", f"{at}/places", [found], [None, 1], self._int64, perm=[1, 0])
            added = [out, places, self._weighed(experts, expert, taken, column)]
            out = self._node("ScatterND", f"{at}/ScatterND", added, [None, self._hidden], self._float, reduction="add")
        return out

    def _of_all(self, experts: Any, x: str, weights: str) -> str:
        """The sum of the experts' shares, each computed for every token: float32, (tokens, hidden).

        What a token did not choose is left out, not multiplied by 0: in 16 bits it may have overflowed.
        """
        out = nothing = self._constant(0.0)
        for expert in range(self._experts.count):
            at, number = f"experts.{expert}", f"/model/constants/INT64/[{expert}]"
            column = self._node("Gather", f"{at}/weights", [weights, number], [None, 1], self._float, axis=1)
            chosen = self._node("Greater", f"{at}/chosen", [column, nothing], [None, 1], self._bool)
            shares = [chosen, self._weighed(experts, expert, x, column), nothing]
            share = self._node("Where", f"{at}/share", shares, [None, self._hidden], self._float)
            out = self._node("Add", f"{at}/Add", [share, out], [None, self._hidden], self._float)
        return out

    def _weighed(self, experts: Any, expert: int, x: str, column: str) -> str:
        """An expert's outputs for some rows, times their weights (rows, 1): float32, (rows, hidden)."""
        at, width = f"experts.{expert}", self._intermediate
        gate = self._linear(f"{at}.gate", experts.gate_up_proj[expert, :width], x, width, self._io)
        up = self._linear(f"{at}.up", experts.gate_up_proj[expert, width:], x, width, self._io)
        sigmoid = self._node("Sigmoid", f"{at}/Sigmoid", [gate], [None, width])
        silu = self._node("Mul", f"{at}/silu", [gate, sigmoid], [None, width])
        mixed = self._node("Mul", f"{at}/mixed", [silu, up], [None, width])
        down = self._linear(f"{at}.down", experts.down_proj[expert], mixed, self._hidden, self._io)
        down = self._cast(f"{at}/down", down, [None, self._hidden], self._float)
        return self._node("Mul", f"{at}/weighed", [down, column], [None, self._hidden], self._float)

    def _linear(self, name: str, weight: Any, x: str, outputs: int, dtype: Any) -> str:
        """A MatMul with a weight (outputs, inputs) that the builder promises."""
        at = f"/model/layers.{self._layer}/moe/{name}/MatMul"
        promised = at[1:].replace("/", ".") + ".weight"
        self._builder.make_initializer(weight.T, promised, to=dtype)
        return self._node("MatMul", f"{name}/MatMul", [x, promised], [None, outputs], dtype)

    def _cast(self, name: str, value: str, shape: list[Any], dtype: Any) -> str:
        """A value in another float type, or as it is where the graph computes in float32 anyway."""
        if self._io == self._float:
            return value
        return self._node("Cast", f"{name}/Cast", [value], shape, dtype, to=dtype)

    def _constant(self, value: float) -> str:
        return f"/model/constants/FLOAT/{value!r}"

    def _node(
        self, op_type: str, name: str, inputs: list[str], shape: list[Any], dtype: Any = None, **attributes: Any
    ) -> str:
        """A node whose output is of the graph's float type, or of another."""
        at = f"/model/layers.{self._layer}/moe/{name}"
        output = f"{at}/output_0"
        self._builder.make_node(op_type, inputs=inputs, outputs=[output], name=at, **attributes)
        self._builder.make_value(output, dtype or self._io, shape=shape)
        return output
