"""Reads a checkpoint's tokenizer into what a GGUF file holds.

Three kinds are read, told apart by structure:

* SentencePiece BPE with its `tokenizer.model` (Phi-3, Llama 2): pieces, scores and types come from that file.
* The same vocabulary in `tokenizer.json` alone, as fine-tunes are saved: a file of merges has no scores, but
  SentencePiece merges the pair with the best score first and `tokenizer.json` lists merges in that very order, so the
  negated rank of a piece's first merge is a score that merges the same pairs.
* Byte-level BPE in `tokenizer.json` (Phi-4, SmolLM2): llama.cpp has a fixed set of pre-tokenizers by name, so the
  pre-tokenizer's structure is looked up in a table.

`tokenizer.model` is a protobuf message of which six fields matter. They are read here, in 20 lines, so that planning
an export needs no compiled package.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.types import JSON, ModelSpec

SPACE = "▁"  # what SentencePiece writes for a space
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
ADDED_SCORE = -1000.0  # of added tokens and padding, as llama.cpp's converter sets them; tokenizing never reads them
PADDING_SCORE = -10000.0
SPECIAL_KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    (("bytes", True),): "gpt-2",
    (("digits", True), ("bytes", True)): "smollm",
    (("split", LLAMA3), ("bytes", False)): "dbrx",  # cl100k_base; "llama-bpe" is the same and ignores merges
    (("split", QWEN2), ("bytes", False)): "qwen2",
    (("split", GPT4O), ("bytes", False)): "gpt-4o",
}
"""llama.cpp's name of a pre-tokenizer by its steps: one digit at a time, a regular expression whose matches are the
words, and the mapping of bytes to characters, with GPT-2's own expression (True) or without."""


class TokenType(IntEnum):
    """What a token is; SentencePiece and GGUF number them alike."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in the text before anything else is tokenized; flags as in tokenizer.json."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer, as far as a GGUF file can hold one.

    Attributes:
        model: "llama" (SentencePiece BPE) or "gpt2" (byte-level BPE).
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: text of every id; ids without a token are padded as "[PAD7]".
        types: TokenType of every id.
        scores: of every id, for "llama"; else empty.
        merges: "left right" in order of rank, for "gpt2"; else empty.
        added: the added tokens with their flags, by id.
        special_ids: ids by kind (SPECIAL_KINDS), where known.
        add_bos, add_eos: whether tokenizing a text adds these tokens.
        add_space_prefix: "llama": whether a text, and the text after a special token, starts with an extra space.
        chat_template: the default one.
        other_templates: further ones by name.
        notes: one line for everything that a GGUF file cannot say; for people.
    """

    model: str
    pre: str
    tokens: tuple[str, ...] = field(repr=False)
    types: tuple[TokenType, ...] = field(repr=False)
    scores: tuple[float, ...] = field(repr=False)
    merges: tuple[str, ...] = field(repr=False)
    added: tuple[AddedToken, ...] = field(repr=False)
    special_ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None = field(repr=False)
    other_templates: dict[str, str] = field(repr=False)
    notes: tuple[str, ...]


def load_tokenizer(folder: Path, spec: ModelSpec) -> Vocabulary:
    """Read the tokenizer of a checkpoint.

    Args:
        folder: holds tokenizer.model or tokenizer.json or both, and tokenizer_config.json if there is one.
        spec: gives the vocabulary's size (rows of the embedding) and the ids that the tokenizer's files do not name.

    Raises:
        CheckpointError: files missing or damaged, or a tokenizer that does not belong to the model.
        UnsupportedError: a tokenizer that llama.cpp would not tokenize alike.
    """
    try:
        return _load(folder, spec)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder.name}: the tokenizer's files are not built as tokenizers are: {type(error).__name__}: {error}",
            "get them again",
        ) from error


