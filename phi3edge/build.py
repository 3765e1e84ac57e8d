"""The main job, from a name to a proven artifact. Every stage is a function of another module; this composes them."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from phi3edge import __version__, card, folders, manifest, recipes
from phi3edge.budget import Budget
from phi3edge.budget_plan import SEQUENCES, TOKENS, budget_recipe, find_budget, plan_within, require_room
from phi3edge.checkpoint import SMALL_FILES
from phi3edge.emitters import FILES, Job, open_emitter
from phi3edge.errors import MissingExtraError, UnsupportedError, UsageError
from phi3edge.families import parse_config
from phi3edge.files import new_folder, sha256
from phi3edge.plan import (
    Fit,
    choose_context,
    chosen_tensors,
    estimate_fit,
    make_plan,
    require_fit,
    require_format,
    require_kernels,
    summarize,
    warnings,
)
from phi3edge.progress import Stages, reporting, silent
from phi3edge.quantize import quantize
from phi3edge.recipes import Recipe, load_recipe, with_method
from phi3edge.rounding import Rounding, basis_of, is_calibrated, require_mixture, require_rounding, round_weights
from phi3edge.sources import resolve, resolve_spec
from phi3edge.targets import KV_TYPES, Format, Runtime, Target, load_target
from phi3edge.types import JSON, KVScales, ModelSpec, QuantPlan, Source

if TYPE_CHECKING:
    from phi3edge.checkpoint import Checkpoint

PLAIN = Rounding()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan for a target, and what should be known about it before it is carried out; the budget that it must keep."""

    plan: QuantPlan
    recipe: Recipe
    target_name: str
    target: Target
    format: Format
    fit: Fit
    notes: list[str]
    budget: Budget | None = None

    @property
    def runtime(self) -> Runtime:
        """What runs the artifact on the target."""
        return self.target.formats[self.format]


@dataclass(frozen=True, slots=True)
class Exported:
    """A finished artifact.

    Attributes:
        folder: where it is.
        artifact: the file that a runtime opens: the GGUF file or the first part of a split one, or model.onnx.
        files: all files of it.
    """

    folder: Path
    artifact: Path
    files: list[Path]
    prepared: Prepared
    notes: list[str] = field(default_factory=list)


def prepare(
    name: str,
    target: str,
    recipe: str | None = None,
    context: int | None = None,
    format_: Format | None = None,
    kv_cache: str | None = None,
    budget: Budget | None = None,
    rounding: Rounding = PLAIN,
    stages: Stages = silent,
) -> Prepared:
    """Plan an export: from the config alone, or under a budget, which is filled by what rounding costs the weights.

    Raises:
        Phi3EdgeError: an unknown name, a config that is not supported, a format that the target does not take.
    """
    with reporting(stages) as report:
        spec = resolve_spec(name, report)
        ready = prepare_spec(spec, target, recipe, context, format_, kv_cache, budget, rounding)
        if ready.budget is None:
            return ready
        source = resolve(name, report)
    with source:
        spec = parse_config(source.config, source.generation_config, source.name)
        source.check(spec)
        ready = prepare_spec(spec, target, recipe, context, format_, kv_cache, budget, rounding)
        return fill_budget(ready, source, rounding, stages)


def prepare_spec(
    spec: ModelSpec,
    target: str,
    recipe: str | None = None,
    context: int | None = None,
    format_: Format | None = None,
    kv_cache: str | None = None,
    budget: Budget | None = None,
    rounding: Rounding = PLAIN,
) -> Prepared:
    """Plan an export of a model that is already read; see `prepare`. Under a budget the plan is not filled yet."""
    target_name, device = load_target(target)
    [chosen] = formats_of(target, format_, recipe)
    if kv_cache is not None:
        device = with_kv_cache(device, chosen, kv_cache)
    require_format(spec, chosen, device.formats[chosen])
    default = budget_recipe(chosen) if budget else device.formats[chosen].recipe
    recipe_name, mix = load_recipe(recipe or default)
    if chosen not in mix.formats:
        raise UnsupportedError(
            f"recipe {recipe_name} is for {', '.join(mix.formats)}; target {target_name} takes {chosen}"
        )
    mix = with_method(mix, rounding.method)
    budget = find_budget(recipe_name, mix, budget)
    if spec.experts and (budget or is_calibrated(make_plan(spec, recipe_name, mix))):
        require_mixture(spec, rounding)
    if budget:
        require_room(budget, spec, recipe_name, mix, device, chosen)
    tokens = choose_context(spec, device, chosen, context)
    plan = make_plan(spec, recipe_name, mix)
    require_kernels(plan, target_name, device, chosen)
    require_rounding(rounding, is_calibrated(plan))
    fit, notes = estimate_fit(plan, device, chosen, tokens), warnings(plan, device, chosen, tokens)
    return Prepared(plan, mix, target_name, device, chosen, fit, notes, budget)


