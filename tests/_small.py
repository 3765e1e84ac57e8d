"""Small random Phi-3-small checkpoints in the layout and configuration style of the original ones."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _models import DTYPES, write_tokenizer, write_weights
from _tokenizers import corpus
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from phi3edge.hf_tokenizer import byte_letters
from phi3edge.tokenizer import LLAMA3


@dataclass(frozen=True)
class Small:
    """Size of a model; the default has what the original has, in other numbers: three queries to a KV head."""

    layers: int = 3
    hidden: int = 192
    intermediate: int = 160
    heads: int = 6
    kv_heads: int = 2
    vocab: int = 320
    tied: bool = True
    dtype: str = "bfloat16"

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def qkv(self) -> int:
        return self.hidden + 2 * self.kv_heads * self.head_dim


SMALL = Small()
NARROW = Small(layers=2, hidden=32, intermediate=32, heads=2, kv_heads=1, dtype="float32")
ORIGINAL_PATTERN = {"blocksparse_block_size": 64, "blocksparse_num_local_blocks": 16, "blocksparse_vert_stride": 8}
ORIGINAL, CONTEXT = 256, 1024
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def small_config(shape: Small = SMALL, **changes: Any) -> dict[str, Any]:
    """config.json in the original style; no number is the original's, so that none can be ignored unseen."""
    config = {
        "_name_or_path": "Phi-3-tiny-small",
        "architectures": ["Phi3SmallForCausalLM"],
        "attention_dropout_prob": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_phi3_small.Phi3SmallConfig",
            "AutoModelForCausalLM": "modeling_phi3_small.Phi3SmallForCausalLM",
            "AutoTokenizer": "tokenization_phi3_small.Phi3SmallTokenizer",
        },
        "blocksparse_block_size": 16,
        "blocksparse_homo_head_pattern": False,
        "blocksparse_num_local_blocks": 2,
        "blocksparse_triton_kernel_block_size": 64,
        "blocksparse_vert_stride": 3,
        "bos_token_id": 0,
        "dense_attention_every_n_layers": 2,
        "dummy_token_indices": [300, 301, 319],
        "embedding_dropout_prob": 0.1,
        "eos_token_id": 0,
        "ff_dim_multiplier": None,
        "ff_intermediate_size": shape.intermediate,
        "ffn_dropout_prob": 0.1,
        "gegelu_limit": 1.5,
        "gegelu_pad_to_256": True,
        "hidden_act": "gegelu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-2,
        "max_position_embeddings": CONTEXT,
        "model_type": "phi3small",
        "mup_attn_multiplier": 3.0,
        "mup_embedding_multiplier": 7.0,
        "mup_use_scaling": True,
        "mup_width_multiplier": 2.5,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_sequence_to_multiple_of_64": True,
        "reorder_and_upcast_attn": False,
        "rope_embedding_base": 5000,
        "rope_position_scale": 1.0,
        "torch_dtype": shape.dtype,
        "transformers_version": "4.38.1",
        "use_cache": True,
        "attention_bias": False,
        "vocab_size": shape.vocab,
    }
    if not shape.tied:
        config["tie_word_embeddings"] = False
    return config | changes


def longrope(pairs: int = SMALL.head_dim // 2, **changes: Any) -> dict[str, Any]:
    """config.json's keys of the 128k model; every factor is its own."""
    scaling = {
        "type": "su",
        "short_factor": [1 + 0.05 * n for n in range(pairs)],
        "long_factor": [1.5 + 0.5 * n for n in range(pairs)],
        "short_mscale": 1.1,
        "long_mscale": 1.3,
    }
    return {"original_max_position_embeddings": ORIGINAL, "rope_scaling": scaling | changes}


def small_tensors(shape: Small = SMALL, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the original names: linears of about unit gain, biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[shape.dtype]

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    tensors = {"model.embed_tokens.weight": (random(shape.vocab, shape.hidden) / shape.hidden**0.5).to(dtype)}

    def linear(name: str, rows: int, columns: int) -> None:
        tensors[f"{name}.weight"] = (random(rows, columns) / columns**0.5).to(dtype)
        tensors[f"{name}.bias"] = (0.2 * random(rows)).to(dtype)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = (1 + 0.1 * random(shape.hidden)).to(dtype)
        tensors[f"{name}.bias"] = (0.1 * random(shape.hidden)).to(dtype)

    for n in range(shape.layers):
        block = f"model.layers.{n}"
        norm(f"{block}.input_layernorm")
        linear(f"{block}.self_attn.query_key_value", shape.qkv, shape.hidden)
        linear(f"{block}.self_attn.dense", shape.hidden, shape.hidden)
        norm(f"{block}.post_attention_layernorm")
        linear(f"{block}.mlp.up_proj", 2 * shape.intermediate, shape.hidden)
        linear(f"{block}.mlp.down_proj", shape.hidden, shape.intermediate)
    norm("model.final_layernorm")
    if not shape.tied:
        tensors["lm_head.weight"] = (random(shape.vocab, shape.hidden) / shape.hidden**0.5).to(dtype)
    return tensors


def write_small(folder: Path, shape: Small = SMALL, seed: int = 0, **changes: Any) -> Path:
    """A complete checkpoint in a new folder; its tokenizer is a small byte-level one in tokenizer.json."""
    folder.mkdir(parents=True)
    write_weights(folder, small_tensors(shape, seed))
    (folder / "config.json").write_text(json.dumps(small_config(shape, **changes), indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [0, 3]}))
    write_tokenizer(folder, shape.vocab)
    return folder


def train_ranks(count: int) -> list[bytes]:
    """A small vocabulary of ranks, trained on code and on runs of one character, where the order of merges shows."""
    trained = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    runs = ["a" * n for n in range(2, 30)] + ["ab" * n + "a" for n in range(2, 20)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=count, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([*corpus(), *runs * 20], trainer)
    byte = {letter: n for n, letter in byte_letters().items()}
    vocabulary = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    assert len(vocabulary) == count
    return [bytes(byte[letter] for letter in token) for token, _ in vocabulary]


def write_ranks(folder: Path, ranks: list[bytes]) -> None:
    """The tokenizer as the original checkpoints have it: a file of ranks, and a class that only their code has."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)]
    (folder / "cl100k_base.tiktoken").write_text("".join(lines))
    config = {
        "auto_map": {"AutoTokenizer": ["tokenization_phi3_small.Phi3SmallTokenizer", None]},
        "bos_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
        "eos_token": "<|endoftext|>",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Phi3SmallTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
