"""`phi3edge validate`: run an artifact beside its reference and hold it against gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi3edge import build
from phi3edge.cli._options import ChunksOption, JsonOption, TextOption, ThreadsOption
from phi3edge.cli._output import print_json, progress, say, stdout
from phi3edge.report import Report, render, to_data


def validate(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that export wrote, or a .gguf file.")],
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
        report, written = build.validate_artifact(
            artifact, checkpoint, target, text=text, chunks=chunks, threads=threads, stages=stages
        )
    if as_json:
        print_json(to_data(report))
    else:
        show(report, written)
    if not report.passed:
        raise typer.Exit(1)


def show(report: Report, written: Path | None) -> None:
    """The report's table, and where its file is."""
    stdout.print(render(report))
    if written:
        say(f"report: {written}")