def fill_budget(
    ready: Prepared,
    source: Checkpoint,
    rounding: Rounding = PLAIN,
    stages: Stages = silent,
    split_max_size: int | None = None,
) -> Prepared:
    """Choose each tensor's codec under the budget of a plan that has one; see phi3edge.budget_plan.

    Raises:
        Phi3EdgeError: see the subclasses.
    """
    require_quantizers()
    from phi3edge.calibration import calibration_text
    from phi3edge.reference import require_reference

    require_reference()
    assert ready.budget is not None
    spec, context = ready.plan.model, ready.fit.context
    tokens = min(TOKENS, spec.context_length)
    text = calibration_text(
        rounding.calibration, source.path, spec, SEQUENCES, tokens, device=rounding.device, stages=stages
    )
    scales = None
    if ready.runtime.kv_cache == "int8":  # its calibrated scales take as many bytes as any
        blank = np.ones((spec.layers, spec.kv_heads, spec.head_dim), np.float32)
        scales = KVScales(blank, blank)

    def measure(plan: QuantPlan) -> int:
        job = Job(plan, ready.recipe, source, ready.runtime, context, source.name, split_max_size, scales)
        return open_emitter(ready.format, job).total_bytes

    plan, said = plan_within(
        ready.budget,
        basis_of(source, ready.plan, ready.runtime.kv_cache, ready.format),
        spec,
        ready.plan.recipe,
        ready.recipe,
        ready.target,
        ready.format,
        measure,
        text,
        rounding.statistics is not None or is_calibrated(ready.plan),
        rounding.device,
        stages,
    )
    fit = estimate_fit(plan, ready.target, ready.format, context)
    return replace(ready, plan=plan, fit=fit, notes=[*warnings(plan, ready.target, ready.format, context), said])


