"""The text that a model is calibrated on: its own words, what ships with Python, a file, or a hub dataset."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from phi3edge import reference
from phi3edge.cache import cache_dir
from phi3edge.checkpoint import GENERATION_CONFIG, TOKENIZER_FILES, open_checkpoint
from phi3edge.errors import OutputError, UnsupportedError, UsageError
from phi3edge.files import new_file
from phi3edge.progress import Stages, silent
from phi3edge.prompts import PROMPTS
from phi3edge.registry import did_you_mean
from phi3edge.text import MODULES, Text, default_text, docstrings, read_text
from phi3edge.types import ModelSpec

SELF, PYTHON = "self", "python"
MIXED = f"{SELF}+{PYTHON}"
DEFAULT = SELF
"""What is taken if no text is given. On the demo in Q4_0 it costs 1.24 times the KL on wikitext-2 that calibration on
wikitext-2's own validation text does; half self, half python 1.40."""

LEAST_SEQUENCES = 8
SPAN = 256
"""Tokens that the model writes at most before it begins another text. The spans of a sequence are written side by side:
fewer steps and less KV cache; and a small model that repeats itself is soon interrupted."""

PASSAGE = 32
"""So many equal tokens in a row are no chance: texts that share them overlap."""

_VERSION = 2  # of what the model is made to write; raise it whenever the same inputs give other text


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Token ids to run a model on.

    Attributes:
        ids: int64, shape (sequences, tokens).
        name: for people: "written by the model itself, seed 0", a file's name, a dataset's id@revision:file.
        note: what came out otherwise than asked for; else None.
    """

    ids: np.ndarray
    name: str
    note: str | None = None

    @property
    def sha256(self) -> str:
        """Of the ids, row by row, as little-endian int32."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()


