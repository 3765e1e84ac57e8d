"""`phi3edge export`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from phi3edge import build, proof
from phi3edge.cli._options import (
    BitsOption,
    BudgetOption,
    CalibrationOption,
    CheckpointArg,
    ChunksOption,
    ContextOption,
    DeviceOption,
    FormatsOption,
    JsonOption,
    KVCacheOption,
    MethodOption,
    PositionsOption,
    RecipeOption,
    SequencesOption,
    StatisticsOption,
    TargetOption,
    TextOption,
    ThreadsOption,
    make_windows,
    parse_budget,
)
from phi3edge.cli._output import note, print_json, progress, say
from phi3edge.cli._pages import write_pages
from phi3edge.cli.validate import show, to_data
from phi3edge.errors import Phi3EdgeError
from phi3edge.plan import to_json
from phi3edge.rounding import Rounding
from phi3edge.types import JSON
from phi3edge.units import parse_size, size


def export(
    checkpoint: CheckpointArg,
    target: TargetOption = "iphone",
    recipe: RecipeOption = None,
    method: MethodOption = None,
    format_: FormatsOption = None,
    context: ContextOption = None,
    kv_cache: KVCacheOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default: dist/MODEL-TARGET.")] = None,
    split_max_size: Annotated[
        str | None, typer.Option("--split-max-size", help="Largest file, e.g. 1.5GB; default: the target's limit.")
    ] = None,
    budget: BudgetOption = None,
    bits_per_weight: BitsOption = None,
    calibration: CalibrationOption = None,
    sequences: SequencesOption = None,
    statistics: StatisticsOption = None,
    device: DeviceOption = "cpu",
    validation: Annotated[bool, typer.Option("--validate/--no-validate", help="Run it beside the reference.")] = True,
    text: TextOption = None,
    chunks: ChunksOption = 16,
    positions: PositionsOption = True,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an earlier artifact; write what does not fit.")
    ] = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantize a checkpoint for a target, write the artifact, and prove it against the reference.

    Exit code 0: written, and all gates passed; 1: written, but a gate failed; 2: bad usage or input.

    Examples: `phi3edge export demo --target iphone`,
    `phi3edge export microsoft/Phi-3-mini-4k-instruct --target android --recipe q4_0 --no-validate`
    """
    formats = build.formats_of(target, format_, recipe)
    if validation:
        proof.require_validation(target, formats, text)
    arguments: dict[str, Any] = {
        "recipe": recipe,
        "context": context,
        "kv_cache": kv_cache,
        "out": out,
        "split_max_size": parse_size(split_max_size) if split_max_size is not None else None,
        "budget": parse_budget(budget, bits_per_weight),
        "rounding": Rounding(method, calibration, sequences, statistics, device),
        "force": force,
        "threads": threads,
    }
    with progress(quiet=as_json) as stages:
        if len(formats) == 1:
            made = [build.export(checkpoint, target, format_=formats[0], stages=stages, **arguments)]
            folder = made[0].folder
        else:
            made = build.export_formats(checkpoint, target, formats, stages=stages, **arguments)
            folder = made[0].folder.parent
    if not as_json:
        for one in made:
            for line in one.notes:
                note(line)
            total = sum(p.stat().st_size for p in one.files)
            plan = one.prepared.plan
            say(f"{one.artifact}: {size(total)}, {plan.recipe}, {plan.bits_per_weight:.2f} bits per weight")
    found = None
    if validation:
        try:
            with progress(quiet=as_json) as stages:
                protocol = proof.Protocol(text, make_windows(chunks), positions=positions, threads=threads)
                found, written = proof.prove(folder, None, None, protocol, stages)
        except Phi3EdgeError:
            note(f"written, but not validated; `phi3edge validate {folder}` does it later")
            raise
        if not as_json:
            show(found, written)
        if written:
            write_pages(written.parent, quiet=as_json)
    if as_json:
        described = [describe(one) for one in made]
        print_json(
            {**described[0], "report": to_data(found)}
            if len(made) == 1
            else {"folder": str(folder), "artifacts": described, "comparison": to_data(found)}
        )
    if found is not None and not found.passed:
        raise typer.Exit(1)


def describe(made: build.Exported) -> JSON:
    """An artifact as plain data."""
    return {
        "folder": str(made.folder),
        "format": made.prepared.format,
        "files": [{"name": p.name, "bytes": p.stat().st_size} for p in made.files],
        "plan": to_json(made.prepared.plan, made.prepared.fit),
        "notes": made.notes,
    }
