"""Small random Phi-3 checkpoints in the layout and configuration style of the original ones."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class Shape:
    """Size of a small model; the default is like mini-4k in everything but numbers: as many KV heads as heads."""

    layers: int = 2
    hidden: int = 256
    intermediate: int = 512
    heads: int = 4
    kv_heads: int = 4
    vocab: int = 320
    tied: bool = False
    dtype: str = "bfloat16"

    @property
    def q(self) -> int:
        return self.hidden

    @property
    def kv(self) -> int:
        return self.hidden // self.heads * self.kv_heads


MHA = Shape()
GROUPED = Shape(kv_heads=2)
TIED = Shape(tied=True)


def phi3_config(shape: Shape = MHA, **changes: Any) -> dict[str, Any]:
    """config.json in the original style (rope_theta, rope_scaling, torch_dtype, auto_map); `changes` replace keys."""
    config = {
        "_name_or_path": "Phi-3-tiny-4k-instruct",
        "architectures": ["Phi3ForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 512,
        "model_type": "phi3",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "original_max_position_embeddings": 512,
        "pad_token_id": 0,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 511,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": shape.dtype,
        "transformers_version": "4.40.2",
        "use_cache": True,
        "attention_bias": False,
        "vocab_size": shape.vocab,
    }
    return config | changes


def phi3_tensors(shape: Shape = MHA, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the original names: linears of about unit gain, norm gains around 1."""
    generator = torch.Generator().manual_seed(seed)

    def linear(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(DTYPES[shape.dtype])

    def norm() -> torch.Tensor:
        return (1 + 0.1 * torch.randn(shape.hidden, generator=generator)).to(DTYPES[shape.dtype])

    tensors = {EMBEDDING: linear(shape.vocab, shape.hidden)}
    for n in range(shape.layers):
        block = f"model.layers.{n}."
        tensors[block + "input_layernorm.weight"] = norm()
        tensors[block + "self_attn.qkv_proj.weight"] = linear(shape.q + 2 * shape.kv, shape.hidden)
        tensors[block + "self_attn.o_proj.weight"] = linear(shape.hidden, shape.q)
        tensors[block + "post_attention_layernorm.weight"] = norm()
        tensors[block + "mlp.gate_up_proj.weight"] = linear(2 * shape.intermediate, shape.hidden)
        tensors[block + "mlp.down_proj.weight"] = linear(shape.hidden, shape.intermediate)
    tensors[NORM] = norm()
    if not shape.tied:
        tensors[HEAD] = linear(shape.vocab, shape.hidden)
    return tensors


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """model.safetensors, or `shards` files and their index; tensors are dealt out in order."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    size = -(-len(names) // shards)
    weight_map = {}
    for n in range(shards):
        shard = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = names[n * size : (n + 1) * size]
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_tokenizer(folder: Path, vocab: int) -> None:
    """A byte-level BPE tokenizer with a chat template: 4 special tokens, the 256 bytes, a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("e", "r"), ("a", "n"), ("Ġ", "a"), ("in", "g")]
    pieces = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces[:vocab])}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def write_model(folder: Path, shape: Shape = MHA, shards: int = 1, seed: int = 0, **changes: Any) -> Path:
    """A complete checkpoint in a new folder: weights, config (`changes` replace its keys), tokenizer, model card."""
    folder.mkdir(parents=True)
    write_weights(folder, phi3_tensors(shape, seed), shards)
    (folder / "config.json").write_text(json.dumps(phi3_config(shape, **changes), indent=2))
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [0, 3], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n---\n# A small random model\n")
    write_tokenizer(folder, shape.vocab)
    return folder


def copy_model(original: Path, folder: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, folder))
