"""Statistics of a checkpoint's linears on a text: the float model, one decoder block at a time.

Between two blocks the hidden states of the whole set lie in a file. While a block runs, its own weights, its sums and
the states of a few sequences are in memory; nothing else, however deep the model. What is finished is on the disk:

    block N's statistics get their name, then the states that come out of it, then the states that went in are removed

so that a run that is interrupted goes on at the block that it was in, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from phi3edge.errors import MissingExtraError, OutputError, UnsupportedError, UsageError
from phi3edge.families import parse_config
from phi3edge.files import new_file, take_place, write_text
from phi3edge.progress import Advance, Stages, reporting, silent
from phi3edge.reference import fingerprint
from phi3edge.sources import resolve
from phi3edge.statistics import (
    IDS_NAME,
    IMATRIX_NAME,
    LEAST_TOKENS,
    NAME,
    SavedStatistics,
    block_file,
    check,
    files,
    finish_folder,
    identity,
    read_document,
    write_block,
)
from phi3edge.types import JSON, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from phi3edge.accumulate import Accumulator
    from phi3edge.checkpoint import Checkpoint
    from phi3edge.forward import Decoder

BATCH_TOKENS = 2048
"""Tokens that are computed at once."""

STATE = "state.json"


@dataclass(frozen=True, slots=True)
class Collected:
    """A finished folder of statistics, what is in it, and what should be known about it."""

    folder: Path
    model: str
    statistics: SavedStatistics
    moments: bool
    notes: list[str]


def calibrate(
    name: str,
    *,
    calibration: str | None = None,
    sequences: int = 128,
    tokens: int = 512,
    moments: bool = False,
    device: str = "cpu",
    out: Path | None = None,
    force: bool = False,
    stages: Stages = silent,
) -> Collected:
    """Collect the statistics of a checkpoint and keep them in a folder.

    Args:
        name: "org/name[@revision]", a local folder, or "demo".
        calibration: the text; see `phi3edge.calibration.calibration_text`.
        sequences: how many sequences of it.
        tokens: tokens of each.
        moments: whether to keep second moments: 4 * columns**2 bytes for each linear.
        device: "cpu" or "cuda".
        out: the folder; None for dist/<model>-statistics.
        force: replace an earlier folder of statistics.
        stages: shows progress.

    Raises:
        Phi3EdgeError: see the subclasses. An interrupted run leaves what is finished beside `out`; the same call goes
            on there.
    """
    require_device(device)
    from phi3edge.calibration import calibration_text, require_writer

    with reporting(stages) as told:
        source = resolve(name, told)
    with source:
        spec = parse_config(source.config, source.generation_config, source.name)
        source.check(spec)
        if any(t.grid for t in spec.tensors):
            raise UnsupportedError(f"{source.name} is quantized already: its linears are not rounded again")
        require_writer(spec, calibration)
        if spec.experts:
            _require_plain(moments, device)
        folder = (out or Path("dist") / f"{spec.name.lower()}-statistics").resolve()
        _require_free(folder, force)
        text = calibration_text(calibration, source.path, spec, sequences, tokens, device=device, stages=stages)
        work = work_folder(folder)
        collect(source, spec, text.ids, work, moments, device, stages)
        statistics = finish_folder(work, spec, text.name, text.ids, moments)
        _require_free(folder, force)
        take_place(work, folder)
        (folder / STATE).unlink()
    notes = [text.note] if text.note else []
    return Collected(out or folder, spec.name, statistics, moments, notes + statistics.notes)


def work_folder(folder: Path) -> Path:
    """Where the statistics for a folder lie until all are there: beside it."""
    return folder.with_name(f".{folder.name}.work")


def require_device(device: str) -> None:
    """Raise unless torch is there and can compute on the device.

    Raises:
        MissingExtraError: no torch, or no transformers for the tokenizer.
        UsageError: an unknown device, or no CUDA.
    """
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        raise MissingExtraError("calibration", "reference")
    import torch

    if device not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}", "cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU", "--device cpu, or a torch that is built for this GPU")


def _require_plain(moments: bool, device: str) -> None:
    """Raise for what is not done with a mixture of experts.

    Raises:
        UnsupportedError: names it.
    """
    if moments or device != "cpu":
        what = "second moments are" if moments else f"--device {device} is"
        raise UnsupportedError(f"{what} not for a mixture of experts", "leave the option out")


def _require_free(folder: Path, force: bool) -> None:
    """Raise unless the folder is not there, or is one of statistics and `force` is set.

    Raises:
        OutputError: it is in the way.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or not (folder / NAME).is_file():
        raise OutputError(f"{folder} is no folder of statistics; it is never replaced", "choose another --out")
    layers = read_document(folder).model.get("layers", 0)
    ours = {STATE, NAME, IDS_NAME, IMATRIX_NAME, block_file(None), *map(block_file, range(layers))}
    if strange := sorted({path.name for path in folder.iterdir()} - ours):
        raise OutputError(f"{folder} holds {strange[0]}, which is not of its statistics", "choose another --out")
    if not force:
        raise OutputError(f"{folder} exists", "--force replaces it, --out writes elsewhere")


