"""Statistics of a model's linears that are kept to be used again, and what makes any statistics fit to use.

A folder holds statistics.json (which model, which text), ids.npy (that text's tokens), one safetensors file for each
decoder block and one for the head, with tensors `<linear>.squares`, `.absolute` and, if wanted, `.moments`; and the
squares once more as imatrix.gguf, for llama.cpp. An imatrix.gguf that llama.cpp made does as well as a folder.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from phi3edge import __version__
from phi3edge.errors import CheckpointError, UsageError
from phi3edge.files import new_file, write_text
from phi3edge.imatrix import linears, read_imatrix, write_imatrix
from phi3edge.safetensors_file import TensorEntry, read_header, write
from phi3edge.types import JSON, ModelSpec, Statistics, TensorSpec

NAME, IDS_NAME, IMATRIX_NAME = "statistics.json", "ids.npy", "imatrix.gguf"
MAKE_AGAIN = "phi3edge calibrate makes the folder again"
SCHEMA = 1
PARTS = ("squares", "absolute", "moments")
TOKENS = "tokens"
LEAST_TOKENS = 64
"""An expert that fewer tokens of the calibration text chose is rounded without statistics: they would be noise."""

CLOSE = 1e-3
"""How far, relatively, the diagonal of the moments may be from the squares: they are sums in another order."""

NOT_OF_THE_FUNCTION = ("name", "dtype", "bos_token_id", "eos_token_ids", "pad_token_id", "tensors")
"""Fields of a ModelSpec that activations do not depend on; the tensors are hashed by name and shape instead."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The text that statistics are of.

    Attributes:
        name: for people; no path.
        ids: its token ids, int64, shape (sequences, tokens); None where nobody kept them.
    """

    name: str
    ids: np.ndarray | None = None

    @property
    def sha256(self) -> str | None:
        """Of the ids, row by row, as little-endian int32."""
        return None if self.ids is None else hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()


class SavedStatistics(Mapping[str, Statistics]):
    """Statistics by tensor name, checked. A matrix of moments is mapped, not read, each time one asks for its linear.

    Attributes:
        calibration: the text that they are of.
        notes: one line for everything that was mended or is not there; for the report.
        expert_tokens: how many tokens chose each expert, by layer; empty where that is not known.
    """

    def __init__(
        self,
        held: dict[str, Statistics],
        calibration: Calibration,
        notes: list[str],
        places: Mapping[str, tuple[Path, TensorEntry]] | None = None,
    ) -> None:
        """Without moments, unless `places` says where they are."""
        self._held, self._places = held, places or {}
        self.calibration, self.notes = calibration, notes
        self.expert_tokens: list[list[int]] = []

    def __getitem__(self, name: str) -> Statistics:
        found = self._held[name]
        if name not in self._places:
            return found
        path, entry = self._places[name]
        moments = np.memmap(path, "<f4", "r", entry.offset, entry.shape)
        return replace(found, moments=check_moments(moments, found.squares, f"{path.name}: {name!r}"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def load_statistics(path: Path, spec: ModelSpec, moments: bool = False) -> SavedStatistics:
    """Statistics of a model from a folder that `phi3edge calibrate` wrote, or from an importance matrix in GGUF.

    Args:
        path: the folder or file.
        spec: the model that they must be of.
        moments: whether the second moments are needed.

    Raises:
        UsageError: nothing of that kind there, or of another model, or without moments that are needed, or with
            numbers that `check` refuses.
        CheckpointError: a damaged file.
    """
    if path.is_dir():
        return _load_folder(path, spec, moments)
    if moments:
        raise UsageError(
            f"{path} has mean squares only; second moments are needed",
            "phi3edge calibrate --moments keeps them in a folder",
        )
    file = read_imatrix(path, spec)
    texts = [PureWindowsPath(name).name for name in file.datasets]  # its makers write paths, of either kind
    return _checked(file.statistics, spec, Calibration(", ".join(texts) or path.name), path.name)


def _load_folder(folder: Path, spec: ModelSpec, moments: bool) -> SavedStatistics:
    document = read_document(folder)
    if different := _first_difference(document.model, identity(spec)):
        raise UsageError(
            f"{folder} has statistics of {document.name}, not of {spec.name}: {different}",
            "phi3edge calibrate makes them for this model",
        )
    if moments and not document.moments:
        raise UsageError(
            f"{folder} has no second moments, which are needed", "phi3edge calibrate --moments keeps them too"
        )
    held, places, seen = {}, {}, {}
    for file_name, tensors in files(spec).items():
        entries = _entries(folder / file_name)
        for t in tensors:
            if t.expert is not None:
                seen[t.name] = int(_read(folder / file_name, _entry(entries, file_name, t, TOKENS))[0])
                if seen[t.name] < LEAST_TOKENS:
                    continue
            found = {part: _entry(entries, file_name, t, part) for part in PARTS[: 3 if document.moments else 2]}
            squares, absolute = (_read(folder / file_name, found[part]) for part in PARTS[:2])
            held[t.name] = Statistics(seen.get(t.name, document.tokens), squares, absolute)
            if moments:
                places[t.name] = (folder / file_name, found["moments"])
    calibration = Calibration(document.calibration.name, _read_ids(folder))
    if calibration.sha256 != document.calibration.sha256:
        raise CheckpointError(f"{folder / IDS_NAME} is not what {NAME} says: sha256 {calibration.sha256}", MAKE_AGAIN)
    checked = _checked(held, spec, calibration, str(folder), places)
    for layer in range(spec.layers) if spec.experts else ():
        gates = [t for t in spec.tensors if (t.role, t.layer) == ("ffn_gate", layer)]
        checked.expert_tokens.append([seen[t.name] for t in gates])
    return checked


def _checked(
    held: dict[str, Statistics],
    spec: ModelSpec,
    calibration: Calibration,
    where: str,
    places: Mapping[str, tuple[Path, TensorEntry]] | None = None,
) -> SavedStatistics:
    notes: list[str] = []
    silent: dict[str, int] = {}
    for t in linears(spec):
        if t.name in held:
            held[t.name], count = check(held[t.name], t.shape[1], f"{where}: {t.name!r}")
            silent |= {t.name: count} if count else {}
        elif t.expert is None:
            notes.append(f"No statistics of {t.name}: it is rounded without.")
    experts = {(t.layer, t.expert): t.name in held for t in linears(spec) if t.expert is not None}
    if few := sum(not known for known in experts.values()):
        notes.append(f"{few} of {len(experts)} experts saw too few tokens for statistics: they are rounded without.")
    if silent:
        notes.append(mended(silent))
    return SavedStatistics(held, calibration, notes, places)


def check(statistics: Statistics, columns: int, what: str) -> tuple[Statistics, int]:
    """Refuse statistics that say nothing of a linear, and mend those that say nothing of some of its columns.

    A column that never fired has no mean square and would be free to be rounded to anything, and a matrix of moments
    with it could not be inverted. Such a column counts as the one that fires least: its square, absolute and the
    diagonal of the moments become the least positive ones. Moments of fewer tokens than columns are singular all the
    same; that is what damping is for.

    Args:
        statistics: of one linear; nothing in it is changed.
        columns: inputs of the linear.
        what: names it in an error.

    Returns:
        What to use, and how many columns never fired.

    Raises:
        UsageError: no tokens, another number of columns, NaN, infinity, a negative mean, or no column that ever fired.
    """
    if statistics.tokens < 1:
        raise UsageError(f"{what}: statistics of {statistics.tokens} tokens", "calibrate on more text")
    means = {"squares": statistics.squares, "absolute": statistics.absolute}
    for part, mean in means.items():
        if mean is None:
            continue
        if mean.shape != (columns,):
            raise UsageError(f"{what}: {part} of shape {mean.shape}; the linear has {columns} columns")
        if not np.isfinite(mean).all() or mean.min() < 0:
            column = int(np.argmax(~(np.isfinite(mean) & (mean >= 0))))
            raise UsageError(
                f"{what}: {part} of column {column} is {mean[column]}; expected a finite mean, not negative",
                "calibrate again; if it comes again, the checkpoint overflows in float32",
            )
    never = statistics.squares == 0
    if never.all():
        raise UsageError(f"{what}: no column ever fired", "calibrate on other text")
    moments = statistics.moments
    if moments is not None:
        moments = check_moments(moments, statistics.squares, what)
    if not never.any():
        return replace(statistics, moments=moments), 0
    absolute = statistics.absolute
    squares = _mended(statistics.squares)
    absolute = None if absolute is None else _mended(absolute)
    return Statistics(statistics.tokens, squares, absolute, moments), int(never.sum())


def check_moments(moments: np.ndarray, squares: np.ndarray, what: str) -> np.ndarray:
    """A matrix of second moments that goes with its mean squares; a copy if columns that never fired are mended.

    Raises:
        UsageError: another shape, NaN or infinity, or a diagonal that is not the squares.
    """
    if moments.shape != (len(squares), len(squares)):
        raise UsageError(f"{what}: moments of shape {moments.shape}; the linear has {len(squares)} columns")
    if not all(np.isfinite(row).all() for row in moments):
        raise UsageError(f"{what}: moments hold NaN or infinity", "calibrate again")
    diagonal = np.diagonal(moments)
    never = diagonal == 0
    if not np.allclose(diagonal[~never], squares[~never], rtol=CLOSE, atol=0):
        raise UsageError(f"{what}: the diagonal of its moments is not its mean squares", "calibrate again")
    if not never.any():
        return moments
    moments = np.array(moments)
    np.fill_diagonal(moments, _mended(diagonal))
    return moments


def _mended(means: np.ndarray) -> np.ndarray:
    """Means with the least positive one in the place of zeros."""
    return np.where(means == 0, means[means > 0].min(), means)


def mended(silent: Mapping[str, int]) -> str:
    """What to tell of columns that never fired, by tensor name."""
    first = next(iter(silent))
    others = f" and {len(silent) - 1} other linears" if len(silent) > 1 else ""
    return f"{sum(silent.values())} input columns of {first}{others} never fired: each counts as its linear's least."


def files(spec: ModelSpec) -> dict[str, list[TensorSpec]]:
    """The safetensors files of a folder, and which linears each is of: one file a block, and the head's."""
    by_file: dict[str, list[TensorSpec]] = {}
    for t in linears(spec):
        by_file.setdefault(block_file(t.layer), []).append(t)
    return by_file


