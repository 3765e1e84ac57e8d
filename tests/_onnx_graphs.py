"""Runs ONNX graphs of decoders in plain onnxruntime, without onnxruntime-genai; transformers has the right answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

MICROSOFT = "com.microsoft"


class Decoder:
    """A decoder's graph and its KV cache, on the CPU."""

    def __init__(self, model: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        size = json.loads((model.parent / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
        self.cache = {
            name: np.zeros((1, value.shape[1], 0, size), "f2" if "float16" in value.type else "f4")
            for name, value in self.inputs.items()
            if name.startswith("past")
        }

    def step(self, ids: list[int]) -> np.ndarray:
        """Logits of the next tokens, float32 (tokens, vocabulary)."""
        past = next(iter(self.cache.values())).shape[2]
        total = past + len(ids)
        known = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total)[None],
        }
        feed = {name: array for name, array in known.items() if name in self.inputs} | self.cache
        found = dict(zip(self.outputs, self.session.run(None, feed), strict=True))
        self.cache = {name: found[name.replace("past_key_values", "present")] for name in self.cache}
        return found["logits"][0].astype(np.float32)


def logits(model: Path, ids: list[int]) -> np.ndarray:
    """Logits of a prompt, float32 (tokens, vocabulary)."""
    return Decoder(model).step(ids)


def transformers_logits(checkpoint: Path, ids: list[int], weights: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """What transformers computes in float32, with some weights replaced."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    model.load_state_dict({name: torch.from_numpy(array) for name, array in (weights or {}).items()}, strict=False)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def external(model: Path) -> dict[str, tuple[str, int, int]]:
    """File, offset and length of every initializer with external data, by its name."""
    found = {}
    for tensor in onnx.load(model, load_external_data=False).graph.initializer:
        if tensor.external_data:
            entry = {e.key: e.value for e in tensor.external_data}
            found[tensor.name] = (entry["location"], int(entry["offset"]), int(entry["length"]))
    return found
