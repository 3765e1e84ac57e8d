"""The tokenizer files of an ONNX Runtime GenAI folder, which give the reference's token ids in its runtime.

The reference is what transformers makes of the checkpoint: its tokenizer is written as tokenizer.json, whatever files
it came from. The runtime's tokenizer (onnxruntime-extensions) reads only part of that file and guesses the rest, so the
same tokenizer is written in the form that it reads as it is meant:

* Merges are pairs: it loses a carriage return in merges written as one string.
* SentencePiece BPE: it splits words as Llama 3 does before it merges, unless the tokenizer is named Gemma's.
  tokenizer_module.json, which it lays over tokenizer_config.json and nobody else reads, says so. It puts a space in
  front of a text where the decoder strips one.
* Byte-level BPE: it knows only steps that are regular expressions, and of those only the ones that it has code for.
* What it adds to a text is what tokenizer_config.json says, and what it finds in the post-processor.

tokenizer_config.json is written anew, with what both read; code that a checkpoint names (auto_map) is not among it.
A text ends at its first zero byte for the runtime: it takes C strings.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi3edge.checkpoint import TOKENIZER_FILES, inside
from phi3edge.emitters._genai_template import runtime_template
from phi3edge.errors import CheckpointError, MissingExtraError, Phi3EdgeError, UnsupportedError
from phi3edge.hf_tokenizer import load_hf_tokenizer
from phi3edge.tokenizer import BYTES, GPT4O, LLAMA3, QWEN2, SPACE
from phi3edge.types import JSON, ModelSpec

RUNTIME = "ONNX Runtime GenAI"
MAX_FILE_BYTES = 128 << 20
"""Of a tokenizer file; the largest vocabularies in use make about 35 MB."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
PATTERNS = (GPT2, DIGIT, LLAMA3, QWEN2, GPT4O)
"""Regular expressions that the runtime has code for; others go to a library that does not know character classes."""

IN_UTF8 = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_files(checkpoint: Path, spec: ModelSpec) -> tuple[dict[str, bytes], list[str]]:
    """The files by name, and notes: one line for everything that the runtime does otherwise.

    Args:
        checkpoint: folder with tokenizer.json or tokenizer.model, and tokenizer_config.json if there is one.
        spec: gives the size of the vocabulary.

    Raises:
        CheckpointError: files that are missing, damaged, too large or outside the folder, or of another model.
        UnsupportedError: a tokenizer that the runtime would read as another one.
        MissingExtraError: transformers is not installed.
    """
    for name in TOKENIZER_FILES:
        if inside(checkpoint, name).is_file() and (size := (checkpoint / name).stat().st_size) > MAX_FILE_BYTES:
            raise CheckpointError(f"{name} has {size} bytes; a tokenizer has at most {MAX_FILE_BYTES}")
    reference = _load_reference(checkpoint)
    fast = json.loads(reference.backend_tokenizer.to_str())
    _check_ids(fast, spec)
    notes: list[str] = []
    config = _config(reference, notes)
    config |= _added_to_texts(reference, fast, notes)
    files = {"tokenizer.json": fast, "tokenizer_config.json": config}
    fast["truncation"] = fast["padding"] = None
    fast["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in fast["model"]["merges"]]
    if any(step["type"] == "ByteLevel" for step in _steps(fast["pre_tokenizer"])):
        _rewrite_byte_level(fast, reference, notes)
    else:
        _rewrite_sentencepiece(fast, "chat_template" in config, notes)
        files["tokenizer_module.json"] = {"tokenizer_class": "GemmaTokenizer"}
        if config["add_eos_token"]:
            notes.append(f"{RUNTIME} adds nothing after a text; the tokenizer does")
    _note_flags(fast, notes)
    try:
        return {name: json.dumps(content, ensure_ascii=False).encode() for name, content in files.items()}, notes
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{checkpoint.name}: the tokenizer's files hold half a character: {error}") from error


def _load_reference(checkpoint: Path) -> Any:
    try:
        found = load_hf_tokenizer(checkpoint)
    except ImportError:
        raise MissingExtraError("writing ONNX Runtime GenAI folders", "onnx") from None
    except Phi3EdgeError:
        raise
    except Exception as error:  # transformers raises many kinds
        cause = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"transformers cannot read the tokenizer of {checkpoint.name}: {cause}",
            "tokenizer.json or tokenizer.model must be there; code of the repository is never run",
        ) from error
    if not found.is_fast:
        raise UnsupportedError(f"{type(found).__name__} cannot be written as tokenizer.json")
    return found