def _load(folder: Path, spec: ModelSpec) -> Vocabulary:
    """See `load_tokenizer`; where a part of a JSON file is not what it should be, this fails as Python does."""
    fast, config = _read_json(folder / "tokenizer.json"), _read_json(folder / "tokenizer_config.json")
    model_file = folder / "tokenizer.model"
    added = _added_tokens(folder, fast, config)
    default, others = _chat_templates(folder, config)
    notes: list[str] = []
    merges: tuple[str, ...] = ()
    space = False
    pre = "default"
    if fast and _is_byte_level(fast):
        kind = "gpt2"
        pieces = [(text, 0.0, TokenType.NORMAL) for text in _vocabulary(fast, spec.vocab_size)]
        merges = tuple(" ".join(pair) for pair in _merges(fast))
        pre = _pre_tokenizer(fast, notes)
    elif fast or model_file.is_file():
        kind = "llama"
        if fast:
            space = _space_prefix(fast, default is not None, notes)
        if model_file.is_file():
            pieces, dummy_prefix = _read_sentencepiece(model_file, notes)
            space = space if fast else dummy_prefix
        if fast and not model_file.is_file():
            pieces = _pieces_from_merges(fast, spec.vocab_size, notes)
        elif fast:
            _check_same(pieces, _vocabulary(fast, spec.vocab_size), added)
        if BYTES.difference(text for text, _, _ in pieces):
            raise UnsupportedError("expected a SentencePiece vocabulary with a token per byte, got one without")
    else:
        raise CheckpointError(
            f"{folder.name}: expected tokenizer.json or tokenizer.model, got neither",
            "copy it from the model that this one was made of",
        )

    tokens, types, scores = _table(pieces, added, spec.vocab_size)
    "".join((*tokens, default or "", *others.values())).encode()  # fails for half a surrogate pair: JSON can say it
    special_ids = _special_ids(config, added, spec)
    add_bos, add_eos = _adds(fast, config, kind, notes)
    _note_flags(added, kind, notes)
    return Vocabulary(
        model=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores if kind == "llama" else (),
        merges=merges,
        added=tuple(added[key] for key in sorted(added)),
        special_ids=special_ids,
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=space,
        chat_template=default,
        other_templates=others,
        notes=tuple(notes),
    )


# tokenizer.model


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """The (number, value) pairs of a protobuf message: int for varints, a view for everything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        wire = key & 7
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}[wire] if wire != 2 else varint()
        if at + size > len(message):
            raise IndexError(f"a field of {size} bytes at {at}")
        yield key >> 3, message[at : at + size]
        at += size


def _read_sentencepiece(path: Path, notes: list[str]) -> tuple[list[tuple[str, float, TokenType]], bool]:
    """Pieces (text, score, type) in order of id, and whether a text gets a space in front.

    Field numbers: sentencepiece_model.proto. ModelProto: pieces 1 (piece 1, score 2, type 3), trainer_spec 2
    (model_type 3), normalizer_spec 3 (precompiled_charsmap 2, add_dummy_prefix 3, remove_extra_whitespaces 4).
    """
    pieces: list[tuple[str, float, TokenType]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append((str(piece[1], "utf-8"), score, TokenType(piece.get(3, TokenType.NORMAL))))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
        raise CheckpointError(f"{path.name}: not a SentencePiece model: {error}", "get the file again") from error
    if not pieces:
        raise CheckpointError(f"{path.name}: expected pieces, got none", "get the file again")
    if trainer.get(3, 1) != 2:
        raise UnsupportedError(f"{path.name}: expected a BPE model (type 2), got type {trainer.get(3, 1)}")
    if normalizer.get(2):
        notes.append("tokenizer.model normalizes text (Unicode, say) before tokenizing; llama.cpp does not")
    if normalizer.get(4, 1):
        notes.append("tokenizer.model removes extra spaces before tokenizing; llama.cpp does not")
    return pieces, bool(normalizer.get(3, 1))


# tokenizer.json


def _steps(node: JSON | None) -> list[JSON]:
    """A normalizer or pre-tokenizer as a flat list."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    inner: list[JSON] = node.get("normalizers") or node.get("pretokenizers") or []
    return [step for part in inner for step in _steps(part)]


