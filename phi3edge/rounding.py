"""How a plan's weights are rounded: as they are read, with or without statistics, or calibrated before that."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from phi3edge.centring import Centred
from phi3edge.errors import MissingExtraError, UnsupportedError, UsageError
from phi3edge.methods import CALIBRATED, SCALED
from phi3edge.progress import Stages
from phi3edge.quantize import Rows
from phi3edge.targets import Format
from phi3edge.types import JSON, ModelSpec, QuantPlan, Statistics

if TYPE_CHECKING:
    from phi3edge.calibrate import Run
    from phi3edge.checkpoint import Checkpoint
    from phi3edge.forward import Basis

TOKENS = 512
"""Of a sequence of the calibration text; fewer for a model with less context."""

TOKENS_PER_INPUT = 16
LEAST_SEQUENCES, MOST_SEQUENCES = 48, 128
"""Unless the user says otherwise, the text has so many tokens for each input of the widest linear, whose statistics
need the most, within bounds that a computer without a GPU can bear."""


MOVED = "Weights are in another basis than the checkpoint's: adapters made for it do not fit them."
"""Said of rotated, scaled and centred ones."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a user may say about rounding.

    Attributes:
        method: None for the recipe's.
        calibration: the text that the model runs on; see phi3edge.calibration. None for the default.
        sequences: of that text; None for what suits the model.
        statistics: what `phi3edge calibrate` wrote, or an importance matrix, for methods that do not run the model.
        device: "cpu" or "cuda".
    """

    method: str | None = None
    calibration: str | None = None
    sequences: int | None = None
    statistics: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Rounded:
    """Weights ready to be written.

    Attributes:
        source: where tensors are read that are rounded as they are written.
        rows: the others; None if there are none.
        statistics: of the linears' inputs, by tensor name, for those that are rounded as they are written.
        ids: the calibration text's token ids, int64 (sequences, tokens); None without one.
        described: for the manifest.
        notes: for the user.
    """

    source: Basis
    rows: Rows | None
    statistics: Mapping[str, Statistics] | None
    ids: np.ndarray | None
    described: JSON
    notes: list[str]


def is_calibrated(plan: QuantPlan) -> bool:
    """Whether the model must run on a text before its weights can be written."""
    return any(t.method in CALIBRATED for t in plan.tensors)


def default_sequences(spec: ModelSpec) -> int:
    """Sequences of the calibration text where the user names no number."""
    widest = max(t.shape[-1] for t in spec.tensors)
    return min(max(TOKENS_PER_INPUT * widest // TOKENS, LEAST_SEQUENCES), MOST_SEQUENCES)


def require_rounding(rounding: Rounding, calibrated: bool) -> None:
    """Raise what rounding would raise for its options or missing packages, before time is spent.

    Raises:
        UsageError, UnsupportedError: options that do not go together, or a device that is not there.
        MissingExtraError: torch is not installed.
    """
    if calibrated and rounding.statistics:
        raise UsageError(
            "--statistics goes with --method rtn: others measure each linear on the rounded blocks before it",
            "leave out --statistics, or --method",
        )
    if rounding.device not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {rounding.device!r}", "--device cpu or --device cuda")
    if not calibrated and rounding.device == "cpu":
        return
    if not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        raise MissingExtraError("calibration", "reference")
    if rounding.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UnsupportedError("--device cuda: torch finds no CUDA device", "use --device cpu")


def require_mixture(spec: ModelSpec, rounding: Rounding) -> None:
    """Raise for what calibrated rounding and byte budgets do not do with a mixture of experts.

    Raises:
        UnsupportedError: names it.
    """
    from phi3edge.calibration import require_writer

    require_writer(spec, rounding.calibration)
    if rounding.device != "cpu":
        raise UnsupportedError(f"--device {rounding.device} is not for a mixture of experts", "leave the option out")


def basis_of(source: Checkpoint, plan: QuantPlan, kv_cache: str, format_: Format) -> Basis:
    """The weights in the basis in which a plan rounds them: the checkpoint's own, unless gptq alone rounds them.

    A LayerNorm depends on more than its input's length: a model with those cannot be turned, and llama.cpp, which has
    none, needs other numbers.
    """
    if plan.model.norm == "layer" and format_ == "gguf":
        return Centred(source, plan.model)
    if not is_calibrated(plan) or any(t.method in ("imported", *SCALED) for t in plan.tensors):
        return source
    if plan.model.norm != "rms":
        return source
    from phi3edge.rewrite import Rewritten

    return Rewritten(source, plan.model, turn_values=kv_cache != "int8")  # whose scales were found on the values as is


def round_weights(
    source: Checkpoint, plan: QuantPlan, rounding: Rounding, kv_cache: str, format_: Format, stages: Stages
) -> Rounded:
    """Round what is calibrated, and say where the rest is read.

    Raises:
        Phi3EdgeError: see phi3edge.calibrate, phi3edge.calibration.
    """
    basis = basis_of(source, plan, kv_cache, format_)
    if rounding.statistics:
        return _with_statistics(basis, plan, rounding.statistics)
    if not is_calibrated(plan):
        return Rounded(basis, None, None, None, {}, [MOVED] if basis is not source else [])
    from phi3edge.calibrate import round_model
    from phi3edge.calibration import calibration_text

    spec, device = plan.model, rounding.device
    tokens = min(TOKENS, spec.context_length)
    sequences = rounding.sequences or default_sequences(spec)
    text = calibration_text(rounding.calibration, source.path, spec, sequences, tokens, device=device, stages=stages)
    found = round_model(basis, plan, text, device, stages, kv_cache == "int8", _run_class(spec))
    described: JSON = {
        "text": text.name,
        "sha256": text.sha256,
        "sequences": len(text.ids),
        "tokens": text.ids.shape[1],
        "device": device,
        "linears": [asdict(row) for row in found.figures],
    }
    notes = [f"Calibrated on {text.ids.size} tokens of {text.name}."]
    if found.expert_tokens:
        described["expert_tokens"] = found.expert_tokens
        notes += _few(spec, found.expert_tokens)
    if basis is not source or any(t.method in SCALED for t in plan.tensors):
        notes.append(MOVED)
    return Rounded(basis, found.rows, None, text.ids, described, notes + ([text.note] if text.note else []))


def _run_class(spec: ModelSpec) -> type[Run] | None:
    if spec.experts is None:
        return None
    from phi3edge.calibrate_mixture import MixtureRun

    return MixtureRun


def _few(spec: ModelSpec, expert_tokens: Sequence[Sequence[int]]) -> list[str]:
    """What to tell of experts that few tokens chose; see phi3edge.calibrate_mixture."""
    from phi3edge.calibrate_mixture import TOKENS_PER_COLUMN

    counts = [count for layer in expert_tokens for count in layer]
    wanted = TOKENS_PER_COLUMN * max(spec.hidden_size, spec.intermediate_size)
    few = sum(count < wanted for count in counts)
    said = f"{few} of {len(counts)} experts were chosen by fewer than {wanted:,} tokens"
    return [f"{said}: they are calibrated on others of their layer too."] if few else []


def _with_statistics(source: Basis, plan: QuantPlan, path: Path) -> Rounded:
    from phi3edge.statistics import load_statistics

    found = load_statistics(path, plan.model)
    text = found.calibration
    described: JSON = {"text": text.name, "sha256": text.sha256, "statistics": path.name}
    if found.expert_tokens:
        described["expert_tokens"] = found.expert_tokens
    return Rounded(source, None, found, text.ids, described, [f"Rounded with {path.name}.", *found.notes])
