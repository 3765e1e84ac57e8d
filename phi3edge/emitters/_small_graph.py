"""Phi-3-small's ONNX graph, for onnxruntime on the CPU: the checkpoint's interleaved linears are taken as they are.

onnxruntime-genai's builder wants a model of transformers, of which there is none, and cuts the fused linears. Here each
stays one weight, whose outputs are dealt out; block-sparse layers are SparseAttention, the others GroupQueryAttention.
With LongRoPE both tables of cosines and sines are one, of which the rows for the sequence's length are taken.

Sources: onnxruntime docs/ContribOperators.md, and contrib_ops/cpu/sparse for what SparseAttention checks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from phi3edge.emitters._genai_graph import Weight
from phi3edge.errors import MissingExtraError, UnsupportedError
from phi3edge.types import BlockSparse, ModelSpec, Rope

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT = "com.microsoft"
OPSETS = {"": 21, MICROSOFT: 1}
IR_VERSION = 10
BLOCKS = (16, 32, 64, 128)
"""Sizes that SparseAttention takes."""

WEIGHTS = {
    "embedding": r"model\.embed_tokens\.weight",
    "attn_norm": r"model\.layers\.(?P<layer>\d+)\.attn_norm\.weight",
    "attn_norm_bias": r"model\.layers\.(?P<layer>\d+)\.attn_norm\.bias",
    "attn_qkv": r"model\.layers\.(?P<layer>\d+)\.attn\.qkv\.weight",
    "attn_qkv_bias": r"model\.layers\.(?P<layer>\d+)\.attn\.qkv\.bias",
    "attn_output": r"model\.layers\.(?P<layer>\d+)\.attn\.out\.weight",
    "attn_output_bias": r"model\.layers\.(?P<layer>\d+)\.attn\.out\.bias",
    "ffn_norm": r"model\.layers\.(?P<layer>\d+)\.ffn_norm\.weight",
    "ffn_norm_bias": r"model\.layers\.(?P<layer>\d+)\.ffn_norm\.bias",
    "ffn_gate_up": r"model\.layers\.(?P<layer>\d+)\.mlp\.up\.weight",
    "ffn_gate_up_bias": r"model\.layers\.(?P<layer>\d+)\.mlp\.up\.bias",
    "ffn_down": r"model\.layers\.(?P<layer>\d+)\.mlp\.down\.weight",
    "ffn_down_bias": r"model\.layers\.(?P<layer>\d+)\.mlp\.down\.bias",
    "output_norm": r"model\.final_norm\.weight",
    "output_norm_bias": r"model\.final_norm\.bias",
    "head": r"lm_head\.weight",
}
"""Names of the weights of each role in this graph."""

GELU_ALPHA = 1.702
TABLES = ("cos", "sin")


def build_small_graph(spec: ModelSpec, provider: str) -> tuple[ir.Model, list[Weight]]:
    """The graph in full precision, and the weights that it lacks; see phi3edge.emitters._genai_graph.build_graph.

    Raises:
        MissingExtraError: onnx-ir or torch is not installed.
        UnsupportedError: another provider than the CPU's, or blocks of a size that the runtime does not take.
    """
    if provider != "cpu":
        raise UnsupportedError(f"{spec.name} runs on the CPU only: provider {provider} has no block-sparse attention")
    if spec.block_sparse is not None and spec.block_sparse.block not in BLOCKS:
        raise UnsupportedError(
            f"config.json: blocksparse_block_size is {spec.block_sparse.block}; ONNX Runtime's SparseAttention takes"
            f" {', '.join(map(str, BLOCKS))}"
        )
    try:
        import onnx_ir  # noqa: F401
        import torch  # noqa: F401
    except ImportError:
        raise MissingExtraError("writing ONNX Runtime GenAI folders", "onnx") from None
    graph = _Graph(spec)
    graph.build()
    return graph.model(), graph.weights


class _Graph:
    """Nodes as they are made. Values are named after what makes them; shapes are (batch, tokens, ...)."""

    def __init__(self, spec: ModelSpec) -> None:
        import onnx_ir as ir

        self._ir, self._spec = ir, spec
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self.weights: list[Weight] = []

    def model(self) -> ir.Model:
        """All of it."""
        graph = self._ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports=OPSETS,
            name="main_graph",
        )
        return self._ir.Model(graph, ir_version=IR_VERSION)

    def build(self) -> None:
        """Inputs, the embedding, every block, the head, outputs."""
        spec = self._spec
        ids = self._input("input_ids", "int64", ["batch", "tokens"])
        mask = self._input("attention_mask", "int64", ["batch", "total"])
        # GroupQueryAttention wants the last position of each sequence, SparseAttention their number, both the longest
        counts = self._node("ReduceSum", "counts", [mask, self._numbers("axis", [1])], "int64", keepdims=0)
        last = self._node("Sub", "last", [counts, self._numbers("one", [1])], "int64")
        self._counts, self._last = self._to("counts32", counts, "int32"), self._to("last32", last, "int32")
        length = self._node("Shape", "length", [mask], "int64", start=1)
        self._total = self._to("total", self._node("Squeeze", "length/scalar", [length], "int64"), "int32")
        self._angles = self._rotation(spec.rope, length)
        self._pattern = self._block_tables(spec.block_sparse) if spec.block_sparse else None

        embedding = self._weight("model.embed_tokens.weight", "embedding", None, (spec.vocab_size, spec.hidden_size))
        h = self._node("Gather", "embedded", [embedding, ids], axis=0)
        h = self._node("Mul", "embedded/scaled", [h, self._floats("embedding_scale", spec.embedding_scale)])
        for layer in range(spec.layers):
            h = self._block(layer, h)
        h = self._norm("model.final_norm", "output_norm", None, h)
        head = self._weight("lm_head.weight", "head", None, (spec.hidden_size, spec.vocab_size))
        logits = self._node("MatMul", "lm_head", [h, head])
        logits = self._node("Mul", "lm_head/scaled", [logits, self._floats("logit_scale", spec.logit_scale)])
        never = np.zeros(spec.vocab_size, np.float32)
        never[list(spec.masked_ids)] = np.finfo(np.float32).min  # beside it a logit is less than its last bit
        logits = self._node("Add", "logits", [logits, self._constant("never_predicted", never)])
        logits.shape = self._ir.Shape(["batch", "tokens", spec.vocab_size])
        self._outputs.insert(0, logits)

    def _block(self, layer: int, h: ir.Value) -> ir.Value:
        spec, name = self._spec, f"model.layers.{layer}"
        x = self._norm(f"{name}.attn_norm", "attn_norm", layer, h)
        qkv = self._linear(f"{name}.attn.qkv", "attn_qkv", layer, x, (spec.hidden_size, self._qkv_rows))
        mixed = self._attention(name, layer, qkv)
        out = self._linear(f"{name}.attn.out", "attn_output", layer, mixed, (spec.hidden_size, spec.hidden_size))
        h = self._node("Add", f"{name}.attn.residual", [h, out])
        x = self._norm(f"{name}.ffn_norm", "ffn_norm", layer, h)
        both = self._linear(f"{name}.mlp.up", "ffn_gate_up", layer, x, (spec.hidden_size, 2 * spec.intermediate_size))
        gated = self._gate(name, both)
        out = self._linear(f"{name}.mlp.down", "ffn_down", layer, gated, (spec.intermediate_size, spec.hidden_size))
        return self._node("Add", f"{name}.mlp.residual", [h, out])

    @property
    def _qkv_rows(self) -> int:
        return (self._spec.heads + 2 * self._spec.kv_heads) * self._spec.head_dim

    def _attention(self, name: str, layer: int, qkv: ir.Value) -> ir.Value:
        """Queries, keys and values by KV head are dealt out; heads keep their order."""
        spec = self._spec
        group = spec.heads // spec.kv_heads
        dealt = self._reshape(f"{name}.attn.dealt", qkv, [0, 0, spec.kv_heads, group + 2, spec.head_dim])
        parts = self._split(f"{name}.attn.split", dealt, ("q", "k", "v"), (group, 1, 1))
        q, k, v = (self._reshape(f"{name}.attn.{part}", x, [0, 0, -1]) for part, x in zip("qkv", parts, strict=True))
        shape: list[str | int] = ["batch", spec.kv_heads, "past", spec.head_dim]
        past = [self._input(f"past_key_values.{layer}.{part}", "float32", shape) for part in ("key", "value")]
        attributes: dict[str, Any] = {
            "num_heads": spec.heads,
            "kv_num_heads": spec.kv_heads,
            "scale": spec.attention_scale or spec.head_dim**-0.5,
            "do_rotary": 1,
        }
        if self._pattern is not None and spec.block_sparse and spec.block_sparse.is_sparse(layer):
            op, lengths = "SparseAttention", [*self._pattern, self._total, self._counts]
            attributes["sparse_block_size"] = spec.block_sparse.block
        else:
            op, lengths = "GroupQueryAttention", [self._last, self._total]
        mixed, *present = self._nodes_of(
            op,
            f"{name}.attn",
            [q, k, v, *past, *lengths, *self._angles],
            [f"{name}.attn.mixed", f"present.{layer}.key", f"present.{layer}.value"],
            domain=MICROSOFT,
            **attributes,
        )
        for value in present:
            value.shape = self._ir.Shape(["batch", spec.kv_heads, "kept", spec.head_dim])
        self._outputs += present
        return mixed

    def _gate(self, name: str, both: ir.Value) -> ir.Value:
        """The activation of gate and up, which lie in turn."""
        width, limit = self._spec.intermediate_size, self._spec.activation_limit
        pairs = self._reshape(f"{name}.mlp.pairs", both, [0, 0, width, 2])
        gate, up = self._split(f"{name}.mlp.split", pairs, ("gate", "up"), (1, 1))
        if limit is not None:
            least, most = self._floats("-limit", -limit), self._floats("limit", limit)
            gate = self._node("Clip", f"{name}.mlp.gate/clip", [gate, None, most])
            up = self._node("Clip", f"{name}.mlp.up/clip", [up, least, most])
        gate = self._node("QuickGelu", f"{name}.mlp.gelu", [gate], domain=MICROSOFT, alpha=GELU_ALPHA)
        up = self._node("Add", f"{name}.mlp.up/one", [up, self._floats("one_float", 1)])
        return self._reshape(f"{name}.mlp.gated", self._node("Mul", f"{name}.mlp.mul", [gate, up]), [0, 0, width])

    def _norm(self, name: str, role: str, layer: int | None, x: ir.Value) -> ir.Value:
        size = (self._spec.hidden_size,)
        gain = self._weight(f"{name}.weight", role, layer, size)
        bias = self._weight(f"{name}.bias", f"{role}_bias", layer, size)
        return self._node("LayerNormalization", name, [x, gain, bias], axis=-1, epsilon=self._spec.norm_eps)

    def _linear(self, name: str, role: str, layer: int, x: ir.Value, shape: tuple[int, int]) -> ir.Value:
        out = self._node("MatMul", f"{name}/MatMul", [x, self._weight(f"{name}.weight", role, layer, shape)])
        return self._node("Add", name, [out, self._weight(f"{name}.bias", f"{role}_bias", layer, shape[1:])])

    def _rotation(self, rope: Rope, length: ir.Value) -> list[ir.Value]:
        """Cosines and sines of all positions; with LongRoPE, those rows that are for the sequence's length."""
        spec = self._spec
        if not rope.by_length:
            tables = rotary_tables(rope, spec.context_length, False)
            return [self._constant(name, table) for name, table in zip(TABLES, tables, strict=True)]
        short = rotary_tables(rope, spec.original_context_length, False)
        long = rotary_tables(rope, spec.context_length, True)
        first = self._numbers("original_context", [spec.original_context_length])
        is_long = self._node("Greater", "rope/is_long", [length, first], "bool")
        start = self._node("Mul", "rope/start", [self._to("rope/is_long/int", is_long, "int64"), first], "int64")
        stop = self._node("Add", "rope/stop", [start, length], "int64")
        return [
            self._node(
                "Slice",
                f"rope/{name}",
                [self._constant(name, np.concatenate([near, far])), start, stop, self._numbers("rows", [0])],
            )
            for name, near, far in zip(TABLES, short, long, strict=True)
        ]

    def _block_tables(self, sparse: BlockSparse) -> list[ir.Value]:
        rows, columns = block_tables(sparse, self._spec.heads, -(-self._spec.context_length // sparse.block))
        return [self._constant("block_row_indices", rows), self._constant("block_col_indices", columns)]

    # Values and nodes

    def _value(self, name: str, dtype: str, shape: Any = None) -> ir.Value:
        ir = self._ir
        kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
        return ir.Value(name=name, shape=None if shape is None else ir.Shape(shape), type=kind)

    def _input(self, name: str, dtype: str, shape: list[str | int]) -> ir.Value:
        self._inputs.append(value := self._value(name, dtype, shape))
        return value

    def _constant(self, name: str, array: np.ndarray) -> ir.Value:
        for value in self._initializers:
            if value.name == name:
                return value
        value = self._value(name, str(array.dtype), array.shape)
        value.const_value = self._ir.tensor(array, name=name)
        self._initializers.append(value)
        return value

    def _floats(self, name: str, number: float) -> ir.Value:
        return self._constant(name, np.array(number, np.float32))

    def _numbers(self, name: str, numbers: list[int]) -> ir.Value:
        return self._constant(name, np.array(numbers, np.int64))

    def _weight(self, name: str, role: str, layer: int | None, shape: tuple[int, ...]) -> ir.Value:
        """A weight of the graph; nothing stands behind it yet."""
        value = self._value(name, "float32", shape)
        value.const_value = self._ir.ExternalTensor("", 0, 0, value.dtype, shape=value.shape, name=name)
        self._initializers.append(value)
        self.weights.append(Weight(value, role, layer, ""))
        return value

    def _node(
        self,
        op: str,
        name: str,
        inputs: list[ir.Value | None],
        dtype: str = "float32",
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        return self._nodes_of(op, name, inputs, [name], dtype, domain, **attributes)[0]

    def _nodes_of(
        self,
        op: str,
        name: str,
        inputs: list[ir.Value | None],
        outputs: list[str],
        dtype: str = "float32",
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        values = [self._value(output, dtype) for output in outputs]
        self._nodes.append(
            self._ir.node(op, inputs=inputs, attributes=attributes, outputs=values, name=name, domain=domain)
        )
        return values

    def _to(self, name: str, value: ir.Value, dtype: str) -> ir.Value:
        kind = self._ir.DataType.from_numpy(np.dtype(dtype))
        return self._node("Cast", name, [value], dtype, to=int(kind))

    def _reshape(self, name: str, value: ir.Value, shape: list[int]) -> ir.Value:
        return self._node("Reshape", name, [value, self._numbers(f"shape {shape}", shape)])

    def _split(self, name: str, value: ir.Value, parts: tuple[str, ...], sizes: tuple[int, ...]) -> list[ir.Value]:
        """Along axis 3."""
        inputs = [value, self._numbers(f"sizes {sizes}", list(sizes))]
        return self._nodes_of("Split", name, inputs, [f"{name}/{part}" for part in parts], axis=3)


def rotary_tables(rope: Rope, positions: int, is_long: bool) -> list[np.ndarray]:
    """Cosines and sines, float32 (positions, pairs of channels)."""
    from phi3edge.rotation import rotation

    return [table[:, : rope.dim // 2].contiguous().numpy() for table in rotation(rope, is_long, 0, positions)]


def block_tables(sparse: BlockSparse, heads: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of keys each block of queries sees, as SparseAttention reads it: sparse rows (CSR), heads in turn.

    Returns:
        Where each row begins, int32 (patterns, blocks + 1), and the blocks that it sees, int32 (patterns, most), filled
        with -1.
    """
    patterns = sparse.patterns if heads % sparse.patterns == 0 else heads
    queries, keys = np.arange(blocks)[:, None], np.arange(blocks)
    begins, seen = [], []
    for head in range(patterns):
        stripes = (keys + head * sparse.shift + 1) % sparse.stride == 0
        visible = (queries >= keys) & ((queries - keys < sparse.local) | stripes)
        begins.append(np.concatenate([[0], visible.sum(1).cumsum()]))
        seen.append(visible.nonzero()[1])
    most = max(map(len, seen))
    padded = [np.pad(row, (0, most - len(row)), constant_values=-1) for row in seen]
    return np.stack(begins).astype(np.int32), np.stack(padded).astype(np.int32)
