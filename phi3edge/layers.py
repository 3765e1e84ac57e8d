"""Where an artifact loses quality: KL(reference || artifact) with one block, or one role, back in full precision.

Both models are computed here in float32, block by block, on the weights that the artifact really holds. A unit (a
block, a role, the embedding, the head) is exchanged in both directions: the artifact with the reference's unit, and
the reference with the artifact's. A model that differs from another in one block has its hidden states up to there,
so n exchanged blocks cost n / 2 passes; and every block is read once, whatever the number of models that go through it.

Weights can be exchanged only in one basis. Calibrated artifacts are in another one than their checkpoint's (see
phi3edge.rewrite), so the reference is rewritten into the basis that the artifact is found to be in. A mixture of
experts in a GGUF file of ours is computed as llama.cpp does, on both sides: where that is not the model itself (see
phi3edge.centring) is no loss of the artifact's here. Of a mixture one expert's weights are in memory at a time, and are
read again for every model.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from phi3edge import folders
from phi3edge.artifact import Artifact
from phi3edge.budget_plan import budget_recipe
from phi3edge.calibration import refuse_overlap
from phi3edge.centring import Centred, mixture_decoder
from phi3edge.codecs import holds, row_bytes
from phi3edge.dequantized import HEAD, Dequantized
from phi3edge.errors import UnsupportedError
from phi3edge.files import write_text
from phi3edge.forward import Decoder, Readable, Weights
from phi3edge.mixture import Mixture, MixtureDecoder
from phi3edge.phi3small import decoder_of
from phi3edge.progress import Stages, silent
from phi3edge.recipes import load_recipe
from phi3edge.reference import load_tokenizer
from phi3edge.rewrite import Rewritten
from phi3edge.text import Text, cut, default_text
from phi3edge.types import JSON, ModelSpec, TensorSpec, stays_float

if TYPE_CHECKING:
    from phi3edge.checkpoint import Checkpoint

SCHEMA = 1
TOKENS = 512
"""Of a chunk of the text; fewer for a model with less context. The second half is scored."""

TOGETHER = 4
"""Chunks whose hidden states are on disk at once, those of every model."""

OTHER_BASIS = 0.15
"""How far the columns of two weights may be from factors of 1, root mean square, if they are in one basis. Rounding to
2 bits leaves about 0.02; scaled channels 0.3 and more; another basis 1."""

SAME_GAIN = 0.01
"""Relative difference of norms that are the same: they may lie in float16."""

_LOGIT_TOKENS = 256  # computed at once: the widest arrays are of their logits
_ROWS = 4096  # of embedding and head, to tell a basis by

By = Literal["block", "role"]


@dataclass(frozen=True, slots=True)
class Unit:
    """What is exchanged: a block with its norms, or every tensor of a role; the head with the norm before it.

    Biases go with what they belong to.
    """

    layer: int | None
    role: str | None

    @property
    def name(self) -> str:
        """For people."""
        return f"block {self.layer}" if self.role is None else self.role

    @property
    def first(self) -> int:
        """The block before which a model with this unit exchanged has the hidden states of one without."""
        return self.layer or 0

    def has(self, role: str, layer: int | None) -> bool:
        """Whether a tensor belongs to it."""
        if self.role is None:
            return layer == self.layer
        plain = role.removesuffix("_bias")
        return plain == self.role or (self.role == HEAD and plain == "output_norm")


@dataclass(frozen=True, slots=True)
class NextCodec:
    """The same unit in the next bigger codec.

    Attributes:
        codecs: its tensors' next codecs.
        bytes: that it would add.
        kl_saved: what that is estimated to save, in nats: a bit more leaves a quarter of a unit's loss.
        kl_saved_per_mb: the same over the megabytes added.
    """

    codecs: list[str]
    bytes: int
    kl_saved: float
    kl_saved_per_mb: float


@dataclass(frozen=True, slots=True)
class Row:
    """What one unit costs.

    Attributes:
        layer: of a block; else None.
        role: of a role, the embedding or the head; else None.
        codecs: that its weights are in.
        bytes: that they take in the artifact.
        kl_without: KL(reference || artifact) with this unit in full precision, nats per token.
        kl_only: KL(reference || reference with only this unit of the artifact).
        next: None where nothing bigger is known.
    """

    layer: int | None
    role: str | None
    codecs: list[str]
    bytes: int
    kl_without: float
    kl_only: float
    next: NextCodec | None


@dataclass(frozen=True, slots=True)
class Losses:
    """Where an artifact loses quality; the content of layers.json.

    Attributes:
        artifact: name of its file.
        text: that was scored; sha256 is its hash.
        basis: which basis the artifact's weights were found in.
        kl: KL(reference || artifact), mean over the scored tokens, with its standard error.
        rows: what each unit costs, the dearest first.
    """

    schema: int
    artifact: str
    by: By
    text: str
    sha256: str
    chunks: int
    chunk_tokens: int
    scored_tokens: int
    basis: str
    kl: float
    kl_error: float
    rows: list[Row]


def find_losses(
    artifact: Artifact,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    by: By = "role",
    text: Text | None = None,
    chunks: int = 4,
    on_estimate: Callable[[float], None] = lambda seconds: None,
    stages: Stages = silent,
) -> Losses:
    """Measure what every block or role of an artifact costs.

    Args:
        artifact: a GGUF file or an ONNX Runtime GenAI folder.
        checkpoint: what it was made from, opened.
        spec: the model in it.
        by: exchange blocks or roles.
        text: what to score on; None for the documentation inside Python.
        chunks: of it, of 512 tokens.
        on_estimate: told once how many seconds it will take.
        stages: shows progress.

    Raises:
        UnsupportedError: the artifact's basis is not known, or hides roles; a layout or type that cannot be read.
        CheckpointError: an artifact of another model.
        UsageError: a text that is too short, or that it was calibrated on.
    """
    text = text or default_text()
    tokens = min(TOKENS, spec.context_length)
    with stages("tokenize", None):
        ids = cut(load_tokenizer(checkpoint.path)(text.text)["input_ids"], chunks, tokens, tokens, text.name)
        if artifact.said and (calibration := folders.calibration_of(artifact.folder, artifact.said)):
            refuse_overlap(calibration, ids, text.name)
    ours = Dequantized(artifact, spec)
    with stages("find the basis", None):
        reference, basis = find_basis(ours, checkpoint, spec, by, artifact.file.name)
    units = units_of(spec, by)
    compared = (_ComparedMixture if spec.experts else _Compared)(ours, reference, spec, units, on_estimate)
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="phi3edge-") as work:
        batches = [ids[n : n + TOGETHER] for n in range(0, len(ids), TOGETHER)]
        with stages("exchange", compared.steps * len(batches)) as advance:
            found = [compared.run(batch, Path(work), advance, len(batches)) for batch in batches]
    kl = np.concatenate([one.pop(_WHOLE) for one in found])
    mean = {model: float(np.concatenate([one[model] for one in found]).mean()) for model in found[0]}
    whole = float(kl.mean())
    ladder = _ladder("onnx" if artifact.is_onnx else "gguf")
    rows = [_row(unit, ours, spec, whole, mean["without", unit], mean["only", unit], ladder) for unit in units]
    return Losses(
        schema=SCHEMA,
        artifact=artifact.file.name,
        by=by,
        text=text.name,
        sha256=text.sha256,
        chunks=len(ids),
        chunk_tokens=tokens,
        scored_tokens=len(kl),
        basis=basis,
        kl=whole,
        kl_error=float(kl.std(ddof=1) / math.sqrt(len(kl))),
        rows=sorted(rows, key=lambda row: row.kl_without),
    )


def to_data(losses: Losses) -> JSON:
    """Plain data, for JSON."""
    return asdict(losses)


def write(losses: Losses, folder: Path) -> Path:
    """Write layers.json into an artifact's folder."""
    write_text(folder / folders.LAYERS, json.dumps(to_data(losses), indent=2) + "\n")
    return folder / folders.LAYERS