def collect(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    ids: np.ndarray,
    work: Path,
    moments: bool = False,
    device: str = "cpu",
    stages: Stages = silent,
) -> None:
    """Run the float model over the calibration set and write the statistics of each block into a file of its own.

    Args:
        checkpoint: the weights.
        spec: the model.
        ids: token ids, int64, shape (sequences, tokens).
        work: the folder to write; made if it is missing. If it holds the beginning of the same work, that is gone on
            with; the beginning of another is removed.
        moments: whether to keep second moments.
        device: where to compute.
        stages: shows progress, in sequences times blocks.

    Raises:
        UsageError: ids that the model does not take, or activations that are no numbers; see `statistics.check`.
        OutputError: the folder holds something else, or the disk is full.
    """
    import torch

    from phi3edge.mixture import MixtureDecoder
    from phi3edge.phi3small import decoder_of

    _check_ids(ids, spec)
    _begin(
        work, {"model": identity(spec), "weights": fingerprint(checkpoint.path), "ids": _hash(ids), "moments": moments}
    )
    if spec.experts:
        run: _Run = _MixtureRun(checkpoint, spec, ids, work, moments, MixtureDecoder(spec))
    else:
        run = _Run(checkpoint, spec, ids, work, moments, decoder_of(spec, device))
    with torch.inference_mode(), stages("statistics", (spec.layers + 1) * len(ids)) as advance:
        if not (work / block_file(None)).exists():
            start = run.newest()
            if start is None:
                start = run.embed()
            advance(start * len(ids))
            for layer in range(start, spec.layers):
                run.block(layer, advance)
            run.head(advance)
    for path in work.glob("hidden-*"):
        path.unlink()


@dataclass(frozen=True)
class _Run:
    """One calibration set on its way through the model."""

    checkpoint: Checkpoint
    spec: ModelSpec
    ids: np.ndarray
    work: Path
    moments: bool
    decoder: Decoder

    BATCH: ClassVar[int] = BATCH_TOKENS

    def hidden(self, layer: int) -> Path:
        """The hidden states that go into a block, float32 (sequences, tokens, hidden); the last go into the head."""
        return self.work / f"hidden-{layer:05d}.f32"

    def newest(self) -> int | None:
        """The block that the furthest hidden states go into."""
        return next((n for n in reversed(range(self.spec.layers + 1)) if self.hidden(n).exists()), None)

    def embed(self) -> int:
        from phi3edge.forward import load_outer

        embedding = load_outer(self.checkpoint, self.spec, "embedding")
        with new_file(self.hidden(0)) as file:
            for part in self.batches():
                file.write(self.decoder.embed(embedding[self.ids[part]]).numpy().data)
        return 0

    def block(self, layer: int, advance: Advance) -> None:
        """Run one block: its statistics, then what comes out of it."""
        from phi3edge.accumulate import Accumulator
        from phi3edge.forward import LINEARS, load_block

        weights = load_block(self.checkpoint, self.spec, layer, self.decoder.device)
        sums = {r: Accumulator(weights[r].shape[1], self.moments, self.decoder.device) for r in LINEARS}
        with new_file(self.hidden(layer + 1)) as file:
            for part in self.batches():
                h = self.decoder.block(self.read(layer, part), weights, lambda role, x: sums[role].add(x), layer)
                file.write(h.cpu().numpy().data)
                advance(len(h))
            self.write(layer, sums)
        self.hidden(layer).unlink()

    def head(self, advance: Advance) -> None:
        """What the head sees: the last hidden states, normed."""
        from phi3edge.accumulate import Accumulator
        from phi3edge.forward import load_outer

        roles = [t.role for t in self.spec.tensors if t.role.startswith("output_norm")]
        outer = {role: load_outer(self.checkpoint, self.spec, role, self.decoder.device) for role in roles}
        sums = Accumulator(self.spec.hidden_size, self.moments, self.decoder.device)
        for part in self.batches():
            h = self.read(self.spec.layers, part)
            sums.add(self.decoder.normed("output_norm", h, outer))
            advance(len(h))
        self.write(None, {"embedding" if self.spec.tied else "head": sums})

    def batches(self) -> Iterator[slice]:
        """The sequences, a few at a time: the same ones each time."""
        count, tokens = self.ids.shape
        step = max(1, self.BATCH // tokens)
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def read(self, layer: int, part: slice) -> Tensor:
        """Hidden states of some sequences."""
        import torch

        shape = (part.stop - part.start, self.ids.shape[1], self.spec.hidden_size)
        per_sequence = shape[1] * shape[2]
        path = self.hidden(layer)
        found = np.fromfile(path, np.float32, shape[0] * per_sequence, offset=4 * part.start * per_sequence)
        return torch.from_numpy(found.reshape(shape)).to(self.decoder.device)

    def write(self, layer: int | None, sums: Mapping[str, Accumulator]) -> None:
        """Check and keep the statistics of a block or of the head, from sums by role."""
        found = {}
        for t in files(self.spec)[block_file(layer)]:
            found[t.name] = sums[t.role].statistics()
            check(found[t.name], t.shape[1], t.name)
        write_block(self.work / block_file(layer), found)


INPUT_OF = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}
"""Roles that read what another one reads, which is observed."""


