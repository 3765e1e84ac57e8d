"""Proves artifacts: finds the reference, gates, context and calibration text of each, validates it and reports."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from phi3edge import card, comparison, folders, manifest, recipes
from phi3edge.artifact import find_artifact
from phi3edge.comparison import Comparison
from phi3edge.distributions import open_kept
from phi3edge.errors import UnsupportedError, UsageError
from phi3edge.families import parse_config
from phi3edge.files import write_text
from phi3edge.gates import Gates, check_gates, load_gates, require_baseline
from phi3edge.plan import choose_context
from phi3edge.progress import Stages, reporting, silent
from phi3edge.reference import require_reference
from phi3edge.registry import load
from phi3edge.report import Report, read_report, to_json
from phi3edge.sources import resolve
from phi3edge.targets import Format, Target, load_target
from phi3edge.text import read_text
from phi3edge.types import JSON, ModelSpec
from phi3edge.validate import CHUNK_TOKENS, Other, Pair, Windows, validate

RUNNERS = {"gguf": "llama_cpp", "onnx": "ort_genai"}
"""The runner's file by format."""

NOT_RUN = (
    "its graph was checked against the operators and types that it documents; the same graph and weights ran here on "
    "ONNX Runtime's CPU provider, which these figures are of"
)


@dataclass(frozen=True, slots=True)
class Protocol:
    """How artifacts are validated.

    Attributes:
        text: what to score on; None for the documentation inside Python.
        windows: how it is cut.
        gates: over those of target and recipe, by metric.
        baseline: a report.json, or a folder with one, that gates may be relative to.
        positions: score where long contexts break, if the checkpoint has such places and the artifact reaches them.
        threads: of the runtime; None for one per usable core.
    """

    text: Path | None = None
    windows: Windows = field(default_factory=Windows)
    gates: Gates = field(default_factory=dict)
    baseline: Path | None = None
    positions: bool = True
    threads: int | None = None


def user_gates(path: Path | None, artifact: Path) -> tuple[Gates, Path | None]:
    """The gates of a user's gates.toml for an artifact, and the baseline that it names, relative to that file."""
    if path is None:
        return {}, None
    found = load_gates(path)
    own = found.artifacts.get(artifact.resolve().name)
    return found.of(artifact.resolve().name), path.parent / own.baseline if own and own.baseline else None


def prove(
    artifact: Path,
    checkpoint: str | None = None,
    target: str | None = None,
    protocol: Protocol = Protocol(),
    stages: Stages = silent,
) -> tuple[Report | Comparison, Path | None]:
    """Validate an artifact, or all of a folder that was exported in several formats, and write what was found.

    Returns:
        The report or comparison, and the file that it was written to, if any; see `validate_artifact`.

    Raises:
        Phi3EdgeError: see `validate_artifact`.
    """
    if not (parts := folders.artifacts_in(artifact)):
        report, _, written = validate_artifact(artifact, checkpoint, target, protocol, stages=stages)
        return report, written
    together = validate_together(name_artifacts(parts), checkpoint, target, protocol, stages)
    if checkpoint or target:
        return together, None
    write_text(artifact / folders.COMPARISON, comparison.to_json(together))
    return together, artifact / folders.COMPARISON


def validate_artifact(
    artifact: Path,
    checkpoint: str | None = None,
    target: str | None = None,
    protocol: Protocol = Protocol(),
    *,
    keep: Path | None = None,
    others: Sequence[Other] = (),
    stages: Stages = silent,
) -> tuple[Report, list[Pair], Path | None]:
    """Run an artifact beside its reference, hold it against gates, and write its report.json and model card.

    Args:
        artifact: a folder that `export` wrote, or a file or folder that a runtime opens, whoever made it.
        checkpoint: the reference's name; None for the one that the manifest names.
        target: whose gates, context and KV cache to use; None for the one that the manifest names, or none.
        protocol: text, windows, gates, baseline.
        keep: where to keep its distributions; see `phi3edge.validate.validate`.
        others: other artifacts' distributions to hold it against.
        stages: shows progress.

    Returns:
        The report; what the others are to it; and the file that the report was written to: None if the artifact is in
        no folder of ours, or was held against another checkpoint or target than its own.

    Raises:
        Phi3EdgeError: see `phi3edge.validate.validate`. A missed gate is in the report, not an error.
    """
    found = find_artifact(artifact)
    folder, described = found.folder, found.said
    if described is None and checkpoint is None:
        raise UsageError(f"{artifact} has no {manifest.NAME} beside it that says what it is", "give --checkpoint")
    said: JSON = described or {"model": {}}
    target_name = target or said.get("target")
    device = load_target(target_name)[1] if target_name else None
    limits = {**_gates(device, said), **protocol.gates}
    earlier = _baseline(protocol.baseline)
    check_gates(limits)
    require_baseline(limits, earlier)
    with reporting(stages) as told:
        source = resolve(checkpoint or said["model"]["checkpoint"], told)
    source.close()  # the reference is computed from its folder
    format_: Format = said.get("format", "onnx" if found.is_onnx else "gguf")
    runtime = (device.formats.get(format_) or next(iter(device.formats.values()))) if device else None
    spec = _spec(source.config, source.generation_config, source.name)
    context = said.get("context") or (device.context if device else CHUNK_TOKENS)
    if spec and device and format_ in device.formats and "context" not in said:
        context = choose_context(spec, device, format_, None)
    report, pairs = validate(
        found.file,
        source.path,
        text=read_text(protocol.text) if protocol.text else None,
        windows=protocol.windows,
        gates=limits,
        earlier=earlier,
        context=min(context, spec.context_length) if spec else context,
        kv_type=said.get("kv_cache", runtime.kv_cache if runtime else "f16"),
        threads=protocol.threads,
        name=source.name,
        source=source.source,
        spec=spec,
        positions=protocol.positions,
        not_run=() if runtime is None or runtime.runs_here else (f"{runtime.name}: {NOT_RUN}",),
        keep=keep,
        others=others,
        predicted_kl=said.get("plan", {}).get("predicted_kl"),
        calibration=folders.calibration_of(folder, said),
        stages=stages,
    )
    if described is None or checkpoint is not None or target_name != said["target"]:
        return report, pairs, None  # the artifact's own report is that against its own reference and gates
    write_text(folder / folders.REPORT, to_json(report))
    card.write(folder)
    return report, pairs, folder / folders.REPORT