def block_file(layer: int | None) -> str:
    """The file of a decoder block, or of the head."""
    return "head.safetensors" if layer is None else f"block-{layer:05d}.safetensors"


def write_block(path: Path, statistics: Mapping[str, Statistics], tokens: Mapping[str, int] | None = None) -> None:
    """Write a block's statistics, by tensor name, into a file that appears whole; `tokens` of experts beside them."""
    arrays = {
        f"{name}.{part}": mean
        for name, found in statistics.items()
        for part in PARTS
        if (mean := getattr(found, part)) is not None
    }
    counts = {f"{name}.{TOKENS}": np.array([count], np.float32) for name, count in (tokens or {}).items()}
    with new_file(path) as file:
        write(file, arrays | counts)


def finish_folder(folder: Path, spec: ModelSpec, name: str, ids: np.ndarray, moments: bool) -> SavedStatistics:
    """Write what a folder has beside its blocks, and read all of it as a user would.

    Args:
        folder: holds the blocks' files.
        spec: the model.
        name: of the calibration text.
        ids: its token ids, int64, shape (sequences, tokens).
        moments: whether the blocks' files have second moments.
    """
    sequences, tokens = ids.shape
    with new_file(folder / IDS_NAME) as file:
        np.save(file, ids.astype("<i4"))
    document = {
        "schema": SCHEMA,
        "name": spec.name,
        "model": identity(spec),
        "calibration": {
            "name": name,
            "sha256": Calibration(name, ids).sha256,
            "sequences": sequences,
            "tokens_per_sequence": tokens,
        },
        "tokens": sequences * tokens,
        "moments": moments,
        "versions": {
            "phi3edge": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": version("torch"),
        },
    }
    write_text(folder / NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    found = load_statistics(folder, spec)
    with new_file(folder / IMATRIX_NAME) as file:
        write_imatrix(file, spec, found, name, sequences, tokens)
    return found


def identity(spec: ModelSpec) -> JSON:
    """What activations depend on, weights aside: the numbers of the model, and its tensors' names and shapes."""
    later = {f.name: f.default for f in fields(spec) if f.default is not MISSING}
    numbers = {
        key: value
        for key, value in asdict(spec).items()
        if key not in NOT_OF_THE_FUNCTION and not (key in later and getattr(spec, key) == later[key])
    }  # of fields that came later, what an earlier folder lacks is the default
    if numbers["rope"]["long_attention_factor"] is None:
        del numbers["rope"]["long_attention_factor"]
    shapes = json.dumps({t.name: t.shape for t in spec.tensors}, sort_keys=True)
    found = {**numbers, "tensors_sha256": hashlib.sha256(shapes.encode()).hexdigest()}
    return json.loads(json.dumps(found))  # as a file gives it back: LongRoPE's factors are lists there


def _first_difference(there: JSON, here: JSON) -> str | None:
    for key, value in here.items():
        if key not in there or there[key] != value:
            return f"{key} is {there.get(key)!r}, expected {value!r}"
    return None


class _Calibration(BaseModel):
    name: str
    sha256: str


class Document(BaseModel):
    """statistics.json: the fields that phi3edge itself reads."""

    version: Literal[1] = Field(alias="schema")
    name: str
    model: JSON
    calibration: _Calibration
    tokens: int = Field(gt=0)
    moments: bool


def read_document(folder: Path) -> Document:
    """The statistics.json of a folder.

    Raises:
        UsageError: there is none, or it is not one.
    """
    path = folder / NAME
    try:
        return Document.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"{folder} has no {NAME}", "expected a folder that phi3edge calibrate wrote, or an imatrix.gguf"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(f"{path} is not what phi3edge calibrate writes: {where}: {first['msg']}") from None


def _read_ids(folder: Path) -> np.ndarray:
    try:
        ids = np.load(folder / IDS_NAME)
    except FileNotFoundError:
        raise UsageError(f"{folder} has no {IDS_NAME}", MAKE_AGAIN) from None
    except (ValueError, EOFError) as error:
        raise CheckpointError(f"{folder / IDS_NAME} cannot be read: {error}", MAKE_AGAIN) from None
    if ids.ndim != 2 or ids.dtype != np.int32:
        raise CheckpointError(f"{folder / IDS_NAME} holds {ids.dtype} of shape {ids.shape}", MAKE_AGAIN)
    return ids.astype(np.int64)


def _entries(path: Path) -> dict[str, TensorEntry]:
    try:
        with path.open("rb") as file:
            return read_header(file, path.name)
    except FileNotFoundError:
        raise UsageError(f"{path.parent} has no {path.name}", MAKE_AGAIN) from None


def _entry(entries: Mapping[str, TensorEntry], file_name: str, tensor: TensorSpec, part: str) -> TensorEntry:
    name, columns = f"{tensor.name}.{part}", tensor.shape[1]
    shape = {"moments": (columns, columns), TOKENS: (1,)}.get(part, (columns,))
    entry = entries.get(name)
    if entry is None:
        raise CheckpointError(f"{file_name} lacks {name!r}", MAKE_AGAIN)
    if entry.shape != shape or entry.dtype != "F32":
        raise CheckpointError(f"{file_name}: {name!r} is {entry.dtype} of shape {entry.shape}; expected F32 {shape}")
    return entry


def _read(path: Path, entry: TensorEntry) -> np.ndarray:
    return np.fromfile(path, "<f4", entry.nbytes // 4, offset=entry.offset).reshape(entry.shape)
