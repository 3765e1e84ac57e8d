"""The text that a model is calibrated on: its own words, what ships with Python, a file, or a hub dataset."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from phi3edge import reference
from phi3edge.cache import cache_dir
from phi3edge.checkpoint import GENERATION_CONFIG, TOKENIZER_FILES, open_checkpoint
from phi3edge.errors import OutputError, UsageError
from phi3edge.files import new_file
from phi3edge.progress import Stages, silent
from phi3edge.prompts import PROMPTS
from phi3edge.registry import did_you_mean
from phi3edge.text import MODULES, Text, default_text, docstrings, read_text
from phi3edge.types import ModelSpec

SELF, PYTHON = "self", "python"
MIXED = f"{SELF}+{PYTHON}"
DEFAULT = MIXED
"""What is taken if no text is given."""

LEAST_SEQUENCES = 8
MEMORY = 4 * 10**9
"""Bytes that weights and KV cache may take while the model writes."""

PASSAGE = 32
"""So many equal tokens in a row are no chance: texts that share them overlap."""

_VERSION = 1  # of what the model is made to write; raise it whenever the same inputs give other text


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
    memory: int = MEMORY,
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
        memory: see MEMORY. Less of it takes more time, and may give other words.

    Raises:
        UsageError: no such text, or too little of it.
        HubError: the dataset cannot be had.
        MissingExtraError: torch or transformers is not installed.
        CheckpointError: the checkpoint or its tokenizer cannot be read.
        OutputError: what the model wrote cannot be kept.
    """
    wanted = wanted or DEFAULT
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


def _own(
    checkpoint: Path, spec: ModelSpec, sequences: int, tokens: int, seed: int, device: str, stages: Stages, memory: int
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
        tokenizer = reference.load_tokenizer(checkpoint)
        from phi3edge.generation import generate

        words = _words(tokenizer, spec.vocab_size)
        beginnings = [
            _free(tokenizer, words, seed, row) if row % 2 else _chat(tokenizer, seed, row) for row in range(sequences)
        ]
        with open_checkpoint(checkpoint) as opened:
            ids = generate(opened, spec, beginnings, tokens, seed, memory, device, stages)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot keep the calibration text in {kept.parent}: {error.strerror}",
                "PHI3EDGE_CACHE names another folder",
            ) from error
        with new_file(kept) as file:
            np.save(file, ids.astype("<i4"))
    return CalibrationText(np.load(kept).astype(np.int64), f"written by the model itself, seed {seed}")


def _chat(tokenizer: Any, seed: int, row: int) -> Iterator[list[int]]:
    """Prompts in a random order, as the checkpoint's chat template renders them; as they are, if it has none."""
    random = np.random.default_rng([seed, row])
    while True:
        for n in random.permutation(len(PROMPTS)):
            if not tokenizer.chat_template:
                yield tokenizer(f"{PROMPTS[n]}\n\n")["input_ids"]
            else:
                chat = [{"role": "user", "content": PROMPTS[n]}]
                text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                yield _encode(tokenizer, text)


def _free(tokenizer: Any, words: np.ndarray, seed: int, row: int) -> Iterator[list[int]]:
    """A random word, after what the tokenizer puts before every text."""
    random = np.random.default_rng([seed, row])
    before = tokenizer("")["input_ids"]
    while True:
        yield [*before, int(random.choice(words))]


def _words(tokenizer: Any, vocabulary: int) -> np.ndarray:
    """Ids of the ordinary tokens that have a letter in them."""
    added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    ordinary = [n for n in range(min(len(tokenizer), vocabulary)) if n not in added]
    texts = tokenizer.batch_decode([[n] for n in ordinary])
    return np.array(
        [n for n, text in zip(ordinary, texts, strict=True) if any(map(str.isalpha, text)) and "\ufffd" not in text]
    )


def _python(checkpoint: Path, sequences: int, tokens: int) -> CalibrationText:
    """One stretch of documentation after the other, from modules that lie evenly over the standard library.

    First from each module's beginning, then, if these are too few, from what follows.
    """
    tokenizer = reference.load_tokenizer(checkpoint)
    name = f"python-{sysconfig.get_python_version()} docstrings"
    stretches: list[tuple[int, list[int]]] = []
    for text in _documentation():
        ids = _encode(tokenizer, text)
        stretches += [(n, ids[n * tokens : (n + 1) * tokens]) for n in range(len(ids) // tokens)]
    if len(stretches) < sequences:
        raise _too_short(name, len(stretches) * tokens, sequences, tokens)
    depth = sorted(n for n, _ in stretches)[sequences - 1]
    usable = [ids for n, ids in stretches if n <= depth]
    chosen = [usable[n * len(usable) // sequences] for n in range(sequences)]
    return CalibrationText(np.array(chosen, np.int64).reshape(sequences, tokens), name)


_NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo", "site-packages", "dist-packages"}


def _documentation() -> Iterator[str]:
    """Docstrings of each module whose docstrings are not in the default text; prose before examples."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    seen = {_plain(paragraph) for paragraph in default_text().text.split("\n\n")}
    for path in sorted(stdlib.rglob("*.py")):
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
        hint = f"{did_you_mean(wanted, [SELF, PYTHON, MIXED])}; or hub:ORG/NAME:FILE, or a text file's path"
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
    theirs, ours = (sliding_window_view(np.atleast_2d(ids), PASSAGE, axis=1) for ids in (evaluation, calibration.ids))
    their_hashes, our_hashes = _hashes(theirs), _hashes(ours)
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


def _hashes(runs: np.ndarray) -> np.ndarray:
    """A number for each run of ids, by polynomial modulo 2**64; shape (rows, runs)."""
    hashes = np.zeros(runs.shape[:2], np.uint64)
    for n in range(runs.shape[2]):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + runs[:, :, n].astype(np.uint64)
    return hashes