def validate_together(
    artifacts: Mapping[str, Path],
    checkpoint: str | None = None,
    target: str | None = None,
    protocol: Protocol = Protocol(),
    stages: Stages = silent,
) -> Comparison:
    """Validate several artifacts of one checkpoint, and hold each against those before it.

    Args:
        artifacts: by the names that the comparison shall have for them.
        checkpoint: the reference of all; None for the one that their manifests name.
        target: see `validate_artifact`.
        protocol: of all of them.
        stages: shows progress.

    Raises:
        UsageError: they are artifacts of different checkpoints.
        Phi3EdgeError: see `validate_artifact`.
    """
    reports: dict[str, Report] = {}
    pairs: list[comparison.Pair] = []
    with tempfile.TemporaryDirectory() as work:
        others: list[Other] = []
        for name, artifact in artifacts.items():
            keep = Path(work) / str(len(others))
            keep.mkdir()
            report, found, _ = validate_artifact(
                artifact, checkpoint, target, protocol, keep=keep, others=others, stages=stages
            )
            _require_same_reference(name, report, reports)
            pairs += [comparison.Pair(a=pair.other, b=name, kl=pair.kl, top1=pair.top1) for pair in found]
            reports[name] = report
            others.append(Other(name, open_kept(keep)))
    return Comparison(passed=all(r.passed for r in reports.values()), reports=reports, pairs=pairs)


def name_artifacts(artifacts: Sequence[Path]) -> dict[str, Path]:
    """The artifacts by short names; a folder that holds several stands for these.

    Raises:
        UsageError: one is named twice.
    """
    named: dict[str, Path] = {}
    for given in artifacts:
        for one in folders.artifacts_in(given) or [given]:
            name = one.resolve().name.removesuffix(".gguf")
            if name in named and named[name].resolve() != one.resolve():
                name = f"{one.resolve().parent.name}/{name}"
            if name in named:
                raise UsageError(f"{one} is given twice", "name each artifact once")
            named[name] = one
    return named


def require_validation(target: str, formats: Sequence[Format], text: Path | None) -> None:
    """Raise what validating would raise for a target, a text or missing packages, before time is spent.

    Raises:
        Phi3EdgeError: a target's gate that needs a baseline, a text that cannot be read, a missing extra.
    """
    require_baseline(load_target(target)[1].gates, None)
    if text:
        read_text(text)
    require_reference()
    for format_ in formats:
        load("runners", RUNNERS[format_]).require_runtime()


def _gates(device: Target | None, said: JSON) -> Gates:
    """The target's gates, and over them those of the recipe that the artifact was made by."""
    own = said.get("recipe", {}).get("gates", {})
    return {**(device.gates if device else {}), **recipes.gates_of(own)}


def _baseline(path: Path | None) -> Report | None:
    if path is None:
        return None
    file = path / folders.REPORT if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"no baseline at {file}", "expected a report.json that phi3edge validate wrote")
    return read_report(file)


def _spec(config: JSON, generation: JSON | None, name: str) -> ModelSpec | None:
    """The model, if its family is known here: a peer's artifact of another one is validated without positions."""
    try:
        return parse_config(config, generation, name)
    except UnsupportedError:
        return None


def _require_same_reference(name: str, report: Report, reports: Mapping[str, Report]) -> None:
    for other, earlier in reports.items():
        ours, theirs = (r.metrics["reference_ppl"].value for r in (report, earlier))
        if ours != theirs:
            raise UsageError(
                f"{name} is of another checkpoint than {other}: {report.checkpoint.name}, {earlier.checkpoint.name}",
                "compare artifacts of one checkpoint, or give --checkpoint",
            )