def calibration_text(
    wanted: str | None,
    checkpoint: Path,
    spec: ModelSpec,
    sequences: int,
    tokens: int,
    seed: int = 0,
    device: str = "cpu",
    stages: Stages = silent,
    memory: int | None = None,
) -> CalibrationText:
    """The text to calibrate on, as the checkpoint's tokenizer reads it.

    Args:
        wanted: "self": what the model itself writes, half answers to PROMPTS, half begun with a random word; "python":
            documentation inside the Python that runs this, none of it in the default text of validation;
            "self+python": half the sequences each; "hub:ORG/NAME[@REVISION]:FILE": a text file, or JSON lines with a
            field "text", of a hub dataset; else a path of a text file. None for DEFAULT.
        checkpoint: folder in Hugging Face layout.
        spec: the model in it.
        sequences: how many; of a shorter text as many as it has, if they are at least LEAST_SEQUENCES.
        tokens: of each sequence.
        seed: of what the model writes.
        device: where the model writes.
        stages: shows progress.
        memory: bytes that weights and KV cache may take while the model writes, None for what suits the device; less
            of it takes more time, and may give other words.

    Raises:
        UsageError: no such text, or too little of it.
        UnsupportedError: a mixture of experts that should write.
        HubError: the dataset cannot be had.
        MissingExtraError: torch or transformers is not installed.
        CheckpointError: the checkpoint or its tokenizer cannot be read.
        OutputError: what the model wrote cannot be kept.
    """
    wanted = wanted or DEFAULT
    require_writer(spec, wanted)
    if tokens > spec.context_length:
        raise UsageError(f"{tokens} tokens a sequence are more than the model's context of {spec.context_length}")

    def own(count: int) -> CalibrationText:
        return _own(checkpoint, spec, count, tokens, seed, device, stages, memory)

    if wanted == SELF:
        return own(sequences)
    if wanted == PYTHON:
        return _python(checkpoint, sequences, tokens)
    if wanted == MIXED:
        first, second = own(sequences - sequences // 2), _python(checkpoint, sequences // 2, tokens)
        return CalibrationText(np.concatenate([first.ids, second.ids]), f"{first.name}; {second.name}")
    text = _hub_text(wanted) if wanted.startswith("hub:") else _file(wanted)
    return _cut(_encode(reference.load_tokenizer(checkpoint), text.text), sequences, tokens, text.name)


def require_writer(spec: ModelSpec, wanted: str | None) -> None:
    """Raise for a text of the model's own that it does not write here: each token would read all experts again.

    Raises:
        UnsupportedError: says what to calibrate on instead.
    """
    if spec.experts and (wanted or DEFAULT) in (SELF, MIXED):
        raise UnsupportedError(
            "a mixture of experts does not write its own text here", "--calibration python, or a FILE"
        )


def _own(
    checkpoint: Path,
    spec: ModelSpec,
    sequences: int,
    tokens: int,
    seed: int,
    device: str,
    stages: Stages,
    memory: int | None,
) -> CalibrationText:
    """What the model writes; kept in the cache."""
    digest = hashlib.sha256(repr((_VERSION, sequences, tokens, seed, PROMPTS)).encode())
    digest.update(reference.fingerprint(checkpoint).encode())
    for name in (GENERATION_CONFIG, *TOKENIZER_FILES):
        if (checkpoint / name).is_file():
            digest.update((checkpoint / name).read_bytes())
    kept = cache_dir() / "calibration" / f"{digest.hexdigest()[:32]}.npy"
    if not kept.is_file():
        reference.require_reference()
        from phi3edge.generation import generate

        spans = -(-tokens // min(SPAN, spec.original_context_length))  # of each sequence
        beginnings = _beginnings(reference.load_tokenizer(checkpoint), sequences, spans, seed)
        with open_checkpoint(checkpoint) as opened:
            ids = generate(opened, spec, beginnings, -(-tokens // spans), seed, memory, device, stages)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot keep the calibration text in {kept.parent}: {error.strerror}",
                "PHI3EDGE_CACHE names another folder",
            ) from error
        with new_file(kept) as file:
            np.save(file, ids.reshape(sequences, -1)[:, :tokens].astype("<i4"))
    return CalibrationText(np.load(kept).astype(np.int64), f"written by the model itself, seed {seed}")


def _beginnings(tokenizer: Any, sequences: int, spans: int, seed: int) -> list[Iterator[list[int]]]:
    """What each span of each sequence begins its texts with: even sequences chat, odd ones begin with any word."""
    random = np.random.default_rng(seed)
    prompts, words = random.permutation(PROMPTS).tolist(), random.permutation(_words(tokenizer)).tolist()
    before = tokenizer("")["input_ids"]
    chats = -(-sequences // 2) * spans

    def chat(first: int) -> Iterator[list[int]]:
        for n in count(first, chats):
            yield _ask(tokenizer, prompts[n % len(prompts)])

    def free(first: int) -> Iterator[list[int]]:
        for n in count(first, chats):
            yield [*before, words[n % len(words)]]

    return [(free if row % 2 else chat)(row // 2 * spans + span) for row in range(sequences) for span in range(spans)]


def _ask(tokenizer: Any, prompt: str) -> list[int]:
    """A user's turn as the checkpoint's chat template renders it; as it is, if there is none."""
    if not tokenizer.chat_template:
        return tokenizer(f"{prompt}\n\n")["input_ids"]
    chat = [{"role": "user", "content": prompt}]
    return _encode(tokenizer, tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def _words(tokenizer: Any) -> list[int]:
    """Ids of the ordinary tokens that a word begins with: a space and a letter."""
    added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    ordinary = [n for n in range(len(tokenizer)) if n not in added]
    pieces = tokenizer.convert_ids_to_tokens(ordinary)
    # byte-level vocabularies write a space as Ġ, SentencePiece's as ▁
    return [n for n, piece in zip(ordinary, pieces, strict=True) if piece and piece[0] in "Ġ▁" and piece[1:2].isalpha()]


def _python(checkpoint: Path, sequences: int, tokens: int) -> CalibrationText:
    """The beginnings of as many modules' documentation; where modules are too few, also what follows.

    Modules borrow from each other: what has a passage of the default text is left out.
    """
    tokenizer = reference.load_tokenizer(checkpoint)
    scored = set(_hashes(np.array(_encode(tokenizer, default_text().text))).ravel().tolist())
    name = f"python-{sysconfig.get_python_version()} docstrings"
    first: list[list[int]] = []
    others: list[list[int]] = []
    for text in _documentation():
        ids = _encode(tokenizer, text)
        cut = [ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens)]
        stretches = [ids for ids in cut if scored.isdisjoint(_hashes(np.array(ids)).ravel().tolist())]
        first += stretches[:1]
        others += stretches[1:]
        if len(first) >= sequences:
            break
    chosen = (first + others)[:sequences]
    if len(chosen) < sequences:
        raise _too_short(name, len(chosen) * tokens, sequences, tokens)
    return CalibrationText(np.array(chosen, np.int64).reshape(sequences, tokens), name)


_NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo", "site-packages", "dist-packages"}


def _documentation() -> Iterator[str]:
    """Docstrings of modules in a random order, prose first; without the modules that the default text is made of."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    seen = {_plain(paragraph) for paragraph in default_text().text.split("\n\n")}
    paths = sorted(stdlib.rglob("*.py"))
    for n in np.random.default_rng(0).permutation(len(paths)):
        path = paths[n]
        module = path.relative_to(stdlib).with_suffix("")
        if _NOT_LIBRARY & set(module.parts) or module.as_posix() in MODULES:
            continue
        try:
            paragraphs = docstrings(ast.parse(path.read_bytes())).split("\n\n")
        except (OSError, SyntaxError, ValueError):  # a file that is no module
            continue
        new = [p for p in paragraphs if p.strip() and _plain(p) not in seen]
        seen.update(map(_plain, new))
        yield "\n\n".join(sorted(new, key=lambda p: not _is_prose(p)))


def _plain(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return ">>>" not in paragraph and letters > 0.85 * len(paragraph) and len(paragraph) > 80


def _file(wanted: str) -> Text:
    if not Path(wanted).is_file():
        hint = f"{did_you_mean(wanted, [SELF, PYTHON, MIXED])} a text file and hub:ORG/NAME:FILE are possible too"
        raise UsageError(f"no calibration text {wanted!r}", hint)
    return read_text(Path(wanted))


def _hub_text(wanted: str) -> Text:
    """A file of a hub dataset; of JSON lines the field "text"."""
    match = re.fullmatch(r"hub:([\w-][\w.-]*/[\w-][\w.-]*)(?:@([^:]+))?:(.+)", wanted)
    if not match:
        raise UsageError(f"{wanted!r} names no file of a dataset", "expected hub:ORG/NAME[@REVISION]:FILE")
    from phi3edge.hub import dataset_file

    path, commit = dataset_file(match[1], match[3], match[2])
    text = read_text(path)
    content = _records(text) if match[3].endswith(".jsonl") else text.text
    return Text(f"{match[1]}@{commit}:{match[3]}", content, text.sha256)


def _records(text: Text) -> str:
    try:
        return "\n\n".join(str(json.loads(line)["text"]) for line in text.text.splitlines() if line.strip())
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{text.name} is not lines of JSON objects with a field 'text'") from None


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _cut(ids: list[int], sequences: int, tokens: int, name: str) -> CalibrationText:
    """Sequences that lie evenly over a text."""
    found = min(sequences, len(ids) // tokens)
    if found < min(sequences, LEAST_SEQUENCES):
        raise _too_short(name, len(ids), min(sequences, LEAST_SEQUENCES), tokens)
    starts = np.linspace(0, len(ids) - tokens, found).astype(int)
    note = None
    if found < sequences:
        note = f"{name} has {len(ids)} tokens: {found} sequences of {tokens} instead of {sequences}"
    return CalibrationText(np.array([ids[start : start + tokens] for start in starts], np.int64), name, note)


def _too_short(name: str, there: int, sequences: int, tokens: int) -> UsageError:
    return UsageError(
        f"the calibration text {name} has {there} tokens; {sequences} sequences of {tokens} need {sequences * tokens}",
        "give a longer text",
    )


def refuse_overlap(calibration: CalibrationText, evaluation: np.ndarray, name: str = "the evaluation text") -> None:
    """Make sure that what is measured was not calibrated on.

    Args:
        calibration: what was calibrated on.
        evaluation: token ids of the text to be measured on, shape (chunks, tokens).
        name: of that text, for people.

    Raises:
        UsageError: they share a run of PASSAGE equal tokens.
    """
    theirs, ours = _passages(evaluation), _passages(calibration.ids)
    their_hashes, our_hashes = _hashes(evaluation), _hashes(calibration.ids)
    for row, start in np.argwhere(np.isin(our_hashes, their_hashes)):
        passage = ours[row, start]
        if len(np.unique(passage)) < PASSAGE // 4:  # a ruled line, or blank ones
            continue
        for chunk, at in np.argwhere(their_hashes == our_hashes[row, start]):
            if (theirs[chunk, at] == passage).all():
                raise UsageError(
                    f"the calibration text ({calibration.name}) and {name} share a passage of {PASSAGE} tokens: "
                    f"sequence {row + 1} from token {start + 1}, chunk {chunk + 1} from token {at + 1}",
                    "calibrate on a text that is not measured on, or measure on another",
                )


def _passages(ids: np.ndarray) -> np.ndarray:
    """Every run of PASSAGE ids of each row; shape (rows, runs, PASSAGE)."""
    rows = np.atleast_2d(ids)
    if rows.shape[1] < PASSAGE:
        return np.empty((len(rows), 0, PASSAGE), rows.dtype)
    return sliding_window_view(rows, PASSAGE, axis=1)


def _hashes(ids: np.ndarray) -> np.ndarray:
    """A number for each passage, by a polynomial modulo 2**64; shape (rows, runs)."""
    passages = _passages(ids)
    hashes = np.zeros(passages.shape[:2], np.uint64)
    for n in range(PASSAGE):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + passages[:, :, n].astype(np.uint64)
    return hashes