def _is_byte_level(fast: JSON) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(fast.get("pre_tokenizer")))


def _vocabulary(fast: JSON, size: int) -> list[str]:
    """The model's tokens in order of id, all below `size`; a hole is an empty text."""
    model = fast.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedError(f"tokenizer.json: expected a model of type BPE, got {model.get('type')!r}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise UnsupportedError(f"tokenizer.json: expected no {key}, got {model[key]!r}")
    vocab: dict[str, int] = model.get("vocab") or {}
    _check_ids(vocab.values(), size)
    tokens = [""] * (max(vocab.values(), default=-1) + 1)
    for text, index in vocab.items():
        tokens[index] = text
    return tokens


def _merges(fast: JSON) -> list[tuple[str, str]]:
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in fast["model"].get("merges") or []]
    if bad := next((m for m in merges if len(m) != 2 or " " in "".join(m)), None):
        raise CheckpointError(f"tokenizer.json: expected merges of two tokens without spaces, got {bad!r}")
    return merges  # type: ignore[return-value]


def _pieces_from_merges(fast: JSON, size: int, notes: list[str]) -> list[tuple[str, float, TokenType]]:
    """SentencePiece pieces with scores that merge in the order of the merges (see the module's docstring)."""
    tokens, merges = _vocabulary(fast, size), _merges(fast)
    first: dict[str, int] = {}
    ways: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
        ways.setdefault(left + right, []).append(rank)

    # llama.cpp merges any two neighbours that make a token: exact if every such pair is a merge, all in a row. Runs of
    # one character share a score in SentencePiece, so their merges are shuffled; in any order the leftmost run grows.
    known = set(tokens)
    loose = sum(
        len(ranks) != sum(text[:i] in known and text[i:] in known for i in range(1, len(text)))
        or (ranks[-1] - ranks[0] + 1 != len(ranks) and len(set(text)) > 1)
        for text, ranks in ways.items()
    )
    if loose:
        notes.append(
            f"tokenizer.json does not merge as SentencePiece does: llama.cpp may split words with"
            f" any of {loose} tokens differently"
        )
    unknown = fast["model"].get("unk_token")
    pieces = []
    for index, text in enumerate(tokens):
        kind = TokenType.BYTE if text in BYTES else TokenType.UNKNOWN if text == unknown else TokenType.NORMAL
        score = 0.0 if kind is not TokenType.NORMAL else -float(first.get(text, len(merges) + index))
        pieces.append((text, score, kind))
    return pieces


def _space_prefix(fast: JSON, chat: bool, notes: list[str]) -> bool:
    """Whether a SentencePiece vocabulary in tokenizer.json puts a space in front of a text.

    llama.cpp does it for all pieces of text between special tokens, or for none. Where the tokenizer does it only at
    the very start, none is right for a chat, which starts with a special token.
    """
    steps = [_step(step) for step in _steps(fast.get("normalizer")) + _steps(fast.get("pre_tokenizer"))]
    replace = ("replace", " ", SPACE)
    if steps == [("prepend", SPACE), replace]:
        return True
    if steps == [replace]:
        return False
    if len(steps) == 1 and steps[0][:2] == ("metaspace", False):
        scheme = steps[0][2]
        if scheme == "first" and chat:
            notes.append("llama.cpp puts no space in front of a text, as is right for a chat; this tokenizer does")
            return False
        if scheme == "first":
            notes.append("llama.cpp puts a space after every special token; this tokenizer only at the very start")
        if scheme != "never":
            notes.append("llama.cpp puts a space in front of a text that starts with one; this tokenizer does not")
        return bool(scheme != "never")
    raise UnsupportedError(
        f"tokenizer.json: expected SentencePiece's spaces or byte-level BPE, got {steps or 'no pre-tokenizer'}"
    )


