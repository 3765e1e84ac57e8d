"""Small random Phi-3.5-MoE checkpoints in the layout and configuration style of the original one; what rounds them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _models import DTYPES, write_tokenizer, write_weights
from safetensors.torch import load_file, save_file

from phi3edge.calibrate import Rounded
from phi3edge.calibration import CalibrationText
from phi3edge.centring import Centred
from phi3edge.checkpoint import Checkpoint
from phi3edge.codecs import codec, is_float
from phi3edge.families import parse_config
from phi3edge.mixture import LlamaCppDecoder, Mixture
from phi3edge.plan import make_plan
from phi3edge.recipes import load_recipe, with_method
from phi3edge.types import QuantPlan

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB, EXPERTS = 2, 256, 512, 4, 2, 320, 6
ORIGINAL, CONTEXT, PAIRS = 256, 1024, HIDDEN // HEADS // 2
MSCALE = 1.3
RECIPES = {"gguf": "q4_0", "onnx": "int4"}
RARE = 5
"""The expert of the first layer that few tokens choose, of `write_with_rare`."""


def phimoe_config(dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    """config.json in the original style; every value that changes the function would show if it were ignored."""
    config = {
        "_name_or_path": "Phi-3.5-MoE-tiny-instruct",
        "architectures": ["PhiMoEForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_phimoe.PhiMoEConfig",
            "AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM",
        },
        "bos_token_id": 1,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_dropout": 0.0,
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "input_jitter_noise": 0.01,
        "intermediate_size": INTERMEDIATE,
        "lm_head_bias": True,
        "max_position_embeddings": CONTEXT,
        "model_type": "phimoe",
        "num_attention_heads": HEADS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "num_local_experts": EXPERTS,
        "original_max_position_embeddings": ORIGINAL,
        "output_router_logits": False,
        "rms_norm_eps": 1e-2,
        "rope_scaling": {
            "long_factor": [1.5 + 0.5 * n for n in range(PAIRS)],
            "long_mscale": MSCALE,
            "original_max_position_embeddings": ORIGINAL,
            "short_factor": [1 + 0.05 * n for n in range(PAIRS)],
            "short_mscale": MSCALE,
            "type": "longrope",
        },
        "rope_theta": 5000.0,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.01,
        "sliding_window": CONTEXT,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "transformers_version": "4.43.3",
        "use_cache": True,
        "vocab_size": VOCAB,
    }
    return config | changes


def phimoe_tensors(
    dtype: str = "float32", seed: int = 0, experts: int = EXPERTS, intermediate: int = INTERMEDIATE
) -> dict[str, torch.Tensor]:
    """Random weights under the original names; nothing has a mean of 0, so that a norm's centring shows."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return (mean + scale * torch.randn(*shape, generator=generator)).to(DTYPES[dtype])

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = normal(rows, columns, scale=columns**-0.5, mean=0.3 * columns**-0.5)
        tensors[f"{name}.bias"] = normal(rows, scale=0.2, mean=0.1)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = normal(HIDDEN, scale=0.1, mean=1.0)
        tensors[f"{name}.bias"] = normal(HIDDEN, scale=0.2, mean=0.1)

    tensors = {"model.embed_tokens.weight": normal(VOCAB, HIDDEN, mean=0.3)}
    for n in range(LAYERS):
        block = f"model.layers.{n}"
        norm(f"{block}.input_layernorm")
        for part, rows in (("q", HIDDEN), ("k", HIDDEN // HEADS * KV_HEADS), ("v", HIDDEN // HEADS * KV_HEADS)):
            linear(f"{block}.self_attn.{part}_proj", rows, HIDDEN)
        linear(f"{block}.self_attn.o_proj", HIDDEN, HIDDEN)
        norm(f"{block}.post_attention_layernorm")
        mixture = f"{block}.block_sparse_moe"
        tensors[f"{mixture}.gate.weight"] = normal(experts, HIDDEN, scale=HIDDEN**-0.5)
        for expert in range(experts):
            for part, shape in (("w1", (intermediate, HIDDEN)), ("w2", (HIDDEN, intermediate))):
                tensors[f"{mixture}.experts.{expert}.{part}.weight"] = normal(*shape, scale=shape[1] ** -0.5)
            tensors[f"{mixture}.experts.{expert}.w3.weight"] = normal(intermediate, HIDDEN, scale=HIDDEN**-0.5)
    norm("model.norm")
    linear("lm_head", VOCAB, HIDDEN)
    return tensors


def write_phimoe(folder: Path, dtype: str = "float32", shards: int = 1, seed: int = 0, **changes: Any) -> Path:
    """A complete checkpoint in a new folder: weights, config (`changes` replace its keys), tokenizer."""
    folder.mkdir(parents=True)
    config = phimoe_config(dtype, **changes)
    tensors = phimoe_tensors(dtype, seed, config["num_local_experts"], config["intermediate_size"])
    write_weights(folder, tensors, shards)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [0, 3], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_tokenizer(folder, VOCAB)
    return folder


def write_with_rare(folder: Path) -> Path:
    """A checkpoint with an expert that few tokens choose."""
    write_phimoe(folder)
    tensors = load_file(folder / "model.safetensors")
    always = tensors["model.layers.0.post_attention_layernorm.bias"]  # part of all that the router reads
    tensors["model.layers.0.block_sparse_moe.gate.weight"][RARE] = -0.1 * always
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plan_of(checkpoint: Checkpoint, format_: str, method: str = "gptq") -> QuantPlan:
    spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
    return make_plan(spec, RECIPES[format_], with_method(load_recipe(RECIPES[format_])[1], method))


def basis_of(checkpoint: Checkpoint, plan: QuantPlan, format_: str) -> Checkpoint | Centred:
    return Centred(checkpoint, plan.model) if format_ == "gguf" else checkpoint


def text_of(sequences: int, tokens: int, seed: int = 0) -> CalibrationText:
    rng = np.random.default_rng(seed)
    return CalibrationText((rng.random((sequences, tokens)) ** 2 * 320).astype(np.int64), "random tokens")


class Packed:
    """What an artifact holds, as weights: rounded by calibration, to nearest, or floats."""

    def __init__(self, source: Checkpoint | Centred, plan: QuantPlan, found: Rounded) -> None:
        self._source, self._found = source, found
        self._planned = {t.tensor.name: t for t in plan.tensors}

    def read(self, name: str) -> np.ndarray:
        planned, weight = self._planned[name], self._source.read(name)
        module = codec(planned.codec)
        packed = self._found.rows(planned, 0, len(weight) if weight.ndim == 2 else 1)
        if packed is not None:
            return module.dequantize(module.unpack(packed)).reshape(weight.shape)
        return weight if is_float(planned.codec) else module.dequantize(module.quantize(weight))


def packed_model(checkpoint: Checkpoint, plan: QuantPlan, format_: str, found: Rounded) -> Mixture:
    """An artifact in torch, computed as its runtime does."""
    weights = Packed(basis_of(checkpoint, plan, format_), plan, found)
    return Mixture(weights, plan.model, decoder=LlamaCppDecoder(plan.model) if format_ == "gguf" else None)
