"""A checkpoint in Hugging Face layout: config.json and safetensors, read by header and offset.

Opening one reads headers only. After that any thread may read any rows of any tensor: each shard is open once, each
read names its own position, and nothing is kept. Weights that are not finite are refused as they pass.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from phi3edge import prequantized, registry
from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.safetensors_file import DTYPE_BYTES, TensorEntry, parse_object, read_header
from phi3edge.types import JSON, ModelSpec, Quantized, Source, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIG, GENERATION_CONFIG, MODEL_CARD = "config.json", "generation_config.json", "README.md"
INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
RANKS = "cl100k_base.tiktoken"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    RANKS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
SMALL_FILES = (CONFIG, GENERATION_CONFIG, MODEL_CARD, INDEX, *TOKENIZER_FILES)
"""Everything that an export reads besides weights."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PICKLE_HINT = (
    "convert it on a machine where you trust it: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)"
)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PIECE = 1 << 17
"""Elements read and converted at a time: small enough to stay in a core's cache between the two."""

SLAB = 1 << 20
"""Bytes read at a time where only some columns are wanted."""

LOCAL = Source(None, None)
"""A folder of unknown origin."""


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A float dtype by its bits: `bits` is the unsigned integer of its size, `infinity` the pattern of +inf."""

    config_name: str
    bits: type[np.unsignedinteger]
    signed: type[np.signedinteger]
    infinity: int

    @property
    def sign(self) -> int:
        """The sign bit."""
        return 1 << (8 * np.dtype(self.bits).itemsize - 1)


FLOATS = {
    "BF16": FloatFormat("bfloat16", np.uint16, np.int16, 0x7F80),
    "F16": FloatFormat("float16", np.uint16, np.int16, 0x7C00),
    "F32": FloatFormat("float32", np.uint32, np.int32, 0x7F800000),
}
"""The dtypes that weights may have."""


def _widen_bf16(bits: NDArray[Any], out: NDArray[np.float32]) -> None:
    """A bfloat16 is the upper half of the float32 of the same value."""
    wide = out.view(np.uint32)
    np.copyto(wide, bits)
    np.left_shift(wide, 16, out=wide)


def _widen_f16(bits: NDArray[Any], out: NDArray[np.float32]) -> None:
    """Sign, exponent and fraction moved to their places in a float32; 112 is the difference of the exponents' biases.

    Several times as fast as numpy's own conversion, and exact for subnormal numbers too. Infinities do not come here.
    """
    wide = out.view(np.int32)
    np.copyto(wide, bits.view(np.int16))
    np.left_shift(wide, 13, out=wide)
    np.bitwise_and(wide, np.int32(0x8FFFE000 - 2**32), out=wide)
    np.multiply(out, np.float32(2.0**112), out=out)


def _read_in_place(bits: NDArray[Any], out: NDArray[np.float32]) -> None:
    """A float32 was read straight into `out`."""


WIDEN = {"BF16": _widen_bf16, "F16": _widen_f16, "F32": _read_in_place}
"""From finite bits to float32, without temporary arrays, in numpy calls that let other threads run."""


class Checkpoint:
    """An open checkpoint. Use as a context manager, or call `close`.

    Attributes:
        path: its folder.
        source: where it came from; its licence is the model card's.
        config: config.json.
        generation_config: generation_config.json, or None.
        integers: how its linears are stored, if not as floats.
        shards: the weight files, in name order.
        names: all tensors, in shard order and, within a shard, in the order of their data.
    """

    def __init__(self, path: Path, source: Source = LOCAL) -> None:
        """Open a folder; see `open_checkpoint`."""
        self.path = path
        self.config = read_json(path, CONFIG)
        self.generation_config = read_json(path, GENERATION_CONFIG) if (path / GENERATION_CONFIG).exists() else None
        refuse_foreign_code(self.config)
        self.integers = prequantized.parse(self.config)
        for name in SMALL_FILES:
            inside(path, name)
        self.source = replace(source, licence=source.licence or _licence(path))
        self.shards, indexed = _shards(path)
        self._entries: dict[str, TensorEntry] = {}
        self._files: dict[str, BinaryIO] = {}
        self._ranges: dict[str, list[tuple[int, int]]] = {}
        self._seek_lock = threading.Lock()
        with ExitStack() as opened:
            for shard in self.shards:
                self._open_shard(shard, opened.enter_context(shard.open("rb", buffering=0)))
            if indexed is not None:
                self._check_index(indexed)
            self._opened = opened.pop_all()
        self.names = tuple(self._entries)

    @property
    def name(self) -> str:
        """The model's name, for people."""
        return model_name(self.path, self.source)

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype ("BF16", "F16", "F32" ...) and shape of a tensor."""
        entry = self._entry(name)
        return entry.dtype, entry.shape

    def read(self, name: str) -> NDArray[np.float32]:
        """A whole tensor as float32, in its own shape."""
        shape = self._sides(name) if self._is_integers(name) else self._entry(name).shape
        return self.rows(name, 0, _matrix(shape)[0]).reshape(shape)

    def rows(self, name: str, start: int, stop: int, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) of a tensor as float32. May be called from several threads at once.

        Args:
            name: a tensor; one of shape (n,) is one row of n columns; one stored as integers is dequantized.
            start: first row.
            stop: one after the last row.
            out: where to put them, shape (stop - start, columns), contiguous; else a new array.

        Raises:
            CheckpointError: no such tensor, a dtype that is no float, a weight that is NaN or infinite, or a file that
                became shorter since it was opened.
        """
        if self._is_integers(name):
            weight = prequantized.dequantize(self.codes(name, start, stop))
            if out is None:
                return weight
            np.copyto(out, weight)
            return out
        found = self._floats(name, start, stop, out)
        self._ranges.setdefault(name, []).append((start, stop))
        return found

    def column_means(self, name: str) -> NDArray[np.float32]:
        """The mean of each column of a tensor of floats, summed in float64; shape (columns,).

        It takes no more memory than a few rows, and does not count as reading for `each_read_once`.
        """
        rows, columns = _matrix(self._entry(name).shape)
        step = max(1, 8 * PIECE // columns)
        buffer, total = np.empty((min(step, rows), columns), np.float32), np.zeros(columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            total += self._floats(name, start, stop, buffer[: stop - start]).sum(0, dtype=np.float64)
        return (total / rows).astype(np.float32)

    def _floats(self, name: str, start: int, stop: int, out: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """See `rows`."""
        entry, columns, begin = self._locate(name, start, stop)
        kind = self._float_format(name)
        out = np.empty((stop - start, columns), np.float32) if out is None else out
        if out.shape != (stop - start, columns) or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise ValueError(f"out must be contiguous float32 of shape {(stop - start, columns)}")
        flat = out.reshape(-1)
        bits = np.empty(0 if entry.dtype == "F32" else min(PIECE, flat.size), kind.bits)
        for first in range(0, flat.size, PIECE):
            target = flat[first : first + PIECE]
            piece = target.view(np.uint32) if entry.dtype == "F32" else bits[: target.size]
            self._read_at(name, begin + first * piece.itemsize, piece)
            _check_finite(name, piece, kind, start * columns + first, columns)
            WIDEN[entry.dtype](piece, target)
        return out

    def raw(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Rows [start, stop) as they are stored: uint8 (stop - start, columns * bytes per element). See `rows`."""
        entry, columns, begin = self._locate(name, start, stop)
        data = np.empty((stop - start, columns * DTYPE_BYTES[entry.dtype]), np.uint8)
        self._read_at(name, begin, data.reshape(-1))
        if kind := FLOATS.get(entry.dtype):
            _check_finite(name, data.reshape(-1).view(kind.bits), kind, start * columns, columns)
        self._ranges.setdefault(name, []).append((start, stop))
        return data

    def codes(self, name: str, start: int, stop: int) -> Quantized:
        """Rows [start, stop) of a linear that is stored as integers, as they are. May be called from several threads.

        Returns:
            codes uint8 (rows, columns), scales float32 and zero points uint8 (rows, blocks), on the grid that
            phi3edge.prequantized names, always with zero points.

        Raises:
            CheckpointError, UnsupportedError: see `check`.
        """
        rows, columns = self._sides(name)
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start} to {stop} of tensor {name!r}, which has {rows}")
        words = self._layout.words(start, stop)
        first = words.start * self._layout.per_word
        qweight = self._columns(_part(name, "qweight"), self._layout.columns(words))
        scales, zero_points = self._blocks(name, words)
        kept = slice(start - first, stop - first)
        self._ranges.setdefault(name, []).append((start, stop))
        grid = f"uint{self._layout.bits}_b{columns // scales.shape[1]}"
        return Quantized(grid, self._layout.codes(qweight)[kept], scales[kept], zero_points=zero_points[kept])

    def check(self, spec: ModelSpec) -> None:
        """Every tensor of the model is there with its shape and dtype, and nothing else is but tensors for images.

        Linears that are stored as integers have scales, zero points and an order of inputs that the grid of the
        model's spec holds exactly; biases beside them, as older tools write them, are 0.

        Dtypes: matrices have the one that config.json names or, if it names none, all the same; BF16, F16 or F32. A
        vector (norm gain) may be F32 beside narrower matrices, as some trainers save it: that loses nothing.
        A tied model may also store its head if it is, byte for byte, the embedding, as older savers wrote it.

        Raises:
            CheckpointError: names the tensor, what was expected and what is there.
            UnsupportedError: integers that no grid holds: inputs out of order, or zero points beyond the codes.
        """
        integers = [tensor for tensor in spec.tensors if tensor.grid is not None]
        expected = {tensor.name: tensor.shape for tensor in spec.tensors if tensor.grid is None}
        parts = {_part(t.name, part): shape for t in integers for part, shape in self._layout.parts(t).items()}
        for name, shape in (expected | parts).items():
            if name not in self._entries:
                hint = "config.json does not say tie_word_embeddings: true" if name == HEAD else None
                if self.integers is None and _part(name, "qweight") in self._entries:
                    hint = f"{_part(name, 'qweight')!r} is there; config.json has no {prequantized.KEY} to read it by"
                raise CheckpointError(f"tensor {name!r} is missing from {self.path}", hint)
            if self._entries[name].shape != shape:
                got = self._entries[name].shape
                raise CheckpointError(f"tensor {name!r} has shape {got}, config.json says {shape}")
        biases, twice = {_part(t.name, "bias") for t in integers}, {t.name for t in integers}
        for name in self.names:
            if name in expected or name in parts or (spec.images is not None and name.startswith(spec.images)):
                continue
            if name in biases:
                self._check_no_bias(name)
                continue
            if name in twice:
                raise CheckpointError(f"{name!r} and {_part(name, 'qweight')!r} are both there; expected one of them")
            if not (spec.tied and name == HEAD):
                raise CheckpointError(
                    f"unknown tensor {name!r} of shape {self._entries[name].shape}: no part of a {spec.family} model",
                    "the layout must be the original one, with its names and fused tensors; adapters are merged first",
                )
            self._check_tied_head()
        self._check_dtypes(tuple(expected))
        for tensor in integers:
            self._check_integers(tensor)

    @contextmanager
    def each_read_once(self, spec: ModelSpec) -> Iterator[None]:
        """Within the context, every row of every tensor of the model must be read exactly once.

        Raises:
            CheckpointError: on leaving, unless an error is under way: names a tensor that was read in part, or twice.
        """
        self._ranges.clear()
        yield
        for tensor in spec.tensors:
            position, rows = 0, _matrix(tensor.shape)[0]
            for start, stop in sorted(self._ranges.get(tensor.name, [])):
                if start != position:
                    fault = "was read twice" if start < position else "was not read"
                    raise CheckpointError(f"tensor {tensor.name!r}: row {min(start, position)} {fault}")
                position = stop
            if position != rows:
                raise CheckpointError(f"tensor {tensor.name!r}: {position} of {rows} rows were read")
        if extra := self._ranges.keys() - {tensor.name for tensor in spec.tensors}:
            raise CheckpointError(f"tensor {min(extra)!r} was read, and is not in the plan")

    def close(self) -> None:
        """Close the shards."""
        self._opened.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open_shard(self, shard: Path, file: BinaryIO) -> None:
        for name, entry in read_header(file, shard.name).items():
            if name in self._files:
                raise CheckpointError(f"tensor {name!r} is in two shards: {self._shard(name)} and {shard.name}")
            self._entries[name], self._files[name] = entry, file

    def _check_index(self, indexed: dict[str, str]) -> None:
        """The index and the shards name the same tensors in the same places."""
        for name, shard in indexed.items():
            if name not in self._files or self._shard(name) != shard:
                raise CheckpointError(f"{INDEX} says that tensor {name!r} is in {shard}; it is not")
        for name in self._entries:
            if name not in indexed:
                raise CheckpointError(f"tensor {name!r} of {self._shard(name)} is not in {INDEX}")

    def _check_dtypes(self, names: tuple[str, ...]) -> None:
        said = {key: self.config[key] for key in ("dtype", "torch_dtype") if self.config.get(key) is not None}
        if len(set(map(str, said.values()))) > 1:
            raise CheckpointError(f"config.json: dtype is {said['dtype']!r}, torch_dtype is {said['torch_dtype']!r}")
        expected = str(next(iter(said.values()))) if said else None
        origin = "config.json says"
        for name in names:
            entry, kind = self._entries[name], self._float_format(name)
            if len(entry.shape) == 1 and entry.dtype == "F32":
                continue
            if expected is None:
                expected, origin = kind.config_name, f"{name!r} has"
            if kind.config_name != expected:
                raise CheckpointError(
                    f"tensor {name!r} is {entry.dtype} ({kind.config_name}), {origin} {expected}",
                    "save the model again in one dtype, or correct torch_dtype in config.json",
                )

    @property
    def _layout(self) -> prequantized.Prequantized:
        """How linears are stored, where some are stored as integers."""
        assert self.integers is not None
        return self.integers

    def _check_integers(self, tensor: TensorSpec) -> None:
        """A linear's scales, zero points and groups are what the grid of its spec holds."""
        for part in self._layout.parts(tensor):
            name = _part(tensor.name, part)
            dtype, known = self._entries[name].dtype, tuple(FLOATS) if part == "scales" else ("I32",)
            if dtype not in known:
                raise CheckpointError(f"tensor {name!r} has dtype {dtype}; expected {' or '.join(known)}")
        self._blocks(tensor.name, self._layout.words(0, tensor.shape[0]))

    def _check_no_bias(self, name: str) -> None:
        if self.read(name).any():
            raise UnsupportedError(f"tensor {name!r} is not 0: the family's linears have no bias")

    def _check_tied_head(self) -> None:
        """A stored head of a tied model must be the embedding's bytes: anything else is a model of two minds."""
        same = self.info(HEAD) == self.info(EMBEDDING)
        rows, columns = _matrix(self._entry(HEAD).shape)
        step = max(1, PIECE * 4 // max(columns, 1))
        for start in range(0, rows if same else 0, step):
            stop = min(start + step, rows)
            same = same and np.array_equal(self.raw(HEAD, start, stop), self.raw(EMBEDDING, start, stop))
        if not same:
            raise CheckpointError(
                f"config.json says tie_word_embeddings: true, but {HEAD!r} is stored and is not {EMBEDDING!r}",
                "set tie_word_embeddings to false if the stored head is the right one, else delete it",
            )

    def _is_integers(self, name: str) -> bool:
        return self.integers is not None and _part(name, "qweight") in self._entries

    def _sides(self, name: str) -> tuple[int, int]:
        """Rows and columns (outputs and inputs) of a linear that is stored as integers."""
        return self._layout.sides(self._entry(_part(name, "qweight")).shape)

    def _blocks(self, name: str, words: range) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Scales and zero points of the outputs in some words of a linear, (outputs, blocks); see `check`."""
        scales, groups = _part(name, "scales"), _part(name, "g_idx")
        bits = self._columns(scales, self._layout.outputs(words))
        kind = self._float_format(scales)
        _check_finite(scales, bits.reshape(-1), kind, 0, bits.shape[1])
        values = bits.view(np.float32) if kind.config_name == "float32" else np.empty(bits.shape, np.float32)
        WIDEN[self._entries[scales].dtype](bits, values)
        qzeros = self._columns(_part(name, "qzeros"), words)
        g_idx = None
        if groups in self._entries:
            g_idx = np.empty(self._entries[groups].shape, np.int32)
            self._read_at(groups, self._entries[groups].offset, g_idx)
        return self._layout.blocks(name.removesuffix(".weight"), self._sides(name)[1], values, qzeros, g_idx)

    def _columns(self, name: str, columns: range) -> NDArray[Any]:
        """Some columns of a matrix as they are stored, as unsigned integers: (rows, len(columns))."""
        entry = self._entry(name)
        rows, width = entry.shape
        dtype = np.dtype(f"<u{DTYPE_BYTES[entry.dtype]}")
        out = np.empty((rows, len(columns)), dtype)
        slab = np.empty((max(1, SLAB // (width * dtype.itemsize)), width), dtype)
        for first in range(0, rows, len(slab)):
            piece = slab[: rows - first]
            self._read_at(name, entry.offset + first * width * dtype.itemsize, piece.reshape(-1))
            out[first : first + len(piece)] = piece[:, columns.start : columns.stop]
        return out

    def _shard(self, name: str) -> str:
        return Path(self._files[name].name).name

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise CheckpointError(f"no tensor {name!r} in {self.path}")
        return self._entries[name]

    def _float_format(self, name: str) -> FloatFormat:
        dtype = self._entry(name).dtype
        if dtype not in FLOATS:
            raise CheckpointError(
                f"tensor {name!r} has dtype {dtype}; weights are {', '.join(FLOATS)}",
                "a quantized checkpoint cannot be exported: start from the original weights",
            )
        return FLOATS[dtype]

    def _locate(self, name: str, start: int, stop: int) -> tuple[TensorEntry, int, int]:
        """The tensor, its columns, and where in the file its row `start` begins."""
        entry = self._entry(name)
        rows, columns = _matrix(entry.shape)
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows {start} to {stop} of tensor {name!r}, which has {rows}")
        return entry, columns, entry.offset + start * columns * DTYPE_BYTES[entry.dtype]

    def _read_at(self, name: str, offset: int, buffer: NDArray[Any]) -> None:
        """Fill a contiguous one-dimensional buffer from a position in the tensor's shard."""
        file, view, done = self._files[name], buffer.view(np.uint8), 0
        while done < view.size:
            if hasattr(os, "preadv"):
                count = os.preadv(file.fileno(), [view[done:].data], offset + done)
            else:  # Windows has no positioned read
                with self._seek_lock:
                    file.seek(offset + done)
                    count = file.readinto(view[done:].data)  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError(f"{file.name} became shorter while tensor {name!r} was read")
            done += count


def open_checkpoint(path: Path, source: Source = LOCAL) -> Checkpoint:
    """Open a local folder: config.json and either model.safetensors or an index with its shards.

    Raises:
        CheckpointError: not such a folder, or a file in it that is damaged, unsafe to read or contradicts another.
        UnsupportedError: a model that would need the repository's own code, or a family that phi3edge does not know.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder", "name the folder that holds config.json and the weights")
    return Checkpoint(path, source)


def model_name(folder: Path, source: Source) -> str:
    """For people: the hub name without the organization, else the folder's name."""
    return (source.repository or folder.resolve().name).rsplit("/", 1)[-1]


def weight_files(index: JSON | None) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """Names of the weight files, and which tensor the index says is in which; without an index, the single file.

    Raises:
        CheckpointError: the index is not one, or names files outside its folder.
    """
    if index is None:
        return (SINGLE_FILE,), None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX}: weight_map is missing or empty")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise CheckpointError(f"{INDEX}: tensor {name!r} is in {shard!r}; expected a .safetensors file beside it")
    return tuple(sorted(set(weight_map.values()))), weight_map


def no_safetensors(where: str, names: list[str]) -> CheckpointError:
    """The error for a folder or repository that has neither model.safetensors nor an index."""
    if pickles := sorted(n for n in names if n.endswith(PICKLES)):
        message = f"{where} has its weights as a pickle ({pickles[0]}), which can run code when it is read"
        return CheckpointError(message, PICKLE_HINT)
    if "adapter_config.json" in names:
        return CheckpointError(f"{where} is an adapter, not a model", "merge it into its base model and save that")
    if shards := sorted(n for n in names if n.endswith(".safetensors")):
        return CheckpointError(f"{where} has {shards[0]}, but neither {SINGLE_FILE} nor {INDEX}")
    return CheckpointError(f"{where} has no weights: neither {SINGLE_FILE} nor {INDEX}")


def _shards(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    for name in (INDEX, SINGLE_FILE):
        if (folder / name).is_symlink() and not (folder / name).exists():
            raise CheckpointError(f"{folder / name} is a link to a file that is gone", "get the file again")
    index = read_json(folder, INDEX) if (folder / INDEX).exists() else None
    if index is not None and (folder / SINGLE_FILE).exists():
        raise CheckpointError(f"{folder} has both {SINGLE_FILE} and {INDEX}", "delete the one that is not the model")
    if index is None and not (folder / SINGLE_FILE).exists():
        raise no_safetensors(str(folder), [p.name for p in folder.iterdir()])
    names, weight_map = weight_files(index)
    for name in names:
        if not (folder / name).is_file():
            if weight_map is None:
                raise CheckpointError(f"{folder / name} is not a file")
            raise CheckpointError(f"{INDEX} names {name}, which is not in {folder}", "the download is incomplete")
    return tuple(inside(folder, name) for name in names), weight_map


def read_json(folder: Path, name: str) -> JSON:
    """A JSON object of a checkpoint's folder; CheckpointError if there is none or it is not one."""
    path = inside(folder, name)
    try:
        return parse_object(path.read_bytes(), name)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {name}", "a checkpoint is a folder in Hugging Face layout") from None


def inside(folder: Path, name: str) -> Path:
    """The file, if its real place is in the folder, or in the blobs of the hub cache that the folder is part of."""
    real, home = (folder / name).resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--"):
        allowed += [home.parents[1] / "blobs", home.parents[2] / "blobs"]
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{folder / name} is a link to {real}, outside the folder", "put the file itself there")
    return folder / name


def refuse_foreign_code(config: JSON) -> None:
    """Raise UnsupportedError for a model that phi3edge does not compute itself; an auto_map is never followed."""
    family, families = config.get("model_type"), registry.names("families")
    if family in families:
        return
    if family is None:
        raise UnsupportedError("config.json: model_type is missing", f"known: {', '.join(families)}")
    if config.get("auto_map"):
        raise UnsupportedError(
            f"config.json: model_type {family!r} needs code of the repository (trust_remote_code), which is never run",
            f"families that phi3edge computes itself: {', '.join(families)}",
        )
    raise UnsupportedError(f"config.json: model_type is {family!r}", registry.did_you_mean(str(family), families))


def _licence(folder: Path) -> str | None:
    """The licence that the model card's front matter names."""
    card = folder / MODEL_CARD
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    if not (front := re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)):
        return None
    named = dict(re.findall(r"^(license(?:_name)?):[ \t]*[\"']?([^\s\"'\[\]]+)", front[1], re.MULTILINE))
    return named.get("license_name") if named.get("license") == "other" else named.get("license")


def cached_source(folder: Path) -> Source:
    """Repository and commit of a folder in the hub's cache (models--org--name/snapshots/commit); else nothing."""
    home = folder.resolve()
    cached = re.fullmatch(r"models--(.+?)--(.+)", home.parent.parent.name)
    if home.parent.name != "snapshots" or not cached:
        return Source(None, None)
    return Source(f"{cached[1]}/{cached[2]}", home.name)


def _part(name: str, part: str) -> str:
    """The name of one of the tensors that a linear is stored as."""
    return f"{name.removesuffix('.weight')}.{part}"


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns: the last dimension is the columns."""
    columns = shape[-1] if shape else 1
    return prod(shape[:-1]), columns


def _check_finite(name: str, bits: NDArray[Any], kind: FloatFormat, first: int, columns: int) -> None:
    """Raise if the bits of any weight are a NaN or an infinity: an exponent of all ones, of either sign.

    `bits` is one-dimensional; its element 0 is element `first` of the tensor.
    """
    if bits.size == 0 or (bits.max() < kind.sign | kind.infinity and bits.view(kind.signed).max() < kind.infinity):
        return
    bad = first + int(np.argmax(np.bitwise_and(bits, kind.bits(kind.infinity)) == kind.infinity))
    raise CheckpointError(
        f"tensor {name!r} holds NaN or infinity, first in row {bad // columns}, column {bad % columns}",
        "the checkpoint is damaged, or its training diverged",
    )
