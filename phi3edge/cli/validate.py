"""`phi3edge validate`: run an artifact beside its reference and hold it against gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi3edge import build, comparison, report
from phi3edge.cli._options import ChunksOption, JsonOption, TextOption, ThreadsOption
from phi3edge.cli._output import print_json, progress, say, stdout
from phi3edge.comparison import Comparison
from phi3edge.progress import Stages
from phi3edge.report import Report
from phi3edge.types import JSON


def validate(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that export wrote, or a .gguf file")],
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", help="The reference; default: what the manifest names.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Whose gates to apply; default: what the manifest names.")
    ] = None,
    text: TextOption = None,
    chunks: ChunksOption = 16,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run an artifact beside its reference: perplexity, KL divergence, tokens, speed, memory; then the target's gates.

    Exit code 0: all gates passed; 1: one failed; 2: bad usage or input. The report is also written into the
    artifact's folder as report.json, unless --checkpoint or --target name others than its own.

    Examples: `phi3edge validate dist/demo-iphone`,
    `phi3edge validate model.gguf --checkpoint demo --target iphone --text wiki.test.raw --chunks 40`
    """
    with progress(quiet=as_json) as stages:
        found, written = run_validation(artifact, checkpoint, target, text, chunks, threads, stages)
    if as_json:
        print_json(to_data(found))
    else:
        show(found, written)
    if not found.passed:
        raise typer.Exit(1)


def run_validation(
    artifact: Path,
    checkpoint: str | None,
    target: str | None,
    text: Path | None,
    chunks: int,
    threads: int | None,
    stages: Stages,
) -> tuple[Report | Comparison, Path | None]:
    """Validates one artifact, or all of a folder that was exported in several formats."""
    run = build.validate_together if build.artifacts_in(artifact) else build.validate_artifact
    return run(artifact, checkpoint, target, text=text, chunks=chunks, threads=threads, stages=stages)


def show(found: Report | Comparison, written: Path | None) -> None:
    """The table of a report or comparison, and where its file is."""
    stdout.print(report.render(found) if isinstance(found, Report) else comparison.render(found))
    if written:
        say(f"report: {written}")


def to_data(found: Report | Comparison | None) -> JSON | None:
    """A report or comparison as plain data."""
    if found is None:
        return None
    return report.to_data(found) if isinstance(found, Report) else comparison.comparison_data(found)
