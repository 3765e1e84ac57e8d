# ruff: noqa: RUF001
"""Small tokenizers of the kinds that phi3edge reads, with Phi-3's added tokens and flags."""

import argparse
import inspect
import io
import json
import logging
import textwrap
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken as Added
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

PIECES = 700
"""Size of the trained vocabulary; the added tokens follow."""

ADDED = (
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|system|>",
    "<|end|>",
    "<|user|>",
)
ENDOFTEXT, ASSISTANT, END, USER = PIECES, PIECES + 1, PIECES + 4, PIECES + 5
TEMPLATE = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CHAT = "<|user|>\nHello there<|end|>\n<|assistant|>\n"

TEXTS = (
    "Hello there",
    CHAT,
    "<|system|>\nYou parse arguments.<|end|>\n<|user|>\n  What?  <|end|>\n<|assistant|>\nAll.<|end|>\n",
    "<|endoftext|> after <|end|>\n\n after",
    " leading space",
    "   three, and trailing   ",
    "runs  of   spaces    of     many      lengths                    and tabs\t\t\there",
    "def f(x):\n    return {'a': x ** 2}  # comment\n\n\nclass A:\n\tpass\n",
    "1234567890 3.14159 1e-9 0x1F 2,000,000",
    "naïve café, “quotes” – dashes … ½ ﬁ",
    "你好，世界。こんにちは Привет नमस्ते مرحبا",
    "😀 👩‍👩‍👧 🏳️‍🌈 \u200b zero width \u00a0 hard space",
    "It's we'll THEY'RE I'd 'quoted'",
    "<not a token> < s> <0x41> </s|>",
    "\n",
    " ",
    "",
    "x" * 50 + "antidisestablishmentarianism" + "=" * 30,
)


def corpus() -> list[str]:
    """Text to train on: sources that ship with Python, and characters that they lack."""
    text = "".join(inspect.getsource(module) for module in (argparse, textwrap, logging))
    return [*text.splitlines(), "你好 世界 naïve café Привет"] * 2


def write_sentencepiece(folder: Path, *, model: bool = True, fast: bool = True, rstrip: bool = True) -> None:
    """A Phi-3-like SentencePiece vocabulary: tokenizer.model, tokenizer.json or both, and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=trained,
        model_type="bpe",
        vocab_size=PIECES,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_by_unicode_script=False,
        split_digits=True,
        minloglevel=2,
        num_threads=1,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    added = [(n, token) for n, token in enumerate(["<unk>", "<s>", "</s>"])]
    added += [(PIECES + n, token) for n, token in enumerate(ADDED)]
    plain = {"lstrip": False, "normalized": False, "single_word": False}
    entries = {
        n: {
            "content": token,
            **plain,
            "rstrip": rstrip and token not in ("<unk>", "<s>", "<|endoftext|>"),
            "special": token != "</s>",
        }
        for n, token in added
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(n): entry for n, entry in entries.items()},
        "bos_token": "<s>",
        "chat_template": TEMPLATE,
        "eos_token": "<|endoftext|>",
        "legacy": False,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if model:
        (folder / "tokenizer.model").write_bytes(trained.getvalue())
    if fast:
        (folder / "tokenizer.json").write_text(_to_fast(processor, entries), encoding="utf-8")


def _to_fast(processor: sentencepiece.SentencePieceProcessor, entries: dict[int, dict[str, Any]]) -> str:
    """tokenizer.json as transformers converts a SentencePiece BPE model: every way to make a piece is a merge."""
    vocab = {processor.id_to_piece(n): n for n in range(processor.get_piece_size())}
    merges = []
    for piece, n in vocab.items():
        if processor.is_byte(n) or processor.is_control(n) or processor.is_unknown(n):
            continue
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        ways = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        merges += [(processor.get_score(n), *pair) for pair in sorted(ways, key=lambda p: (vocab[p[0]], vocab[p[1]]))]
    merges.sort(key=lambda merge: -merge[0])
    fast = Tokenizer(
        models.BPE(vocab, [merge[1:] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B:1", [("<s>", 1)])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    content = json.loads(fast.to_str())
    content["added_tokens"] = [{"id": n, **entry} for n, entry in entries.items()]
    return json.dumps(content, ensure_ascii=False)


def write_byte_level(folder: Path, steps: list[pre_tokenizers.PreTokenizer], *, ignore_merges: bool = False) -> None:
    """A byte-level BPE tokenizer.json with the given pre-tokenizer, and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES,
        special_tokens=[Added(token, special=True, normalized=False) for token in ADDED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(corpus(), trainer)
    content = json.loads(fast.to_str())
    content["model"]["ignore_merges"] = ignore_merges
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = {
        "bos_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
        "eos_token": "<|end|>",
        "tokenizer_class": "GPT2Tokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