def export(
    name: str,
    target: str,
    *,
    recipe: str | None = None,
    context: int | None = None,
    format_: Format | None = None,
    kv_cache: str | None = None,
    out: Path | None = None,
    split_max_size: int | None = None,
    budget: Budget | None = None,
    rounding: Rounding = PLAIN,
    force: bool = False,
    threads: int | None = None,
    stages: Stages = silent,
) -> Exported:
    """Write a checkpoint as an artifact for a target.

    The artifact appears under its name only when it is whole. The same inputs give the same bytes.

    Args:
        name: "org/name[@revision]", a local folder, or "demo".
        target: a target's name, or the path of its file.
        recipe: a recipe's name or path; None for the target's.
        context: tokens that the KV cache must hold; None for the target's.
        format_: artifact format; None for the first that the target takes.
        kv_cache: type of the KV cache; None for the target's. "int8", for ONNX, is calibrated on the reference.
        out: folder to write; None for dist/<model>-<target>.
        split_max_size: largest file in bytes; None for the target's own limit.
        budget: what the artifact may take; None for the recipe's own, if it has one.
        rounding: the method, and what it is calibrated on.
        force: write a plan that does not fit, and replace an earlier artifact.
        threads: worker threads; None for one per usable core.
        stages: shows progress.

    Raises:
        Phi3EdgeError: see the subclasses; nothing is left behind.
    """
    require_quantizers()
    with reporting(stages) as report:
        # from the config: what will be refused is refused before gigabytes are fetched
        spec = resolve_spec(name, report)
        ready = prepare_spec(spec, target, recipe, context, format_, kv_cache, budget, rounding)
        if not force and ready.budget is None:
            require_fit(ready.plan, ready.fit, ready.target_name, ready.target, ready.format)
        folder = out or default_folder(ready)
        folders.require_free(folder, force)
        source = resolve(name, report)
    with source:
        spec = parse_config(source.config, source.generation_config, source.name)
        source.check(spec)
        ready = prepare_spec(spec, target, recipe, context, format_, kv_cache, budget, rounding)
        limit = split_max_size or (ready.target.files.max_bytes if ready.target.files else None)
        if ready.budget:
            ready = fill_budget(ready, source, rounding, stages, limit)
            if not force:
                require_fit(ready.plan, ready.fit, ready.target_name, ready.target, ready.format)
        imported = any(t.method == "imported" for t in ready.plan.tensors)  # then the recipe says little
        name_ = source.name if imported else f"{source.name}-{ready.plan.recipe}"
        scales = calibrate_cache(source.path, stages) if ready.runtime.kv_cache == "int8" else None
        job = Job(ready.plan, ready.recipe, source, ready.runtime, ready.fit.context, name_, limit, scales)
        emitter = open_emitter(ready.format, job)
        rounded = round_weights(source, ready.plan, rounding, ready.runtime.kv_cache, ready.format, stages)
        with new_folder(folder, lambda: folders.require_free(folder, force)) as partial:
            with (
                stages("quantize", ready.plan.weight_bytes) as advance,
                source.each_read_once(spec) if rounded.rows is None else nullcontext(),  # calibration read them before
                closing(quantize(rounded.source, ready.plan, threads, rounded.rows, rounded.statistics)) as stream,
            ):
                files = emitter.emit(stream, partial, advance)
            taken = sum(f.bytes for f in files)
            if ready.budget and ready.budget.bytes is not None and taken > ready.budget.bytes:
                raise RuntimeError(f"the files take {taken} bytes, over their budget of {ready.budget.bytes}")
            notes = [*ready.notes, *rounded.notes, *emitter.notes]
            written = [{"name": f.path.name, "bytes": f.bytes, "sha256": f.sha256} for f in files]
            inputs = _describe_inputs(source, stages)
            content = _manifest(name, source.source, ready, written, inputs, notes, emitter.requires, rounded.described)
            if rounded.ids is not None:
                np.save(partial / folders.CALIBRATION, rounded.ids.astype(np.int32))
            manifest.write_json(partial / manifest.NAME, content)
            card.write(partial)
    paths = [folder / f.path.name for f in files]
    return Exported(folder, paths[0], paths, ready, notes)


def export_formats(
    name: str,
    target: str,
    formats: Sequence[Format],
    *,
    recipe: str | None = None,
    context: int | None = None,
    kv_cache: str | None = None,
    out: Path | None = None,
    split_max_size: int | None = None,
    budget: Budget | None = None,
    rounding: Rounding = PLAIN,
    force: bool = False,
    threads: int | None = None,
    stages: Stages = silent,
) -> list[Exported]:
    """Write a checkpoint in several formats for one target, each into a folder of that name within `out`.

    The folders appear together, when all are whole. Arguments and errors are those of `export`.
    """
    with reporting(stages) as report:
        spec = resolve_spec(name, report)
    for format_ in formats:  # what will be refused is refused before the first one is made
        ready = prepare_spec(spec, target, recipe, context, format_, kv_cache, budget, rounding)
        if not force and ready.budget is None:
            require_fit(ready.plan, ready.fit, ready.target_name, ready.target, format_)
    folder = out or default_folder(ready)
    with new_folder(folder, lambda: folders.require_free(folder, force)) as partial:
        made = [
            export(
                name,
                target,
                recipe=recipe,
                context=context,
                format_=format_,
                kv_cache=kv_cache,
                out=partial / format_,
                split_max_size=split_max_size,
                budget=budget,
                rounding=rounding,
                force=force,
                threads=threads,
                stages=stages,
            )
            for format_ in formats
        ]
    return [
        replace(
            one,
            folder=folder / one.folder.name,
            artifact=folder / one.folder.name / one.artifact.name,
            files=[folder / one.folder.name / path.name for path in one.files],
        )
        for one in made
    ]


