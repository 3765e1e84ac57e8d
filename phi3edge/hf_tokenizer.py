"""A checkpoint's own tokenizer, as transformers reads it; Phi-3-small's made from its vocabulary of ranks.

Phi-3-small has no tokenizer.json. Its tokenizer is code of the repository around a file of OpenAI's tiktoken: the bytes
and the rank of every token. Tiktoken takes a word that is a token as it is; of another it merges the two neighbours
that make the token of the least rank, the leftmost first. A byte-level BPE tokenizer does the same whose merges are all
ways to cut a token into two others, in the order of the tokens' ranks, and that takes words of its vocabulary whole.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from phi3edge.checkpoint import RANKS
from phi3edge.errors import CheckpointError
from phi3edge.hf_config import readable_config
from phi3edge.tokenizer import LLAMA3
from phi3edge.types import JSON

SMALL = "phi3small"
SPECIAL_TOKENS = (
    "<|dummy_id_2|>",
    "<|endoftext|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|dummy_id_0|>",
    "<|dummy_id_1|>",
    "<|end|>",
    *(f"<|dummy_id_{n}|>" for n in range(3, 12)),
    "<|endofprompt|>",
    *(f"<|dummy_id_{n}|>" for n in range(12, 87)),
)
"""Phi-3-small's special tokens, whose ids follow the ranks: 100256 to 100351 (tokenization_phi3_small.py)."""

CONFIG_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "model_max_length", "padding_side")
"""What is taken from tokenizer_config.json."""


def load_hf_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer of a folder, as one of transformers; code of the repository is never run.

    Raises:
        CheckpointError: Phi-3-small's vocabulary is damaged, or of another model.
        Exception: whatever transformers raises for a folder that it cannot read.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()  # it warns of keys of LongRoPE that it reads all the same
    if _read(checkpoint, "config.json").get("model_type") != SMALL:
        return transformers.AutoTokenizer.from_pretrained(
            checkpoint, config=readable_config(checkpoint), trust_remote_code=False, local_files_only=True
        )
    if (checkpoint / "tokenizer.json").is_file():
        return transformers.PreTrainedTokenizerFast.from_pretrained(checkpoint, local_files_only=True)
    from tokenizers import Tokenizer

    vocabulary = _read(checkpoint, "config.json").get("vocab_size")
    fast = Tokenizer.from_str(json.dumps(byte_level_bpe(read_ranks(checkpoint / RANKS), vocabulary)))
    config = _read(checkpoint, "tokenizer_config.json")
    said = {key: config[key] for key in CONFIG_KEYS if config.get(key) is not None}
    named = {key: value["content"] if isinstance(value, dict) else value for key, value in said.items()}
    if (template := checkpoint / "chat_template.jinja").is_file():
        named["chat_template"] = template.read_text(encoding="utf-8")
    whole = {"bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[1], "padding_side": "left"} | named
    return transformers.PreTrainedTokenizerFast(tokenizer_object=fast, clean_up_tokenization_spaces=False, **whole)


def read_ranks(path: Path) -> list[bytes]:
    """The tokens of one of tiktoken's files, by rank: a line has a token's bytes in base64, and its rank.

    Raises:
        CheckpointError: it is not there, it is no such file, or a rank or a single byte is missing.
    """
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {int(rank): base64.b64decode(token, validate=True) for token, rank in lines}
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has neither tokenizer.json nor {path.name}", "get the file") from None
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(
            f"{path.name}: expected lines of a token in base64 and its rank: {error}", "get the file again"
        ) from None
    tokens = [ranks[rank] for rank in sorted(ranks)]
    if len(tokens) != len(lines) or sorted(ranks) != list(range(len(tokens))) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path.name}: expected every token and every rank from 0 once", "get the file again")
    if {bytes([n]) for n in range(256)} - set(tokens):
        raise CheckpointError(f"{path.name}: expected a token for every byte", "get the file again")
    return tokens


def byte_level_bpe(tokens: list[bytes], vocabulary: Any) -> JSON:
    """tokenizer.json of a vocabulary of ranks with Phi-3-small's special tokens after it; see the module's docstring.

    Args:
        tokens: by rank.
        vocabulary: rows of the model's embedding.

    Raises:
        CheckpointError: the model has another number of tokens.
    """
    if vocabulary != len(tokens) + len(SPECIAL_TOKENS):
        raise CheckpointError(
            f"{RANKS} has {len(tokens)} tokens, {len(SPECIAL_TOKENS)} special ones follow; config.json's vocab_size is"
            f" {vocabulary}",
            "the tokenizer belongs to another model",
        )
    letters, known = byte_letters(), {token: rank for rank, token in enumerate(tokens)}
    words = [token.decode("latin-1").translate(letters) for token in tokens]
    merges = []
    for rank, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = known.get(token[:cut]), known.get(token[cut:])
            if left is not None and right is not None and max(left, right) < rank:
                merges.append([words[left], words[right]])
    special = {token: len(tokens) + n for n, token in enumerate(SPECIAL_TOKENS)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags} for token, index in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {word: rank for rank, word in enumerate(words)},
            "merges": merges,
        },
    }


def byte_letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte: itself if it can be seen, else one from 256 on, in turn."""
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [n for n in range(256) if n not in seen]
    return {n: chr(n) for n in seen} | {n: chr(256 + place) for place, n in enumerate(hidden)}


def _read(folder: Path, name: str) -> JSON:
    path = folder / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