def units_of(spec: ModelSpec, by: By) -> list[Unit]:
    """Everything that is exchanged; a tied head goes with the embedding."""
    linears = dict.fromkeys(t.role for t in spec.tensors if t.layer is not None and _is_linear(t))
    inner = [Unit(layer, None) for layer in range(spec.layers)] if by == "block" else [Unit(None, r) for r in linears]
    return [Unit(None, "embedding"), *inner, *([] if spec.tied else [Unit(None, HEAD)])]


def _is_linear(tensor: TensorSpec) -> bool:
    """Whether a tensor is one that artifacts hold in codecs."""
    return len(tensor.shape) == 2 and not stays_float(tensor.role)


def find_basis(ours: Dequantized, checkpoint: Checkpoint, spec: ModelSpec, by: By, name: str) -> tuple[Readable, str]:
    """The reference in the artifact's basis, found by comparing weights, and what that basis is.

    Args:
        ours: the artifact's weights.
        checkpoint: the reference.
        spec: the model.
        by: blocks need only the residual stream's basis, roles every tensor's.
        name: the artifact's, for the error.

    Raises:
        UnsupportedError: no basis that is known.
    """
    candidates: list[tuple[Readable, str]] = [(checkpoint, "the checkpoint's own")]
    if spec.norm == "rms":  # others cannot be turned
        candidates += [
            (Rewritten(checkpoint, spec), "rotated"),
            (Rewritten(checkpoint, spec, turn_values=False), "rotated, values as they were"),
        ]
    elif spec.experts:
        candidates.append((Centred(checkpoint, spec), "centred for llama.cpp"))
    known = [_known_roles(ours, source, spec) for source, _ in candidates]
    for (source, said), roles in zip(candidates, known, strict=True):
        if all(roles.values()):
            return source, said
    for (source, said), roles in zip(candidates, known, strict=True):
        if by == "block" and roles["embedding"] and roles.get(HEAD, True):  # what a block is built into is the same
            return source, f"{said}; within blocks another one"
    best = max(known, key=lambda roles: sum(roles.values()))
    wrong = [role for role, same in best.items() if not same]
    if by == "role" and "embedding" not in wrong and HEAD not in wrong:
        raise UnsupportedError(
            f"{name}: the channels of {', '.join(wrong)} are scaled, and roles depend on each other's scales",
            "--by block exchanges whole blocks, which do not",
        )
    raise UnsupportedError(
        f"{name} is in no basis that is known here: its {', '.join(wrong)} are not the checkpoint's",
        "is it an export of this checkpoint? --checkpoint names another one",
    )