@dataclass(frozen=True)
class _MixtureRun(_Run):
    """The same for a mixture of experts: of its weights those of one expert are in memory at a time.

    They are read again for every batch, so batches are larger. An expert is observed on the tokens that chose it.
    """

    BATCH: ClassVar[int] = 8 * BATCH_TOKENS

    def block(self, layer: int, advance: Advance) -> None:
        """Run one block: its statistics, then what comes out of it."""
        from phi3edge.accumulate import Accumulator
        from phi3edge.mixture import Mixture

        model = Mixture(self.checkpoint, self.spec, keep=False)
        sums: dict[tuple[str, int | None], Accumulator] = {}

        def observe(role: str, expert: int | None, x: Tensor) -> None:
            sums.setdefault((role, expert), Accumulator(x.shape[-1], False)).add(x)

        with new_file(self.hidden(layer + 1)) as file:
            for part in self.batches():
                h, _ = model.block(self.read(layer, part), layer, observe)
                file.write(h.numpy().data)
                advance(len(h))
            found, tokens = {}, {}
            for t in files(self.spec)[block_file(layer)]:
                seen = sums.get((INPUT_OF.get(t.role, t.role), t.expert))
                if t.expert is not None:
                    tokens[t.name] = seen.tokens if seen else 0
                if seen and (t.expert is None or seen.tokens >= LEAST_TOKENS):
                    found[t.name] = seen.statistics()
                    check(found[t.name], t.shape[1], t.name)
            write_block(self.work / block_file(layer), found, tokens)
        self.hidden(layer).unlink()

    def head(self, advance: Advance) -> None:
        """What the head sees: the last hidden states, normed."""
        from phi3edge.accumulate import Accumulator
        from phi3edge.mixture import Mixture

        model, sums = Mixture(self.checkpoint, self.spec), Accumulator(self.spec.hidden_size, False)
        for part in self.batches():
            h = self.read(self.spec.layers, part)
            sums.add(model.last_norm(h))
            advance(len(h))
        self.write(None, {"head": sums})


def _check_ids(ids: np.ndarray, spec: ModelSpec) -> None:
    if ids.ndim != 2 or ids.size == 0:
        raise UsageError(
            f"calibration ids of shape {ids.shape}; expected (sequences, tokens)", "calibrate on more text"
        )
    if ids.shape[1] > spec.context_length:
        raise UsageError(f"sequences of {ids.shape[1]} tokens; {spec.name} takes {spec.context_length}")
    if ids.min() < 0 or ids.max() >= spec.vocab_size:
        raise UsageError(f"calibration ids from {ids.min()} to {ids.max()}; {spec.name} has {spec.vocab_size} tokens")


def _begin(work: Path, state: JSON) -> None:
    """Make the folder ready: keep what belongs to the same work, remove what belongs to another."""
    said = json.dumps(state, indent=2)
    path = work / STATE
    if path.is_file() and path.read_text(encoding="utf-8") == said:
        for half in work.glob(".*.partial"):  # of a run that had no time to remove them
            half.unlink()
        return
    if work.exists():
        if not path.is_file() and any(work.iterdir()):
            raise OutputError(f"{work} holds something else than the beginning of a calibration", "remove it")
        shutil.rmtree(work)
    work.mkdir(parents=True)
    write_text(path, said)


def _hash(ids: np.ndarray) -> str:
    return hashlib.sha256(f"{ids.shape}".encode() + ids.astype("<i8").tobytes()).hexdigest()
