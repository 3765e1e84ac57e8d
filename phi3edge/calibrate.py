"""Rounds a model's linears block by block, each on what the rounded blocks before it really give it.

Two copies of the calibration text's hidden states go through the model: the float model's, and those of the model as
rounded so far. At each linear the second moments of its rounded input y (H = E y y^T) say which errors matter, and the
cross moments with the float model's input x (C = E x y^T) where to aim: not at the weight W, but at W C H^-1, which
brings the rounded model's output back to the float model's (Li et al., GPTAQ, arXiv 2504.02692).

The hidden states lie in files, one block's weights and one linear's moments in memory. A run that was interrupted goes
on after the last finished block.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from phi3edge.cache import cache_dir
from phi3edge.codecs import codec, is_float, row_bytes
from phi3edge.errors import OutputError, UnsupportedError
from phi3edge.files import write_text
from phi3edge.forward import LINEARS, Basis, Decoder, Weights, load_block, load_outer
from phi3edge.methods import CALIBRATED, SCALED
from phi3edge.methods.gptq import DAMPING
from phi3edge.phi3small import decoder_of
from phi3edge.progress import Stages, silent
from phi3edge.reference import fingerprint
from phi3edge.registry import load
from phi3edge.scaling import find_scales, fold
from phi3edge.types import JSON, QuantPlan, Statistics, TensorPlan

if TYPE_CHECKING:
    from phi3edge.calibration import CalibrationText

KEPT_BYTES = 16 * 10**9
"""What rounded models may take in the cache; those that were used longest ago go first. The newest stays whatever its
size, and so do those that a process may be at work on."""

FRESH, ABANDONED = 3600, 14 * 86400
"""Seconds that a rounding is left alone after its last use, for an export may be reading it; and that an unfinished one
is after its last block, for it may be gone on with."""

_BATCH_TOKENS = 4096
_MEASURED_ROWS = 1024  # of a weight, evenly spaced, whose error is measured: a few seconds less for each wide linear
_VERSION = 2  # raise it whenever the same inputs give other codes


@dataclass(frozen=True, slots=True)
class LinearFigures:
    """How one linear came out.

    Attributes:
        tokens: of the calibration text that it saw.
        error: mean square of the output's error over that of the output, on the rounded model's inputs; of at most
            1,024 rows.
        scaled: what awq's channel scales left of that in their search; 1 where they did not help and were left out,
            None where there was none.
    """

    name: str
    role: str
    layer: int | None
    codec: str
    tokens: int
    error: float
    scaled: float | None = None


@dataclass(frozen=True, slots=True)
class Rounded:
    """Rounded linears, packed, in a folder of the cache; where channels were scaled, all else of the blocks too.

    Attributes:
        expert_tokens: how many tokens chose each expert, by layer; empty without experts.
    """

    folder: Path
    figures: tuple[LinearFigures, ...]
    expert_tokens: tuple[tuple[int, ...], ...] = ()

    def rows(self, planned: TensorPlan, start: int, stop: int) -> np.ndarray | None:
        """Packed rows [start, stop) of a tensor, uint8 (rows, row bytes); None for one that is not here."""
        file = self.folder / planned.tensor.name
        if planned.method not in CALIBRATED and not file.is_file():
            return None
        rows, columns = (1, *planned.tensor.shape)[-2:]
        shape = rows, row_bytes(planned.codec, columns)
        return np.array(np.memmap(file, np.uint8, "r", shape=shape)[start:stop])


def round_model(
    checkpoint: Basis,
    plan: QuantPlan,
    text: CalibrationText,
    device: str = "cpu",
    stages: Stages = silent,
    keep_values: bool = False,
    run_class: type[Run] | None = None,
) -> Rounded:
    """Round every tensor of a plan whose method is in CALIBRATED.

    What an earlier run finished with the same checkpoint, plan and text is used again.

    Args:
        checkpoint: the weights to round.
        plan: a codec and a method for every tensor.
        text: the calibration text.
        device: where the model is computed.
        stages: shows progress.
        keep_values: True where something else was measured on the values as they are (an 8-bit KV cache).
        run_class: how a block is rounded, where it is not four linears: see phi3edge.calibrate_mixture.

    Raises:
        UnsupportedError: statistics that nothing can be rounded by; names the tensor.
        OutputError: the cache cannot be written.
    """
    folder = cache_dir() / "rounded" / _key(checkpoint, plan, text, device, keep_values)
    steps = plan.model.layers + 1
    try:
        with _alone(folder, stages), torch.inference_mode(), stages("calibrate", steps) as advance:
            folder.mkdir(parents=True, exist_ok=True)
            run = (run_class or Run)(checkpoint, plan, text.ids, folder, device, keep_values)
            advance(run.finished)
            while run.finished < steps:
                run.step()
                advance(1)
            os.utime(folder)
            _prune(folder)
    except OSError as error:
        raise OutputError(
            f"cannot keep the rounded model in {folder.parent}: {error.strerror or error}",
            "it goes on from the last finished block; PHI3EDGE_CACHE names another folder",
        ) from error
    return Rounded(folder, tuple(run.figures), tuple(map(tuple, run.expert_tokens)))


@contextmanager
def _alone(folder: Path, stages: Stages) -> Iterator[None]:
    """Hold the lock of a folder; what another process is at work on is waited for, and then used."""
    lock = _lock(folder)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        with stages("wait for another process that rounds the same", None):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _lock(folder: Path) -> FileLock:
    locks = cache_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"{folder.name}.lock", is_singleton=False)


class Run:
    """One rounding: what is finished of it, and its files."""

    def __init__(
        self,
        checkpoint: Basis,
        plan: QuantPlan,
        ids: np.ndarray,
        folder: Path,
        device: str,
        keep_values: bool,
    ) -> None:
        self._checkpoint, self._plan, self._ids, self._folder = checkpoint, plan, ids, folder
        self._keep_values = keep_values
        self._decoders = self._of_each_model(device)
        self._device = self._decoders["float"].device
        self._planned = {(t.tensor.role, t.tensor.layer): t for t in plan.tensors if t.tensor.expert is None}
        per_batch = max(1, _BATCH_TOKENS // ids.shape[1])
        self._batches = [slice(n, min(n + per_batch, len(ids))) for n in range(0, len(ids), per_batch)]
        self._state = folder / "finished.json"
        known: JSON = json.loads(self._state.read_text()) if self._state.is_file() else {"steps": 0, "figures": []}
        self.finished: int = known["steps"]
        self.figures = [LinearFigures(**row) for row in known["figures"]]
        self.expert_tokens: list[list[int]] = known.get("expert_tokens", [])

    def _of_each_model(self, device: str) -> dict[str, Decoder]:
        """What computes the "float" model between its linears, and the "rounded" one."""
        return dict.fromkeys(("float", "rounded"), decoder_of(self._plan.model, device))

    def step(self) -> None:
        """Round the next block, or after the last one the head; only whole steps are remembered."""
        layer = self.finished
        if layer == 0:
            self._embed()
        self.figures += self._round_block(layer) if layer < self._plan.model.layers else self._round_head()
        self.finished += 1
        known = {"steps": self.finished, "figures": [asdict(row) for row in self.figures]}
        write_text(self._state, json.dumps(known | {"expert_tokens": self.expert_tokens}))
        spent = "hidden" if self.finished > self._plan.model.layers else f"hidden-{layer}-"
        for old in self._folder.glob(f"{spent}*"):
            old.unlink()

    def _embed(self) -> None:
        planned = self._planned["embedding", None]
        table = load_outer(self._checkpoint, self._plan.model, "embedding", self._device)
        ids = torch.from_numpy(self._ids)
        for name, rows in (("float", table), ("rounded", self._round_alone(planned, table))):
            out = self._new(f"hidden-0-{name}", self._plan.model.hidden_size)
            for batch in self._batches:
                out.write(batch, self._decoders[name].embed(rows[ids[batch].to(self._device)]))

    def _round_block(self, layer: int) -> list[LinearFigures]:
        weights, scaled = self._scaled_block(layer)
        rounded = dict(weights)
        if scaled:
            rounded |= self._written(layer, weights)
        true, real = self._path("float", layer, weights), self._path("rounded", layer, rounded)
        figures = []
        for role in LINEARS:
            moments = Moments(weights[role].shape[1], self._device)
            for batch in self._batches:
                moments.add(true.input(role, batch), real.input(role, batch))
            rounded[role], found = self._round(self._planned[role, layer], weights[role], moments)
            figures += [replace(row, scaled=scaled.get(role)) for row in found]
        for path in (true, real):
            for batch in self._batches:
                path.finish(batch)
        return figures

    def _scaled_block(self, layer: int) -> tuple[Weights, dict[str, float]]:
        """A block's weights with the scales that its methods ask for, and what those left of the error by role."""
        weights = load_block(self._checkpoint, self._plan.model, layer, self._device)
        planned = self._block(layer)
        if not any(t.method in SCALED for t in planned.values()):
            return weights, {}
        states = self._states(f"hidden-{layer}-rounded", self._plan.model.hidden_size)
        hidden = (states.read(batch).to(self._device) for batch in self._batches)
        found = find_scales(self._decoders["rounded"], planned, weights, hidden, self._keep_values, layer)
        folded = fold(self._plan.model, planned, weights, {role: scales.values for role, scales in found.items()})
        return folded, {role: scales.error for role, scales in found.items()}

    def _block(self, layer: int) -> dict[str, TensorPlan]:
        """The plans of a block's tensors, by role."""
        return {role: planned for (role, n), planned in self._planned.items() if n == layer}

    def _written(self, layer: int, weights: Weights) -> Weights:
        """A scaled block's float tensors as they are written, here and now: they are not the checkpoint's any more."""
        written = {}
        for role, planned in self._block(layer).items():
            if is_float(planned.codec):
                module = codec(planned.codec)
                packed = module.pack(module.quantize(weights[role].reshape(-1, weights[role].shape[-1]).cpu().numpy()))
                packed.tofile(self._folder / planned.tensor.name)
                written[role] = _tensor(module.dequantize(module.unpack(packed)), self._device).view_as(weights[role])
        return written

    def _round_head(self) -> list[LinearFigures]:
        spec = self._plan.model
        planned = self._planned.get(("head", None))
        if planned is None or planned.method not in CALIBRATED:
            return []
        moments = Moments(spec.hidden_size, self._device)
        roles = [role for role, layer in self._planned if layer is None and role.startswith("output_norm")]
        outer = {role: load_outer(self._checkpoint, spec, role, self._device) for role in roles}
        states = {name: self._states(f"hidden-{spec.layers}-{name}", spec.hidden_size) for name in self._decoders}
        for batch in self._batches:
            last = {name: h.read(batch).to(self._device) for name, h in states.items()}
            moments.add(*(self._decoders[name].normed("output_norm", h, outer) for name, h in last.items()))
        return self._round(planned, load_outer(self._checkpoint, spec, "head", self._device), moments)[1]

    def _round(self, planned: TensorPlan, weight: Tensor, moments: Moments) -> tuple[Tensor, list[LinearFigures]]:
        """A linear as its plan rounds it, and how that went; packed into the folder if its method is calibrated."""
        if planned.method not in CALIBRATED:
            return self._round_alone(planned, weight), []
        tensor, module = planned.tensor, codec(planned.codec)
        method = load("methods", planned.method.split("+")[-1])
        try:
            aimed = moments.aim(weight)
            statistics = moments.statistics()
            quantized = method.quantize(aimed.cpu().numpy(), module, statistics, self._device)
        except UnsupportedError as error:
            raise UnsupportedError(f"tensor {tensor.name!r}: {error.message}", error.hint) from error
        packed = module.pack(quantized)
        packed.tofile(self._folder / tensor.name)
        rounded = _tensor(module.dequantize(module.unpack(packed)), self._device)
        lost = moments.error(aimed, rounded)
        return rounded, [LinearFigures(tensor.name, tensor.role, tensor.layer, planned.codec, moments.tokens, lost)]

    def _round_alone(self, planned: TensorPlan, weight: Tensor) -> Tensor:
        """A weight as a method without calibration rounds it."""
        if planned.method == "imported" or is_float(planned.codec):
            return weight
        module = codec(planned.codec)
        quantized = load("methods", planned.method).quantize(weight.cpu().numpy(), module)
        return _tensor(module.dequantize(quantized), self._device)

    def _path(self, name: str, layer: int, weights: Weights) -> BlockPath:
        spec = self._plan.model
        before = self._states(f"hidden-{layer}-{name}", spec.hidden_size)
        after = self._new(f"hidden-{layer + 1}-{name}", spec.hidden_size)
        inner = self._new(f"hidden-inner-{name}", max(spec.heads * spec.head_dim, spec.intermediate_size))
        return BlockPath(self._decoders[name], layer, weights, before, after, inner)

    def _states(self, name: str, width: int) -> States:
        return States(self._folder / name, self._ids.shape[1], width)

    def _new(self, name: str, width: int) -> States:
        """An empty file in the place of what an interrupted run left."""
        (self._folder / name).write_bytes(b"")
        return self._states(name, width)


