"""Small random checkpoints as AutoAWQ and GPTQModel write them, packed by loops over their published layouts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _models import Shape, phi3_config, phi3_tensors, write_tokenizer, write_weights
from safetensors.torch import load_file, save_file

AWQ = {
    "bits": 4,
    "group_size": 64,
    "modules_to_not_convert": None,
    "quant_method": "awq",
    "version": "gemm",
    "zero_point": True,
}
"""quantization_config as AutoAWQ 0.2 writes it."""

GPTQ = {
    "bits": 4,
    "group_size": 64,
    "damp_percent": 0.1,
    "desc_act": False,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": None,
    "is_marlin_format": False,
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
}
"""quantization_config as AutoGPTQ 0.7 writes it."""

GPTQ_V2 = {
    "bits": 4,
    "group_size": 64,
    "desc_act": False,
    "sym": False,
    "lm_head": False,
    "quant_method": "gptq",
    "checkpoint_format": "gptq_v2",
    "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:2.2.0"], "damp_percent": 0.05, "mse": 0.0},
}
"""quantization_config as GPTQModel 2 writes it."""


HALF = Shape(dtype="float16")


def pack_words(codes: np.ndarray, bits: int, order: tuple[int, ...]) -> np.ndarray:
    """The last axis of codes, in words of 32/bits: field i of a word is its code order[i]."""
    per_word = 32 // bits
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // per_word), np.uint32)
    for word in range(words.shape[-1]):
        for i in range(per_word):
            words[..., word] |= codes[..., word * per_word + order[i]].astype(np.uint32) << np.uint32(bits * i)
    return words.view(np.int32)


def pack(said: dict[str, Any], linear: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """qweight, qzeros, scales and g_idx of a linear.

    Args:
        said: a quantization_config.
        linear: codes (outputs, inputs), zero_points and scales (outputs, groups), g_idx (inputs,).
    """
    bits = said["bits"]
    plain = tuple(range(32 // bits))
    zero_points = linear["zero_points"].T
    if said["quant_method"] == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        parts = {
            "qweight": pack_words(linear["codes"].T, bits, order),
            "qzeros": pack_words(zero_points, bits, order),
        }
    else:
        stored = zero_points.astype(np.int64) - (said["checkpoint_format"] == "gptq")
        parts = {
            "qweight": np.ascontiguousarray(pack_words(linear["codes"], bits, plain).T),
            "qzeros": pack_words((stored % 2**bits).astype(np.uint8), bits, plain),
            "g_idx": linear["g_idx"].astype(np.int32),
        }
    parts["scales"] = np.ascontiguousarray(linear["scales"].T.astype(np.float16))
    return {suffix: torch.from_numpy(np.ascontiguousarray(part)) for suffix, part in parts.items()}


def random_linear(
    said: dict[str, Any], outputs: int, inputs: int, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Codes, scales (float16, of about unit gain), zero points and groups of a linear."""
    top = 2 ** said["bits"]
    group = inputs if said["group_size"] == -1 else said["group_size"]
    symmetric = said.get("sym", not said.get("zero_point"))
    blocks = (outputs, inputs // group)
    low = 0 if said["quant_method"] == "awq" or said["checkpoint_format"] == "gptq_v2" else 1
    scales = (generator.uniform(2, 6, blocks) / top / inputs**0.5).astype(np.float16)
    middle = generator.integers(max(low, top // 4), 3 * top // 4, blocks, np.uint8, endpoint=True)
    middle.flat[:2] = (low, top - 1)
    return {
        "codes": generator.integers(0, top, (outputs, inputs), np.uint8),
        "scales": scales,
        "zero_points": np.full(blocks, top // 2, np.uint8) if symmetric else middle,
        "g_idx": np.arange(inputs, dtype=np.int32) // group,
    }


def dequantized(linear: dict[str, np.ndarray]) -> np.ndarray:
    """The weights by their definition, float64, input by input."""
    groups = linear["g_idx"]
    zero_points = linear["zero_points"].astype(np.float64)[:, groups]
    return linear["scales"].astype(np.float64)[:, groups] * (linear["codes"] - zero_points)


def write_prequantized(
    folder: Path, said: dict[str, Any], shape: Shape = HALF, shards: int = 1, modules: tuple[str, ...] = ("_proj",)
) -> dict[str, dict[str, np.ndarray]]:
    """A complete checkpoint in a new folder, integers where a module's name ends so; returns those linears by name."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    linears, tensors = {}, {}
    for name, tensor in phi3_tensors(shape).items():
        module = name.removesuffix(".weight")
        if module.endswith(modules):
            linears[module] = random_linear(said, *tensor.shape, generator)
            tensors |= {f"{module}.{part}": value for part, value in pack(said, linears[module]).items()}
        else:
            tensors[name] = tensor
    write_weights(folder, tensors, shards)
    config = phi3_config(shape, quantization_config=said)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    write_tokenizer(folder, shape.vocab)
    return linears


def change_tensors(folder: Path, **changes: Any) -> None:
    """Replaces tensors of a checkpoint of one file, by functions of the old one (None if there is none) or by None."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, change in changes.items():
        changed = change(tensors.pop(name, None))
        if changed is not None:
            tensors[name] = changed
    save_file(tensors, path)