def _steps(node: JSON | None) -> list[JSON]:
    """A normalizer, pre-tokenizer or decoder as a flat list."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    inner = next(node[key] for key in ("normalizers", "pretokenizers", "decoders") if key in node)
    return [step for part in inner for step in _steps(part)]


def _check_ids(fast: JSON, spec: ModelSpec) -> None:
    """Raise CheckpointError unless all ids are in the embedding, UnsupportedError unless it is plain BPE."""
    model = fast["model"]
    if model["type"] != "BPE" or any(model.get(k) for k in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise UnsupportedError(f"expected a BPE tokenizer without marks inside words, got {model['type']}")
    last = max([*model["vocab"].values(), *(token["id"] for token in fast["added_tokens"])], default=-1)
    if not 0 <= last < spec.vocab_size:
        raise CheckpointError(
            f"expected token ids below vocab_size {spec.vocab_size}, got id {last}",
            "the tokenizer belongs to another model",
        )


def _config(reference: Any, notes: list[str]) -> JSON:
    """tokenizer_config.json: a class for which transformers takes tokenizer.json as it is, and the runtime too."""
    config: JSON = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": reference.padding_side,
        "model_input_names": ["input_ids", "attention_mask"],  # the class's own ask for token_type_ids too
    }
    if reference.model_max_length < 1e9:  # transformers' mark for "none" is 1e30
        config["model_max_length"] = reference.model_max_length
    for kind in SPECIAL_TOKENS:
        if (token := getattr(reference, kind)) is not None:
            config[kind] = str(token)
    template = reference.chat_template
    named = template if isinstance(template, dict) else {"default": template}
    if named.get("default"):
        config["chat_template"] = runtime_template(named["default"], notes)
    notes += [f"{RUNTIME} holds one chat template; {name!r} is left out" for name in named if name != "default"]
    return config


def _added_to_texts(reference: Any, fast: JSON, notes: list[str]) -> JSON:
    """What the reference adds around a text, as tokenizer_config.json says it.

    The runtime adds a token also where tokenizer.json's post-processor mentions it: one is written that says no more.
    """
    text = reference("a", add_special_tokens=False)["input_ids"]
    whole = reference("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    before, after = whole[:start], whole[start + len(text) :]
    fast["post_processor"] = _post_processor(reference, before, after) if before or after else None
    found: JSON = {}
    for kind, ids, place in (("bos", before, "before"), ("eos", after, "after")):
        own = getattr(reference, f"{kind}_token_id")
        found[f"add_{kind}_token"] = bool(ids)
        if own is None and len(ids) == 1:  # tokenizer_config.json names none
            found[f"{kind}_token"] = reference.convert_ids_to_tokens(ids[0])
        elif ids not in ([], [own]):
            notes.append(
                f"{RUNTIME} adds only the {kind} token {place} a text; the tokenizer adds"
                f" {' '.join(reference.convert_ids_to_tokens(ids))}"
            )
    if after and not before and reference.bos_token == reference.eos_token:
        notes.append(f"{RUNTIME} also adds {reference.bos_token} before a text; the tokenizer only after it")
    return found


def _post_processor(reference: Any, before: list[int], after: list[int]) -> JSON:
    """A step that puts tokens around a text, or each of two."""

    def around(name: str, kind: int) -> list[JSON]:
        start, end = (
            [{"SpecialToken": {"id": token, "type_id": kind}} for token in reference.convert_ids_to_tokens(ids)]
            for ids in (before, after)
        )
        return [*start, {"Sequence": {"id": name, "type_id": kind}}, *end]

    named = {reference.convert_ids_to_tokens(n): n for n in (*before, *after)}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [n], "tokens": [token]} for token, n in named.items()},
    }


def _rewrite_sentencepiece(fast: JSON, chat: bool, notes: list[str]) -> None:
    """Decoder steps that tell the runtime it is SentencePiece, and whether a text starts with an extra space."""
    if not fast["model"].get("byte_fallback") or BYTES.difference(fast["model"]["vocab"]):
        raise UnsupportedError("expected byte-level BPE or a SentencePiece vocabulary with a token per byte")
    always = _starts_with_space(fast, chat, notes)
    fast["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if always else []),
        ],
    }
    notes.append(
        f"{RUNTIME} merges nothing across a line break after a word, nor past 100 characters of one word or of spaces:"
        " tokens differ before carriage returns (Windows line ends) and in very long runs"
    )


def _starts_with_space(fast: JSON, chat: bool, notes: list[str]) -> bool:
    """Whether the runtime puts a space in front of every piece of text between special tokens, or of none."""
    steps = _steps(fast["normalizer"]) + _steps(fast["pre_tokenizer"])
    kinds = [step["type"] for step in steps]
    spaces = all(s["pattern"].get("String") == " " and s["content"] == SPACE for s in steps if s["type"] == "Replace")
    if kinds == ["Prepend", "Replace"] and steps[0]["prepend"] == SPACE and spaces:
        return True
    if kinds == ["Replace"] and spaces:
        return False
    if kinds == ["Metaspace"] and steps[0]["replacement"] == SPACE and not steps[0]["split"]:
        scheme = steps[0]["prepend_scheme"]
        if scheme == "first" and chat:
            notes.append(f"{RUNTIME} puts no space in front of a text, as is right for a chat; this tokenizer does")
            return False
        if scheme == "first":
            notes.append(f"{RUNTIME} puts a space after every special token; this tokenizer only at the very start")
        if scheme != "never":
            notes.append(f"{RUNTIME} puts a space in front of a text that starts with one; this tokenizer does not")
        return bool(scheme != "never")
    raise UnsupportedError(f"tokenizer.json: {RUNTIME} has no SentencePiece tokenizer with the steps {kinds}")


def _rewrite_byte_level(fast: JSON, reference: Any, notes: list[str]) -> None:
    """Every step of the pre-tokenizer that splits becomes a regular expression."""
    normalizer = [step["type"] for step in _steps(fast["normalizer"])]
    if normalizer == ["NFC"]:
        notes.append(f"tokenizer.json composes characters (NFC) before tokenizing; {RUNTIME} does not")
    elif normalizer:
        raise UnsupportedError(f"tokenizer.json: expected no normalizer or NFC, got {normalizer}")
    patterns = [_pattern(step) for step in _steps(fast["pre_tokenizer"])]
    fast["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            *(
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
                for pattern in patterns
                if pattern is not None
            ),
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    if GPT4O in patterns:
        notes.append(f"{RUNTIME} splits words before a slash that follows a line break; this tokenizer does not")
    _note_vocabulary(fast, reference, notes)


def _pattern(step: JSON) -> str | None:
    """The regular expression whose matches are the words; None for a step that splits nothing."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return GPT2 if step["use_regex"] else None
    if kind == "Digits" and step["individual_digits"]:
        return DIGIT
    if kind == "Split" and (step["behavior"], step["invert"]) in {("Isolated", False), ("Removed", True)}:
        pattern = step["pattern"].get("Regex")
        if pattern in PATTERNS:
            return str(pattern)
    raise UnsupportedError(f"tokenizer.json: {RUNTIME} has no code to split words by {json.dumps(step)}")