class States:
    """A float32 array (sequences, tokens, width) in a file that is read and written by batches of sequences.

    No memory map: its pages would count as this process's memory, and a full disk would kill it.
    """

    def __init__(self, path: Path, tokens: int, width: int) -> None:
        self._path, self._shape = path, (tokens, width)

    def read(self, batch: slice) -> Tensor:
        """Shape (sequences, tokens, width)."""
        size = self._shape[0] * self._shape[1]
        values = np.fromfile(self._path, np.float32, (batch.stop - batch.start) * size, offset=4 * batch.start * size)
        return torch.from_numpy(values).view(-1, *self._shape)

    def write(self, batch: slice, values: Tensor) -> None:
        """Narrower values leave the rest of each token's row as 0."""
        out = np.zeros((*values.shape[:2], self._shape[1]), np.float32)
        out[..., : values.shape[-1]] = values.cpu().numpy()
        with self._path.open("r+b") as file:
            file.seek(4 * batch.start * self._shape[0] * self._shape[1])
            out.tofile(file)

    def add(self, batch: slice, index: Tensor, values: Tensor) -> None:
        """Add values (rows, width) to those of some tokens, which are numbered from the batch's first."""
        tokens, width = self._shape
        rows = self.read(batch).view(-1, width)[index] + values.cpu()
        with self._path.open("r+b") as file:
            for n, row in zip(index.tolist(), rows.numpy(), strict=True):
                file.seek(4 * (batch.start * tokens + n) * width)
                row.tofile(file)


