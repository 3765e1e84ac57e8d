# ruff: noqa: RUF001
"""Phi-3-small's vocabulary of ranks as a tokenizer: the ids are those of tiktoken's own rules, also in the runtime."""

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from _small import SMALL, Small, small_config, train_ranks, write_ranks
from _tokenizers import TEXTS, corpus

from phi3edge.emitters._genai_tokenizer import tokenizer_files
from phi3edge.errors import CheckpointError
from phi3edge.families import parse_config
from phi3edge.hf_tokenizer import SPECIAL_TOKENS, read_ranks
from phi3edge.parity import STRINGS
from phi3edge.reference import load_tokenizer

CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
"""cl100k_base's words, as later versions of tiktoken write them: another expression than the one that we write."""

RANKS = 900
SPECIAL = {token: RANKS + n for n, token in enumerate(SPECIAL_TOKENS)}
WORDS = (
    "aaaa", "a", " a", "the", " the", "  ", "\n", "\r\n", "\t", "é", "你", "🙂", "123", "12345", "'s", "'RE", "==",
    "<|end|>", "<|user|>", "<|endoftext|>", "<|dummy_id_9|>", "<|", "\u00a0", "\x00", "ı", "ſ", "'ſ", "_", "=-=-",
    "\u2028", "()", " '", "İ", "\u0301", "½", "٣", ".\n\n",
)  # fmt: skip


@pytest.fixture(scope="module")
def ranks() -> list[bytes]:
    return train_ranks(RANKS)


@pytest.fixture(scope="module")
def folder(ranks: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiktoken")
    write_ranks(path, ranks)
    config = small_config(Small(vocab=RANKS + 96), bos_token_id=RANKS + 1, eos_token_id=RANKS + 1)
    (path / "config.json").write_text(json.dumps(config))
    return path


def by_rank(text: str, ranks: list[bytes]) -> list[int]:
    """Tiktoken's rules: special tokens first, then words, then the pair of the least rank, leftmost first."""
    known = {token: rank for rank, token in enumerate(ranks)}
    found: list[int] = []
    for piece in regex.split(f"({'|'.join(map(regex.escape, SPECIAL))})", text):
        if piece in SPECIAL:
            found.append(SPECIAL[piece])
            continue
        for word in regex.findall(CL100K, piece):
            whole = word.encode()
            if whole in known:
                found.append(known[whole])
                continue
            parts = [bytes([n]) for n in whole]
            while True:
                pairs = [(known[a + b], n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in known]
                if not pairs:
                    break
                _, at = min(pairs)
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            found += [known[part] for part in parts]
    return found


def texts() -> list[str]:
    choose = random.Random(3)
    mixed = ["".join(choose.choices(WORDS, k=choose.randint(1, 9))) for _ in range(1500)]
    runs = ["".join(choose.choices("ab", k=choose.randint(2, 40))) for _ in range(500)]
    return [*TEXTS, *STRINGS, *corpus()[:400], *mixed, *runs]


def test_ids_are_tiktokens(folder: Path, ranks: list[bytes]) -> None:
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (RANKS + 1, RANKS + 1, RANKS + 96)
    used: set[int] = set()
    for text in texts():
        expected = by_rank(text, ranks)
        assert tokenizer(text)["input_ids"] == expected, text
        assert tokenizer.decode(expected) == text
        used |= set(expected)
    assert len(used & set(range(256, RANKS))) > 400


def test_special_tokens_have_the_ids_of_the_original() -> None:
    ids = {token: 100256 + n for n, token in enumerate(SPECIAL_TOKENS)}
    said = {
        "<|endoftext|>": 100257,
        "<|system|>": 100261,
        "<|user|>": 100262,
        "<|assistant|>": 100263,
        "<|end|>": 100266,
    }
    said |= {"<|endofprompt|>": 100276, "<|dummy_id_3|>": 100267, "<|dummy_id_12|>": 100277, "<|dummy_id_86|>": 100351}
    assert {token: ids[token] for token in said} == said
    assert len(ids) == 96


def test_a_chat_starts_with_the_bos_token(folder: Path) -> None:
    ids = load_tokenizer(folder).apply_chat_template([{"role": "user", "content": "a"}], return_dict=False)
    assert ids[:2] == [RANKS + 1, RANKS + 6]


def test_the_runtime_reads_the_same_ids(folder: Path, ranks: list[bytes], tmp_path: Path) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    files, notes = tokenizer_files(folder, parse_config(json.loads((folder / "config.json").read_text()), None, "tiny"))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    decoder = {"session_options": {"provider_options": []}, "filename": "model.onnx", "num_hidden_layers": 1}
    sizes = {"context_length": 64, "vocab_size": RANKS + 96, "eos_token_id": [RANKS + 1]}
    config = {"model": {"type": "phi3small", **sizes, "decoder": decoder}, "search": {"max_length": 64}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    tokenizer = og.Tokenizer(og.Config(str(tmp_path)))
    strings = [text for text in texts() if "\x00" not in text]  # it takes C strings
    assert [text for text in strings if tokenizer.encode(text).tolist() != by_rank(text, ranks)] == []
    assert not notes


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("!!! 0\n", "expected lines of a token"),
        ("YQ== zero\n", "expected lines of a token"),
        ("YQ== 0\nYg== 2\n", "every rank from 0 once"),
        ("YQ== 0\nYQ== 1\n", "every rank from 0 once"),
        ("YQ== 0\n", "a token for every byte"),
    ],
)
def test_a_damaged_file_is_an_error(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "cl100k_base.tiktoken").write_text(content)
    with pytest.raises(CheckpointError, match=says):
        read_ranks(tmp_path / "cl100k_base.tiktoken")


def test_a_vocabulary_of_another_model_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small_config(SMALL)))
    with pytest.raises(CheckpointError, match="has neither tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "cl100k_base.tiktoken").write_bytes((folder / "cl100k_base.tiktoken").read_bytes())
    with pytest.raises(CheckpointError, match="has 900 tokens, 96 special ones follow"):
        load_tokenizer(tmp_path)