def _known_roles(ours: Readable, reference: Readable, spec: ModelSpec) -> dict[str, bool]:
    """By role, whether the artifact's weights are the reference's but for rounding, in one of three layers.

    So a damaged layer does not hide the basis.
    """
    layers = {0, spec.layers // 2, spec.layers - 1, None}
    known: dict[str, bool] = {}
    for tensor in spec.tensors:
        if tensor.layer in layers and not known.get(tensor.role):
            known[tensor.role] = _is_same(ours.read(tensor.name), reference.read(tensor.name))
    return known


def _is_same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether a is b but for rounding: its columns are b's times 1."""
    if a.ndim == 1:
        return bool(np.linalg.norm(a - b) <= SAME_GAIN * np.linalg.norm(b))
    a, b = a[:_ROWS], b[:_ROWS]
    square = (b * b).sum(0)
    used = square > 0
    factors = (a * b).sum(0)[used] / square[used]
    return bool(np.sqrt(np.square(factors - 1).mean()) <= OTHER_BASIS)


Model = tuple[str, "Unit | None"]
"""("without", unit): the artifact with the reference's unit; ("only", unit): the reverse; (base, None): neither."""

_WHOLE: Model = ("without", None)  # the artifact itself
_REFERENCE: Model = ("only", None)


class _Compared:
    """The artifact, the reference, and both with each unit exchanged."""

    def __init__(
        self,
        ours: Readable,
        reference: Readable,
        spec: ModelSpec,
        units: list[Unit],
        on_estimate: Callable[[float], None],
    ) -> None:
        self._sources = {"without": ours, "only": reference}
        self._spec, self._units, self._on_estimate = spec, units, on_estimate
        self._decoder = self._decoder_of()
        self._inner = [unit for unit in units if unit.role != HEAD]
        # models with the later blocks first: they begin with the states of one that goes on itself
        self._models: list[Model] = [(base, unit) for base in ("without", "only") for unit in [*self._inner, None]]
        self.steps = sum(spec.layers - (unit.first if unit else 0) for _, unit in self._models)
        self._estimated = False

    def _decoder_of(self) -> Decoder:
        return decoder_of(self._spec)

    def run(self, ids: np.ndarray, work: Path, advance: Callable[[int], None], batches: int) -> dict[Model, np.ndarray]:
        """KL(reference || model) of every model at every scored token, float64."""
        started, done = time.perf_counter(), 0
        for base, unit in self._models:
            if unit is None or unit.role == "embedding":
                rows = self._outer("embedding", base, unit)[torch.from_numpy(ids)]
                self._write(work, (base, unit), self._decoder.embed(rows))
        for layer in range(self._spec.layers):
            blocks = self._blocks(layer)
            for base, unit in self._models:
                if unit is not None and layer < unit.first:
                    continue
                begins = unit is not None and unit.role != "embedding" and layer == unit.first
                h = self._read(work, (base, None if begins else unit))
                self._write(work, (base, unit), self._through(h, blocks, (base, unit), layer))
                advance(1)
                done += 1
            if not self._estimated:
                self._estimated = True
                self._on_estimate((time.perf_counter() - started) / done * self.steps * batches)
        return self._score(work, ids.shape)

    def _score(self, work: Path, shape: tuple[int, ...]) -> dict[Model, np.ndarray]:
        first = shape[1] // 2
        tails = [(base, unit) for base in ("without", "only") for unit in self._units if unit.role == HEAD]
        states = {m: self._read(work, m)[:, first:-1].flatten(0, 1) for m in self._models}
        states |= {(base, unit): states[base, None] for base, unit in tails}
        roles = {t.role for t in self._spec.tensors if t.layer is None} - {"embedding"} | {HEAD}
        heads = {m: {role: self._outer(role, *m) for role in roles} for m in [_WHOLE, _REFERENCE]}
        found: dict[Model, list[Tensor]] = {m: [] for m in states if m != _REFERENCE}
        for start in range(0, len(states[_WHOLE]), _LOGIT_TOKENS):
            rows = slice(start, start + _LOGIT_TOKENS)
            p = self._log_probs(states[_REFERENCE][rows], heads[_REFERENCE])
            for model in found:
                base, unit = model
                swapped = unit is not None and (
                    unit.has(HEAD, None) or (self._spec.tied and unit.has("embedding", None))
                )
                head = heads[_other(base) if swapped else base, None]
                q = self._log_probs(states[model][rows], head)
                found[model].append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
        return {model: torch.cat(parts).numpy() for model, parts in found.items()}

    def _log_probs(self, h: Tensor, outer: Weights) -> Tensor:
        return self._decoder.logits(self._decoder.normed("output_norm", h, outer), outer).log_softmax(-1)

    def _outer(self, role: str, base: str, unit: Unit | None) -> Tensor:
        """A weight outside the blocks, of the side that a model takes it from."""
        side = _other(base) if unit is not None and unit.has(role, None) else base
        source = self._sources[side]
        if role == HEAD and self._spec.tied:
            return torch.from_numpy(source.read(HEAD if isinstance(source, Dequantized) else self._name("embedding")))
        return torch.from_numpy(source.read(self._name(role)))

    def _name(self, role: str) -> str:
        return next(t.name for t in self._spec.tensors if t.role == role)

    def _blocks(self, layer: int) -> dict[str, Weights]:
        """What is read of a block for all models: its weights of both sides."""
        roles = {t.name: t.role for t in self._spec.tensors if t.layer == layer}
        return {
            base: {role: torch.from_numpy(source.read(name)) for name, role in roles.items()}
            for base, source in self._sources.items()
        }

    def _through(self, h: Tensor, blocks: Mapping[str, Weights], model: Model, layer: int) -> Tensor:
        """Hidden states through a model's block."""
        weights = _exchanged(blocks, *model, layer)
        return torch.cat([self._decoder.block(x[None], weights, layer=layer) for x in h])

    def _write(self, work: Path, model: Model, h: Tensor) -> None:
        np.save(self._file(work, model), h.numpy())

    def _read(self, work: Path, model: Model) -> Tensor:
        return torch.from_numpy(np.load(self._file(work, model)))

    def _file(self, work: Path, model: Model) -> Path:
        base, unit = model
        return work / f"{base}-{unit.name if unit else 'nothing'}.npy"


class _ComparedMixture(_Compared):
    """The same for a mixture of experts, whose blocks are not held in memory."""

    def _decoder_of(self) -> MixtureDecoder:
        return mixture_decoder(self._sources["only"], self._spec)

    def _blocks(self, layer: int) -> dict[str, Weights]:
        return {}

    def _through(self, h: Tensor, blocks: Mapping[str, Weights], model: Model, layer: int) -> Tensor:
        assert isinstance(self._decoder, MixtureDecoder)
        return Mixture(_Exchanged(self._sources, self._spec, *model), self._spec, False, self._decoder).block(h, layer)[
            0
        ]


class _Exchanged:
    """The weights of one side, with a unit's of the other."""

    def __init__(self, sources: Mapping[str, Readable], spec: ModelSpec, base: str, unit: Unit | None) -> None:
        self._sources, self._base, self._unit = sources, base, unit
        self._places = {t.name: (t.role, t.layer) for t in spec.tensors}

    def read(self, name: str) -> np.ndarray:
        swapped = self._unit is not None and self._unit.has(*self._places[name])
        return self._sources[_other(self._base) if swapped else self._base].read(name)


def _other(base: str) -> str:
    return "only" if base == "without" else "without"


def _exchanged(blocks: Mapping[str, Weights], base: str, unit: Unit | None, layer: int) -> Weights:
    """A block's weights of one side, with a unit's of the other."""
    if unit is None:
        return blocks[base]
    other = blocks[_other(base)]
    return {role: other[role] if unit.has(role, layer) else weight for role, weight in blocks[base].items()}


def _row(
    unit: Unit,
    ours: Dequantized,
    spec: ModelSpec,
    whole: float,
    kl_without: float,
    kl_only: float,
    ladder: list[str],
) -> Row:
    tensors = [t for t in spec.tensors if unit.has(t.role, t.layer) and _is_linear(t)]
    stored = [ours[t.name] for t in tensors]
    taken = sum(s.bytes for s in stored)
    bigger = [_bigger(s.bytes / t.shape[0], t.shape[-1], ladder) for s, t in zip(stored, tensors, strict=True)]
    added = sum(
        t.shape[0] * row_bytes(name, t.shape[-1]) - s.bytes
        for name, s, t in zip(bigger, stored, tensors, strict=True)
        if name
    )
    found = None
    if added > 0:
        bits = 8 * added / sum(t.size for t in tensors)
        saved = max(whole - kl_without, 0.0) * (1 - 4.0**-bits)
        names = _distinct(name for name in bigger if name)
        found = NextCodec(names, added, saved, saved / (added / 1e6))
    return Row(unit.layer, unit.role, _distinct(s.codec for s in stored), taken, kl_without, kl_only, found)


def _distinct(names: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _ladder(format_: Literal["gguf", "onnx"]) -> list[str]:
    """The codecs that a budget may choose from, and float16."""
    rule = load_recipe(budget_recipe(format_))[1].budget
    assert rule is not None
    return [*rule.codecs, "f16"]


def _bigger(now: float, columns: int, ladder: list[str]) -> str | None:
    """The codec with the fewest bytes a row above those taken now, which in a peer's file may be other than ours."""
    more = [n for n in ladder if holds(n, columns) and row_bytes(n, columns) > now]
    return min(more, key=lambda n: row_bytes(n, columns), default=None)