def _pre_tokenizer(fast: JSON, notes: list[str]) -> str:
    """llama.cpp's name for a byte-level pre-tokenizer."""
    normalizer = [step["type"] for step in _steps(fast.get("normalizer"))]
    if normalizer == ["NFC"]:
        notes.append("tokenizer.json composes characters (NFC) before tokenizing; llama.cpp does not")
    elif normalizer:
        raise UnsupportedError(f"tokenizer.json: expected no normalizer or NFC, got {normalizer}")
    steps = tuple(_step(step) for step in _steps(fast.get("pre_tokenizer")))
    pre = PRE_TOKENIZERS.get(steps)
    if pre is None:
        raise UnsupportedError(
            f"tokenizer.json: llama.cpp has no pre-tokenizer that is known to do {steps}",
            f"known here: {', '.join(sorted(PRE_TOKENIZERS.values()))}",
        )
    if fast["model"].get("ignore_merges"):
        if pre == "dbrx":
            return "llama-bpe"
        notes.append("tokenizer.json takes whole words from the vocabulary before it merges; llama.cpp only merges")
    return pre


def _step(step: JSON) -> tuple[Any, ...]:
    """A step in few words, to look up and to show. Steps that nothing here knows keep their name."""
    kind = step["type"]
    if kind == "ByteLevel" and not step.get("add_prefix_space", True):
        return "bytes", step.get("use_regex", True)
    if kind == "Digits":
        return "digits", step.get("individual_digits", False)
    if kind == "Split" and (step["behavior"], step.get("invert", False)) in {("Isolated", False), ("Removed", True)}:
        return "split", step["pattern"].get("Regex")
    if kind == "Prepend":
        return "prepend", step["prepend"]
    if kind == "Replace":
        return "replace", step["pattern"].get("String"), step["content"]
    if kind == "Metaspace" and step.get("replacement") == SPACE:
        scheme = step.get("prepend_scheme") or ("always" if step.get("add_prefix_space", True) else "never")
        return "metaspace", step.get("split", True), scheme
    return kind, json.dumps({key: value for key, value in step.items() if key != "type"}, ensure_ascii=False)


# What both kinds share


def _read_json(path: Path) -> JSON:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path.name}: not JSON: {error}", "get the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name}: expected an object, got {type(value).__name__}")
    return value


def _added_tokens(folder: Path, fast: JSON, config: JSON) -> dict[int, AddedToken]:
    """Added tokens by id; where files disagree, tokenizer.json wins, then tokenizer_config.json."""
    found = {index: AddedToken(index, text) for text, index in _read_json(folder / "added_tokens.json").items()}
    listed = [(int(index), entry) for index, entry in config.get("added_tokens_decoder", {}).items()]
    listed += [(entry["id"], entry) for entry in fast.get("added_tokens", [])]
    flags = ("special", "lstrip", "rstrip", "normalized", "single_word")
    for index, entry in listed:
        found[index] = AddedToken(index, entry["content"], **{flag: bool(entry.get(flag)) for flag in flags})
    return found


def _check_ids(ids: Collection[int], size: int) -> None:
    """Raise CheckpointError for an id that is not in the embedding, before memory is taken for so many tokens."""
    least, last = min(ids, default=0), max(ids, default=0)
    if least < 0 or last >= size:
        raise CheckpointError(
            f"expected token ids below vocab_size {size}, got id {least if least < 0 else last}",
            "the tokenizer belongs to another model",
        )


def _check_same(pieces: list[tuple[str, float, TokenType]], fast: list[str], added: dict[int, AddedToken]) -> None:
    for index, ((text, _, _), other) in enumerate(zip(pieces, fast, strict=False)):
        if text != other and index not in added:
            raise CheckpointError(
                f"tokenizer.model and tokenizer.json disagree: token {index} is {text!r} and {other!r}",
                "remove the file that does not belong to this model",
            )