def _note_vocabulary(fast: JSON, reference: Any, notes: list[str]) -> None:
    """Words that the runtime finds whole where the tokenizer merges otherwise, and bytes without a token."""
    from tokenizers.pre_tokenizers import ByteLevel

    model = fast["model"]
    if not model.get("ignore_merges"):
        merge = reference.backend_tokenizer.model.tokenize
        words = model["vocab"].keys() - {token["content"] for token in fast["added_tokens"]}
        loose = sum(len(merge(word)) != 1 for word in words)
        if loose:
            notes.append(f"{RUNTIME} takes whole words from the vocabulary before it merges: {loose} tokens may appear")
    letters = [ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(n)) for n in range(128)]
    missing = [n for n, split in enumerate(letters) if split[0][0] not in model["vocab"]]
    if missing:
        notes.append(f"the vocabulary has no token for the bytes {', '.join(f'0x{n:02X}' for n in missing)}")


def _note_flags(fast: JSON, notes: list[str]) -> None:
    """Flags of added tokens that the runtime does not read, or reads otherwise."""
    effects = {
        "rstrip": "takes white space after it, other than spaces, tabs and line breaks",
        "lstrip": "takes the white space before it",
        "single_word": "is found only as a whole word",
    }
    if fast["normalizer"] is not None:
        effects["normalized"] = "is looked for in text whose spaces are already replaced"
    for flag, effect in effects.items():
        tokens = [token["content"] for token in fast["added_tokens"] if token[flag]]
        if tokens:
            notes.append(f"{RUNTIME} ignores that {tokens[0]!r} {effect} ({flag}, {len(tokens)} tokens)")
