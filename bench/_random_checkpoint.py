"""Checkpoints of random weights in real shapes, for measuring cost: their text is noise, their bytes are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from sentencepiece import sentencepiece_model_pb2

PHI3_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
    "attention_dropout": 0.0,
    "transformers_version": "4.40.2",
}
PHI3_MEDIUM = PHI3_MINI | {
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
}
PHI35_MOE = {
    **PHI3_MINI,
    "architectures": ["PhiMoEForCausalLM"],
    "model_type": "phimoe",
    "hidden_size": 4096,
    "intermediate_size": 6400,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.01,
    "input_jitter_noise": 0.01,
    "attention_bias": True,
    "lm_head_bias": True,
    "max_position_embeddings": 131072,
    "sliding_window": 131072,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 64,
        "long_factor": [4.0] * 64,
        "short_mscale": 1.243163121016122,
        "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096,
    },
}
MODELS = {"mini": PHI3_MINI, "medium": PHI3_MEDIUM}
"""Configurations of the 4k checkpoints: 3.8 and 14.0 billion weights."""

PIECES = 32000
CHAT_TEMPLATE = (
    "{% for m in messages %}{{'<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n'}}{% endfor %}<|assistant|>\n"
)


def shapes_name(model: str, layers: int | None = None) -> str:
    """Names a checkpoint of `write_checkpoint`."""
    return f"phi-3-{model}-shapes-{layers or MODELS[model]['num_hidden_layers']}"


def write_checkpoint(folder: Path, layers: int | None = None, seed: int = 0, model: str = "mini") -> None:
    """A bf16 checkpoint in a model's shapes with `layers` layers (None: all of them), one shard per four of them."""
    config = dict(MODELS[model])
    layers = config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    hidden, wide, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    qkv = hidden // heads * (heads + 2 * kv_heads)
    edges = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    blocks = [
        {
            f"model.layers.{n}.input_layernorm.weight": (hidden,),
            f"model.layers.{n}.self_attn.qkv_proj.weight": (qkv, hidden),
            f"model.layers.{n}.self_attn.o_proj.weight": (hidden, hidden),
            f"model.layers.{n}.post_attention_layernorm.weight": (hidden,),
            f"model.layers.{n}.mlp.gate_up_proj.weight": (2 * wide, hidden),
            f"model.layers.{n}.mlp.down_proj.weight": (hidden, wide),
        }
        for n in range(layers)
    ]
    shards = [edges] + [{k: v for block in blocks[i : i + 4] for k, v in block.items()} for i in range(0, layers, 4)]
    _write(folder, config, shards, seed)


def write_mixture(folder: Path, layers: int = 32, experts: int = 16, seed: int = 0) -> None:
    """A bf16 checkpoint in Phi-3.5-MoE's shapes with so many layers and experts, one shard for each layer."""
    config = {**PHI35_MOE, "num_hidden_layers": layers, "num_local_experts": experts}
    hidden, wide, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    values = hidden // config["num_attention_heads"] * config["num_key_value_heads"]

    def biased(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    edges = {
        "model.embed_tokens.weight": (vocab, hidden),
        **biased("model.norm", hidden),
        **biased("lm_head", vocab, hidden),
    }
    shards = [edges]
    for block in (f"model.layers.{n}" for n in range(layers)):
        shapes = biased(f"{block}.input_layernorm", hidden) | biased(f"{block}.post_attention_layernorm", hidden)
        for part, rows in (("q", hidden), ("k", values), ("v", values), ("o", hidden)):
            shapes |= biased(f"{block}.self_attn.{part}_proj", rows, hidden)
        shapes[f"{block}.block_sparse_moe.gate.weight"] = (experts, hidden)
        for name in (f"{block}.block_sparse_moe.experts.{n}" for n in range(experts)):
            shapes |= {f"{name}.w1.weight": (wide, hidden), f"{name}.w3.weight": (wide, hidden)}
            shapes[f"{name}.w2.weight"] = (hidden, wide)
        shards.append(shapes)
    _write(folder, config, shards, seed)


def _write(folder: Path, config: dict[str, object], shards: list[dict[str, tuple[int, ...]]], seed: int) -> None:
    """Configuration, tokenizer, index, and random weights of some shapes by name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [32000, 32001, 32007]}))
    _write_tokenizer(folder)
    random = np.random.default_rng(seed)
    index = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shapes, random)
        index |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], random: np.random.Generator) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for start in range(0, int(np.prod(shape)), 2**24):
                count = min(2**24, int(np.prod(shape)) - start)
                weight = (
                    np.ones(count, np.float32) if len(shape) == 1 else random.standard_normal(count, np.float32) * 0.02
                )
                file.write((weight.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def _write_tokenizer(folder: Path) -> None:
    """A SentencePiece model with Phi-3's number of pieces and its added tokens."""
    model = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    for piece, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=kinds.BYTE)
    while len(model.pieces) < PIECES:
        model.pieces.add(piece=f"▁w{len(model.pieces)}", score=-float(len(model.pieces)), type=kinds.NORMAL)
    model.trainer_spec.model_type = 2
    model.trainer_spec.vocab_size = PIECES
    model.trainer_spec.byte_fallback = True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    added = ["<|endoftext|>", "<|assistant|>", *(f"<|placeholder{i}|>" for i in range(1, 5)), "<|system|>", "<|end|>"]
    added += ["<|placeholder5|>", "<|placeholder6|>", "<|user|>"]
    decoder = {
        str(PIECES + i): {
            "content": t,
            "special": True,
            "rstrip": t != "<|endoftext|>",
            "lstrip": False,
            "normalized": False,
        }
        for i, t in enumerate(added)
    }
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": decoder,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