def _table(
    pieces: list[tuple[str, float, TokenType]], added: dict[int, AddedToken], size: int
) -> tuple[tuple[str, ...], tuple[TokenType, ...], tuple[float, ...]]:
    """Tokens, types and scores of every id of the embedding."""
    _check_ids([len(pieces) - 1, *added], size)
    padding = [(f"[PAD{i}]", PADDING_SCORE, TokenType.UNUSED) for i in range(size)]
    table = [piece if piece[0] else padding[i] for i, piece in enumerate(pieces)] + padding[len(pieces) :]
    for token in added.values():
        kind = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
        table[token.id] = (token.content, ADDED_SCORE, kind)
    seen: dict[str, int] = {}
    for index, (text, _, _) in enumerate(table):
        if seen.setdefault(text, index) != index:
            raise CheckpointError(f"expected every token once, got {text!r} as ids {seen[text]} and {index}")
    tokens, scores, types = zip(*table, strict=True)
    return tokens, types, scores


def _special_ids(config: JSON, added: dict[int, AddedToken], spec: ModelSpec) -> dict[str, int]:
    """Ids of the special tokens: tokenizer_config.json names texts, config.json ids."""
    ids = {token.content: token.id for token in added.values()}
    found: dict[str, int | None] = {
        "bos": spec.bos_token_id,
        "eos": spec.eos_token_ids[0] if spec.eos_token_ids else None,
        "pad": spec.pad_token_id,
    }
    for kind in SPECIAL_KINDS:
        entry = config.get(f"{kind}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if text in ids:
            found[kind] = ids[text]
    special_ids = {kind: index for kind in SPECIAL_KINDS if (index := found.get(kind)) is not None}
    for index in (*special_ids.values(), *spec.eos_token_ids):
        if not 0 <= index < spec.vocab_size:
            raise CheckpointError(f"expected special token ids below vocab_size {spec.vocab_size}, got {index}")
    return special_ids


def _adds(fast: JSON, config: JSON, kind: str, notes: list[str]) -> tuple[bool, bool]:
    """Whether BOS and EOS are added: as tokenizer.json's post-processor does, else as tokenizer_config.json says."""
    adds: dict[str, bool] = {}
    post = fast.get("post_processor") or {}
    for step in post.get("processors", [post]):
        if step.get("type") == "ByteLevel":
            adds = {"bos": False, "eos": False} | adds
        elif step.get("type") == "TemplateProcessing":
            template = [part.get("SpecialToken", {}).get("id") for part in step["single"]]
            text = template.index(None)
            for side, tokens in (("bos", template[:text]), ("eos", template[text + 1 :])):
                if tokens:
                    adds[side] = True
                if len(tokens) > 1:
                    notes.append(f"the tokenizer adds {' '.join(tokens)} to a text; llama.cpp adds only one token")
        elif step:
            notes.append(f"tokenizer.json has a post-processor {step.get('type')}, which llama.cpp does not know")
    defaults = {"bos": kind == "llama", "eos": False}
    bos, eos = (adds.get(s, bool(config.get(f"add_{s}_token", defaults[s]))) for s in ("bos", "eos"))
    return bos, eos


def _chat_templates(folder: Path, config: JSON) -> tuple[str | None, dict[str, str]]:
    """The default chat template and those with other names; a chat_template.jinja wins, as in transformers."""
    entry = config.get("chat_template")
    named: dict[str, str] = {t["name"]: t["template"] for t in entry} if isinstance(entry, list) else {}
    if default := entry if isinstance(entry, str) else _read_json(folder / "chat_template.json").get("chat_template"):
        named.setdefault("default", default)
    if (file := folder / "chat_template.jinja").is_file():
        named["default"] = file.read_text(encoding="utf-8")
    return named.pop("default", None), named


def _note_flags(added: dict[int, AddedToken], kind: str, notes: list[str]) -> None:
    """Flags that llama.cpp has no way to set; rstrip is the business of whoever names the model."""
    effects = {"lstrip": "takes the spaces before it", "single_word": "is found only as a whole word"}
    if kind == "llama":
        effects["normalized"] = "is looked for in text whose spaces are already replaced"
    for flag, effect in effects.items():
        tokens = [token.content for token in added.values() if getattr(token, flag)]
        if tokens:
            notes.append(f"llama.cpp ignores that {tokens[0]!r} {effect} ({flag}, {len(tokens)} tokens)")