class BlockPath:
    """A way of the calibration text through one block, linear by linear; states are kept by batch of sequences."""

    def __init__(
        self, decoder: Decoder, layer: int, weights: Weights, before: States, after: States, inner: States
    ) -> None:
        """The hidden states before the block, and files for those after it and for what the inner linears take."""
        self._decoder, self._layer, self._weights = decoder, layer, weights
        self._before, self._after, self._inner = before, after, inner
        self._inputs = {
            "attn_qkv": self._attention_input,
            "attn_output": self._mixed,
            "ffn_gate_up": self._ffn_input,
            "ffn_down": self._gated,
        }

    def input(self, role: str, batch: slice) -> Tensor:
        """What a linear takes, (sequences, tokens, columns); roles come in the order of LINEARS."""
        return self._inputs[role](batch)

    def finish(self, batch: slice) -> None:
        """Add the last linear's output: now `after` is what its name says."""
        h = self._read(self._after, batch) + self._apply("ffn_down", self._taken("ffn_down", batch))
        self._after.write(batch, h)

    def _attention_input(self, batch: slice) -> Tensor:
        return self._decoder.normed("attn_norm", self._read(self._before, batch), self._weights)

    def _mixed(self, batch: slice) -> Tensor:
        qkv = self._apply("attn_qkv", self._attention_input(batch))
        return self._keep(self._decoder.attend(qkv, self._layer), batch)

    def _ffn_input(self, batch: slice) -> Tensor:
        h = self._read(self._before, batch) + self._apply("attn_output", self._taken("attn_output", batch))
        self._after.write(batch, h)
        return self._decoder.normed("ffn_norm", h, self._weights)

    def _gated(self, batch: slice) -> Tensor:
        x = self._decoder.normed("ffn_norm", self._read(self._after, batch), self._weights)
        return self._keep(self._decoder.gate(self._apply("ffn_gate_up", x)), batch)

    def _apply(self, role: str, x: Tensor) -> Tensor:
        return self._decoder.apply(role, x, self._weights)

    def _keep(self, x: Tensor, batch: slice) -> Tensor:
        self._inner.write(batch, x)
        return x

    def _taken(self, role: str, batch: slice) -> Tensor:
        return self._read(self._inner, batch)[..., : self._weights[role].shape[1]]

    def _read(self, states: States, batch: slice) -> Tensor:
        return states.read(batch).to(self._decoder.device)


