"""A quantized model of 0.2 MB with random weights and no tokenizer: enough to see whether the runtime computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from phi3edge.genai_folder import CONFIG

VOCABULARY = 64
_HIDDEN, _HEADS, _BLOCK, _CONTEXT = 256, 4, 32, 128
_HEAD = _HIDDEN // _HEADS


def write(folder: Path) -> None:
    """Writes the folder: one attention layer between an embedding and a head, with the operators of real exports."""
    weights = [
        numpy_helper.from_array(np.random.default_rng(0).standard_normal((VOCABULARY, _HIDDEN)).astype("f4"), "embed"),
        numpy_helper.from_array(np.ones(_HIDDEN, np.float32), "gain"),
        numpy_helper.from_array(np.ones(1, np.int64), "one"),
        *_rotations(),
    ]
    nodes = [
        helper.make_node("Gather", ["embed", "input_ids"], ["hidden"]),
        helper.make_node("SimplifiedLayerNormalization", ["hidden", "gain"], ["normed"], epsilon=1e-5),
        _matmul("qkv", "normed", 3 * _HIDDEN, weights),
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["lengths"], keepdims=0),
        helper.make_node("Sub", ["lengths", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["last32"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["total"], start=1),
        helper.make_node("Cast", ["total"], ["total32"], to=TensorProto.INT32),
        helper.make_node(
            "GroupQueryAttention",
            ["qkv", "", "", _past("key"), _past("value"), "last32", "total32", "cos", "sin"],
            ["attended", "present.0.key", "present.0.value"],
            domain="com.microsoft",
            num_heads=_HEADS,
            kv_num_heads=_HEADS,
            do_rotary=1,
        ),
        _matmul("logits", "attended", VOCABULARY, weights),
    ]
    inputs = [_ids("input_ids"), _ids("attention_mask"), *(_cache(_past(kind)) for kind in ("key", "value"))]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", VOCABULARY]),
        *(_cache(f"present.0.{kind}") for kind in ("key", "value")),
    ]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    (folder / CONFIG).write_text(json.dumps(_config()), encoding="utf-8")


def _matmul(name: str, source: str, rows: int, weights: list[TensorProto]) -> onnx.NodeProto:
    """A linear of random symmetric 4-bit codes in blocks; its weights are added to `weights`."""
    blocks = _HIDDEN // _BLOCK
    codes = np.random.default_rng(rows).integers(0, 256, (rows, blocks, _BLOCK // 2), np.uint8)
    weights.append(numpy_helper.from_array(codes, f"{name}.codes"))
    weights.append(numpy_helper.from_array(np.full((rows, blocks), 0.01, np.float32), f"{name}.scales"))
    size = {"K": _HIDDEN, "N": rows, "bits": 4, "block_size": _BLOCK, "accuracy_level": 4}
    inputs = [source, f"{name}.codes", f"{name}.scales"]
    return helper.make_node("MatMulNBits", inputs, [name], domain="com.microsoft", **size)


def _rotations() -> list[TensorProto]:
    angles = np.outer(np.arange(_CONTEXT), 10000.0 ** (-np.arange(_HEAD // 2) / (_HEAD // 2)))
    return [numpy_helper.from_array(f(angles).astype(np.float32), f.__name__) for f in (np.cos, np.sin)]


def _past(kind: str) -> str:
    return f"past_key_values.0.{kind}"


def _ids(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", f"{name}_length"])


def _cache(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", _HEADS, f"{name}_length", _HEAD])


def _config() -> dict[str, object]:
    decoder = {
        "filename": "model.onnx",
        "head_size": _HEAD,
        "hidden_size": _HIDDEN,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS,
        "num_hidden_layers": 1,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "session_options": {"provider_options": []},
    }
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = {"type": "phi3", "vocab_size": VOCABULARY, "context_length": _CONTEXT, "decoder": decoder, **ids}
    return {"model": model, "search": {"past_present_share_buffer": True, "max_length": _CONTEXT}}
