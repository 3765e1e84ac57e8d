"""A folder like the one that onnxruntime-genai's model builder writes as int4 for the CPU, with random weights.

The builder needs 24 GB for Phi-3-mini; this writes the same operators, shapes, types and configuration in seconds: all
linears symmetric 4 bits in blocks of 32 with float32 scales and int8 activations, gate and up apart, a float32
embedding, no session options. Compared with onnxruntime-genai 0.18.0's own folder of 8 layers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _random_checkpoint import PHI3_MINI
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper, save

MS = "com.microsoft"
BLOCK = 32


class _Graph:
    """Nodes and initializers of a growing graph; large initializers go to the data file at once."""

    def __init__(self, data: Any) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._data, self._random = data, np.random.default_rng(0)

    def add(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **said: Any) -> None:
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], domain=domain, **said))

    def weight(self, name: str, values: np.ndarray) -> str:
        self._data.seek(-(-self._data.tell() // 4096) * 4096)
        tensor = TensorProto(
            name=name,
            dims=values.shape,
            data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        where = {"location": "model.onnx.data", "offset": self._data.tell(), "length": values.nbytes}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        values.tofile(self._data)
        self.initializers.append(tensor)
        return name

    def linear(self, x: str, rows: int, columns: int, y: str) -> str:
        blocks = columns // BLOCK
        codes = np.frombuffer(self._random.bytes(rows * columns // 2), np.uint8).reshape(rows, blocks, BLOCK // 2)
        scales = self._random.uniform(0.002, 0.004, (rows, blocks)).astype(np.float32)
        inputs = [x, self.weight(f"{y}.codes", codes), self.weight(f"{y}.scales", scales)]
        self.add("MatMulNBits", inputs, [y], MS, K=columns, N=rows, bits=4, block_size=BLOCK, accuracy_level=4)
        return y

    def norm(self, x: str, skip: str | None, y: str, width: int) -> str:
        scale = self.weight(f"{y}.scale", np.ones(width, np.float32))
        if skip is None:
            self.add("SimplifiedLayerNormalization", [x, scale], [y], axis=-1, epsilon=1e-5, stash_type=1)
        else:
            self.add("SkipSimplifiedLayerNormalization", [x, skip, scale], [y, "", "", f"{y}.sum"], MS, epsilon=1e-5)
        return y


def write_builder_twin(folder: Path, layers: int = 32) -> None:
    """Such a folder in Phi-3-mini-4k's shapes with `layers` layers; there is no tokenizer in it."""
    folder.mkdir(parents=True)
    config = {**PHI3_MINI, "num_hidden_layers": layers}
    with (folder / "model.onnx.data").open("wb") as data:
        save(_model(_Graph(data), config), folder / "model.onnx")
    (folder / "genai_config.json").write_text(json.dumps(_genai_config(config), indent=2))


def _model(graph: _Graph, config: dict[str, Any]) -> ModelProto:
    hidden, wide, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    size, positions = hidden // heads, config["max_position_embeddings"]
    cache = ["batch_size", heads, "past_sequence_length", size]
    inputs = [_value("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])]
    inputs.append(_value("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]))
    outputs = [_value("logits", TensorProto.FLOAT, ["batch_size", "sequence_length", vocabulary])]

    graph.initializers.append(numpy_helper.from_array(np.array([1]), "ones"))
    graph.initializers.append(numpy_helper.from_array(np.array(1), "one"))
    graph.add("ReduceSum", ["attention_mask", "ones"], ["tokens"], keepdims=0)
    graph.add("Sub", ["tokens", "ones"], ["tokens_less_one"])
    graph.add("Cast", ["tokens_less_one"], ["lengths"], to=TensorProto.INT32)
    graph.add("Shape", ["attention_mask"], ["mask_shape"])
    graph.add("Gather", ["mask_shape", "one"], ["mask_length"], axis=0)
    graph.add("Cast", ["mask_length"], ["total"], to=TensorProto.INT32)
    angles = np.outer(np.arange(positions), config["rope_theta"] ** -(np.arange(0, size, 2) / size))
    cos, sin = (graph.weight(f.__name__, f(angles).astype(np.float32)) for f in (np.cos, np.sin))

    random = np.random.default_rng(1)
    embedding = (random.standard_normal((vocabulary, hidden), np.float32) * 0.02).astype(np.float32)
    graph.add("Gather", [graph.weight("embedding", embedding), "input_ids"], ["embedded"])
    x, residual = graph.norm("embedded", None, "0.first_norm", hidden), "embedded"
    attention = {"num_heads": heads, "kv_num_heads": heads, "scale": 1 / math.sqrt(size), "local_window_size": -1}
    for n in range(layers):
        past, present = ([f"{when}.{n}.{part}" for part in ("key", "value")] for when in ("past_key_values", "present"))
        inputs += [_value(name, TensorProto.FLOAT, cache) for name in past]
        outputs += [_value(name, TensorProto.FLOAT, cache) for name in present]
        qkv = graph.linear(x, 3 * hidden, hidden, f"{n}.qkv")
        fed = [qkv, "", "", *past, "lengths", "total", cos, sin]
        graph.add("GroupQueryAttention", fed, [f"{n}.heads", *present], MS, do_rotary=1, softcap=0.0, **attention)
        out = graph.linear(f"{n}.heads", hidden, hidden, f"{n}.out")
        x, residual = graph.norm(residual, out, f"{n}.norm", hidden), f"{n}.norm.sum"
        gate, up = (graph.linear(x, wide, hidden, f"{n}.{name}") for name in ("gate", "up"))
        graph.add("Sigmoid", [gate], [f"{n}.sigmoid"])
        graph.add("Mul", [gate, f"{n}.sigmoid"], [f"{n}.silu"])
        graph.add("Mul", [f"{n}.silu", up], [f"{n}.wide"])
        down = graph.linear(f"{n}.wide", hidden, wide, f"{n}.down")
        x, residual = graph.norm(residual, down, f"{n + 1}.first_norm", hidden), f"{n + 1}.first_norm.sum"
    graph.linear(x, vocabulary, hidden, "logits")
    made = helper.make_graph(graph.nodes, "main_graph", inputs, outputs, graph.initializers)
    sets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
    return helper.make_model(made, opset_imports=sets, ir_version=10)


def _value(name: str, dtype: int, shape: Sequence[str | int]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _genai_config(config: dict[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": config["hidden_size"] // heads,
        "hidden_size": config["hidden_size"],
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
        "num_attention_heads": heads,
        "num_hidden_layers": config["num_hidden_layers"],
        "num_key_value_heads": heads,
    }
    model = {
        "bos_token_id": 1,
        "context_length": config["max_position_embeddings"],
        "decoder": decoder,
        "eos_token_id": [32000, 32001, 32007],
        "pad_token_id": 32000,
        "type": "phi3",
        "vocab_size": config["vocab_size"],
    }
    search = {"max_length": config["max_position_embeddings"], "past_present_share_buffer": True, "top_k": 50}
    return {"model": model, "search": search}