def with_kv_cache(device: Target, format_: Format, kv_cache: str) -> Target:
    """The target with another type of KV cache for one format.

    Raises:
        UsageError: a type that the format's runtime does not have.
    """
    if kv_cache not in KV_TYPES[format_]:
        raise UsageError(f"unknown KV cache type {kv_cache!r} for {format_}", f"one of {', '.join(KV_TYPES[format_])}")
    runtime = device.formats[format_].model_copy(update={"kv_cache": kv_cache})
    return device.model_copy(update={"formats": {**device.formats, format_: runtime}})


def calibrate_cache(checkpoint: Path, stages: Stages) -> KVScales:
    """Scales of an int8 KV cache, from the float32 reference; see phi3edge.kv_calibration."""
    from phi3edge.kv_calibration import calibrate_kv

    return calibrate_kv(checkpoint, stages=stages)


def default_folder(ready: Prepared) -> Path:
    """Where an export goes if nobody says otherwise."""
    return Path("dist") / f"{ready.plan.model.name.lower()}-{ready.target_name}"


def require_quantizers() -> None:
    """Raise MissingExtraError unless the codecs can run."""
    try:
        import numba  # noqa: F401
    except ImportError:
        raise MissingExtraError("quantizing", "gguf") from None


def formats_of(target: str, wanted: str | None, recipe: str | None = None) -> list[Format]:
    """The formats to export: the wanted one, or both for "both".

    Without a wanted one it is the first that the target takes and the recipe, if one is named, is for.

    Raises:
        UsageError: an unknown format.
        UnsupportedError: a format that the target does not take.
    """
    name, device = load_target(target)
    taken = list(device.formats)
    if wanted is None:
        held = load_recipe(recipe)[1].formats if recipe else taken
        return [format_ for format_ in taken if format_ in held][:1] or taken[:1]
    if wanted not in (*FILES, "both"):
        raise UsageError(f"unknown format {wanted!r}", f"one of {', '.join(FILES)}, both")
    chosen = [format_ for format_ in taken if wanted in (format_, "both")]
    if not chosen or (wanted == "both" and len(chosen) < len(FILES)):
        reason = next(iter(device.without.values()), "phi3edge targets lists them")
        raise UnsupportedError(f"target {name} takes {', '.join(taken)}, not {wanted}", reason)
    return chosen


def _describe_inputs(source: Checkpoint, stages: Stages) -> list[JSON]:
    """Name, size and hash of every file of the checkpoint that was read."""
    paths = [source.path / name for name in SMALL_FILES if (source.path / name).is_file()] + list(source.shards)
    with stages("hash inputs", sum(p.stat().st_size for p in paths)) as advance:
        return [{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256(p, advance)} for p in paths]


def _manifest(
    name: str,
    source: Source,
    ready: Prepared,
    files: list[JSON],
    inputs: list[JSON],
    notes: list[str],
    requires: dict[str, str],
    calibration: JSON,
) -> JSON:
    """What was made, from what, how. Holds nothing that differs between two runs on the same inputs."""
    spec = ready.plan.model
    return {
        "schema": manifest.SCHEMA,
        "model": {
            "name": spec.name,
            "family": spec.family,
            "parameters": spec.parameters,
            "checkpoint": f"{source.repository}@{source.revision}" if source.revision else name,
            "repository": source.repository,
            "revision": source.revision,
            "licence": source.licence,
        },
        "format": ready.format,
        "requires": requires,
        "files": files,
        "target": ready.target_name,
        "context": ready.fit.context,
        "kv_cache": ready.runtime.kv_cache,
        "recipe": {"name": ready.plan.recipe, **recipes.to_json(ready.recipe)},
        "plan": {
            "bits_per_weight": round(ready.plan.bits_per_weight, 4),
            "weight_bytes": ready.plan.weight_bytes,
            "predicted_kl": ready.plan.predicted_kl,
            "roles": [
                {
                    "role": r.role,
                    "codec": r.codec,
                    "wanted": r.wanted,
                    "method": r.method,
                    "tensors": r.tensors,
                    "bytes": r.bytes,
                    "predicted_kl": r.predicted_kl,
                }
                for r in summarize(ready.plan)
            ],
            "chosen": chosen_tensors(ready.plan),
        },
        "calibration": calibration or None,
        "notes": notes,
        "seed": None,
        "inputs": inputs,
        "versions": {
            "phi3edge": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": version("numba"),
        },
    }
