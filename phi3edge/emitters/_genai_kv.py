"""An 8-bit KV cache in a graph of onnxruntime-genai's builder: GroupQueryAttention rounds what it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from phi3edge.types import KVScales

if TYPE_CHECKING:
    import onnx_ir as ir

PAST_KEY, PAST_VALUE, KEY_SCALE, VALUE_SCALE = 3, 4, 12, 13
"""Inputs of GroupQueryAttention; outputs 1 and 2 are the new cache. Source: onnxruntime docs/ContribOperators.md."""

PER_CHANNEL = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}


def quantize_kv_cache(model: ir.Model, scales: KVScales) -> None:
    """Makes every attention keep keys and values as int8, a scale a channel.

    Args:
        model: its GroupQueryAttention nodes stand in the order of the layers.
        scales: of as many layers.
    """
    import onnx_ir as ir

    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    for layer, (node, keys, values) in enumerate(zip(attentions, scales.keys, scales.values, strict=True)):
        node.resize_inputs(VALUE_SCALE + 1)
        for name, index, numbers in (("k_scale", KEY_SCALE, keys), ("v_scale", VALUE_SCALE, values)):
            node.replace_input_with(index, _initializer(model, f"model.layers.{layer}.attn.{name}", numbers))
        for cached in (node.inputs[PAST_KEY], node.inputs[PAST_VALUE], *node.outputs[1:3]):
            assert cached is not None
            cached.dtype = ir.DataType.INT8
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        for key, kind in PER_CHANNEL.items():
            node.attributes[key] = ir.AttrString(key, kind)


def _initializer(model: ir.Model, name: str, scales: np.ndarray) -> ir.Value:
    """A weight of the graph: scales (KV heads, head size) in the shape of one position of the cache."""
    import onnx_ir as ir

    heads, size = scales.shape
    tensor = ir.tensor(np.ascontiguousarray(scales, np.float32).reshape(1, heads, 1, size), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value