class Moments:
    """Sums over the calibration text for what linears read, float32; see the file's head for H and C."""

    def __init__(self, columns: int, device: torch.device) -> None:
        """For linears with so many columns."""
        self.tokens = 0
        self._h = torch.zeros(columns, columns, device=device)
        self._c = torch.zeros_like(self._h)
        self._absolute = torch.zeros(columns, device=device)
        self._turn: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """The float model's inputs and the rounded model's, (..., columns)."""
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        self.tokens += len(x)
        self._h.addmm_(y.T, y)
        self._c.addmm_(x.T, y)
        self._absolute += y.abs().sum(0)

    def aim(self, weight: Tensor) -> Tensor:
        """The weight to round in the place of another: it brings the output back to the float model's.

        Args:
            weight: the linear's, shape (rows, columns).

        Raises:
            UnsupportedError: moments that are not finite, or inputs that are all 0.
        """
        if len(weight) > len(self._h):  # float64 for a square matrix only, and once for linears that read the same
            if self._turn is None:
                self._turn = self._over_h(self._c - self._h)
            return weight + weight @ self._turn
        return weight + self._over_h(weight @ (self._c - self._h))

    def _over_h(self, rows: Tensor) -> Tensor:
        """Rows times the inverse of the damped H, computed in float64."""
        damped = self._h.double()
        damped.diagonal().add_(DAMPING * damped.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if failed or not bool(torch.isfinite(factor.diagonal().sum())):
            raise UnsupportedError("its inputs on the calibration text are not finite, or all 0", "use another text")
        return torch.cholesky_solve(rows.double().T, factor).T.float()

    def statistics(self) -> Statistics:
        """Means over the tokens, of the rounded model's inputs."""
        moments = (self._h / self.tokens).cpu().numpy()
        absolute = (self._absolute / self.tokens).cpu().numpy()
        return Statistics(self.tokens, moments.diagonal().copy(), absolute, moments)

    def error(self, aimed: Tensor, rounded: Tensor) -> float:
        """See LinearFigures."""
        rows = slice(None, None, -(-len(aimed) // _MEASURED_ROWS))
        lost, whole = ((w @ self._h * w).sum() for w in (aimed[rows] - rounded[rows], aimed[rows]))
        return float(lost / whole)


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)


def _key(checkpoint: Basis, plan: QuantPlan, text: CalibrationText, device: str, keep_values: bool) -> str:
    """Names a rounding by all that it depends on."""
    tensors = [(t.tensor.name, t.codec, t.method) for t in plan.tensors]
    basis = getattr(checkpoint, "basis", None)  # a checkpoint itself has none
    model = fingerprint(checkpoint.path), basis, tensors, keep_values
    said = repr((_VERSION, model, text.sha256, text.ids.shape, device))
    return hashlib.sha256(said.encode()).hexdigest()[:32]


def _prune(newest: Path) -> None:
    """Deletes the oldest roundings until the rest take at most KEPT_BYTES, but none that may be in use."""
    found = []
    for folder in newest.parent.iterdir():
        with suppress(OSError):  # another process may be at work on it, or it is no folder
            age = time.time() - folder.stat().st_mtime
            spared = age < (ABANDONED if any(folder.glob("hidden-*")) else FRESH)
            taken = sum(file.stat().st_size for file in folder.iterdir())
            found.append((folder != newest, age, spared, folder, taken))
    room = KEPT_BYTES
    for is_other, _, spared, folder, taken in sorted(found):
        room -= taken
        if room < 0 and is_other and not spared:
            with suppress(Timeout), _lock(folder).acquire(blocking=False):
                shutil.rmtree(folder, ignore_errors=True)
