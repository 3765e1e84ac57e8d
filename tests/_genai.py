"""ONNX Runtime GenAI folders of small checkpoints: what a runtime is tested with, without our own emitter."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

MICROSOFT = "com.microsoft"


class Graph:
    """Nodes and weights of a model as they come; every node has one output, which is named after it."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []

    def weight(self, name: str, value: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op: str, name: str, *inputs: str, more: tuple[str, ...] = (), domain: str = "", **attributes) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name, *more], domain=domain, **attributes))
        return name


def write_genai(checkpoint: Path, folder: Path, *, dtype: type = np.float32, eos: tuple[int, ...] = (0, 3)) -> Path:
    """The checkpoint as a folder with external data; `dtype` is that of weights, logits and KV cache."""
    folder.mkdir(parents=True)
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = {
        name: tensor.float().numpy().astype(dtype)
        for name, tensor in load_file(checkpoint / "model.safetensors").items()
    }
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = _decoder(config, tensors, head_dim)
    cache = ["batch", config["num_key_value_heads"], "length", head_dim]
    layers = range(config["num_hidden_layers"])
    pasts = [f"past_key_values.{n}.{part}" for n in layers for part in ("key", "value")]
    presents = [f"present.{n}.{part}" for n in layers for part in ("key", "value")]
    value = helper.make_tensor_value_info
    ids = [value(name, TensorProto.INT64, ["batch", name]) for name in ("input_ids", "attention_mask")]
    inputs = [*ids, *(value(name, kind, cache) for name in pasts)]
    outputs = [
        value("logits", kind, ["batch", "length", config["vocab_size"]]),
        *(value(n, kind, cache) for n in presents),
    ]
    made = helper.make_graph(graph.nodes, "decoder", inputs, outputs, graph.weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=10)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1000)
    (folder / "genai_config.json").write_text(json.dumps(_config(config, head_dim, eos), indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder)
    return folder


def _decoder(config: dict, tensors: dict[str, np.ndarray], head_dim: int) -> Graph:
    g = Graph()

    def linear(name: str, source: str) -> str:
        return g.node("MatMul", name, source, g.weight(f"{name}.weight", tensors[f"{name}.weight"].T))

    def norm(name: str, source: str) -> str:
        weight = g.weight(f"{name}.weight", tensors[f"{name}.weight"])
        return g.node("SimplifiedLayerNormalization", name, source, weight, epsilon=config["rms_norm_eps"])

    angles = np.outer(
        np.arange(config["max_position_embeddings"]), config["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    )
    dtype = tensors["model.norm.weight"].dtype
    rotations = [g.weight("cos", np.cos(angles).astype(dtype)), g.weight("sin", np.sin(angles).astype(dtype))]
    one = g.weight("one", np.ones(1, np.int64))
    last = g.node("Sub", "last", g.node("ReduceSum", "count", "attention_mask", one, keepdims=0), one)
    last = g.node("Cast", "last32", last, to=TensorProto.INT32)
    total = g.node("Squeeze", "total", g.node("Shape", "lengths", "attention_mask", start=1))
    total = g.node("Cast", "total32", total, to=TensorProto.INT32)
    hidden = g.node("Gather", "embedded", g.weight("embed", tensors["model.embed_tokens.weight"]), "input_ids")
    for n in range(config["num_hidden_layers"]):
        block, past = f"model.layers.{n}", f"past_key_values.{n}"
        attended = g.node(
            "GroupQueryAttention",
            f"{block}.attention",
            linear(f"{block}.self_attn.qkv_proj", norm(f"{block}.input_layernorm", hidden)),
            *("", "", f"{past}.key", f"{past}.value", last, total, *rotations),
            more=(f"present.{n}.key", f"present.{n}.value"),
            domain=MICROSOFT,
            num_heads=config["num_attention_heads"],
            kv_num_heads=config["num_key_value_heads"],
            do_rotary=1,
        )
        hidden = g.node("Add", f"{block}.after", hidden, linear(f"{block}.self_attn.o_proj", attended))
        both = linear(f"{block}.mlp.gate_up_proj", norm(f"{block}.post_attention_layernorm", hidden))
        gate = g.node("Split", f"{block}.gate", both, more=(f"{block}.up",), axis=-1, num_outputs=2)
        silu = g.node("Mul", f"{block}.silu", gate, g.node("Sigmoid", f"{block}.sigmoid", gate))
        inner = g.node("Mul", f"{block}.inner", silu, f"{block}.up")
        hidden = g.node("Add", f"{block}.out", hidden, linear(f"{block}.mlp.down_proj", inner))
    head = g.weight("head", tensors["lm_head.weight"].T)
    g.node("MatMul", "logits", norm("model.norm", hidden), head)
    return g


def _config(config: dict, head_dim: int, eos: tuple[int, ...]) -> dict:
    names = {"key_names": "%d.key", "value_names": "%d.value"}
    decoder = {
        "filename": "model.onnx",
        "head_size": head_dim,
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "num_hidden_layers": config["num_hidden_layers"],
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            **{f"past_{key}": f"past_key_values.{name}" for key, name in names.items()},
        },
        "outputs": {"logits": "logits", **{f"present_{key}": f"present.{name}" for key, name in names.items()}},
        "session_options": {"provider_options": []},
    }
    model = {
        "type": "phi3",
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "bos_token_id": 0,
        "eos_token_id": list(eos),
        "pad_token_id": 0,
        "decoder": decoder,
    }
    return {"model": model, "search": {"max_length": 256, "past_present_share_buffer": True}}
