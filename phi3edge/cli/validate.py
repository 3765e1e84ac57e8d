"""`phi3edge validate`: run an artifact beside its reference and hold it against gates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi3edge import comparison, proof, report
from phi3edge.cli._options import (
    BaselineOption,
    ChunksOption,
    GatesOfOption,
    GatesOption,
    JsonOption,
    PositionsOption,
    ReferenceOption,
    StrideOption,
    TextOption,
    ThreadsOption,
    WindowOption,
    make_windows,
)
from phi3edge.cli._output import print_json, progress, say, stdout
from phi3edge.cli._pages import write_pages
from phi3edge.comparison import Comparison
from phi3edge.report import Report
from phi3edge.types import JSON


def validate(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A folder that export wrote, or any .gguf file or GenAI folder.")
    ],
    checkpoint: ReferenceOption = None,
    target: GatesOfOption = None,
    text: TextOption = None,
    chunks: ChunksOption = 16,
    window: WindowOption = 512,
    stride: StrideOption = None,
    gates: GatesOption = None,
    baseline: BaselineOption = None,
    positions: PositionsOption = True,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run an artifact beside its reference: perplexity, KL divergence, tokens, speed, memory; then hold it to gates.

    Exit code 0: all gates passed; 1: one failed; 2: bad usage or input. The report is also written into the
    artifact's folder as report.json and report.html, unless --checkpoint or --target name others than its own.

    Examples: `phi3edge validate dist/demo-iphone`,
    `phi3edge validate model.gguf --checkpoint demo --text wiki.test.raw --chunks 40`,
    `phi3edge validate dist/demo-iphone --gates gates.toml --baseline last/report.json`
    """
    limits, named = proof.user_gates(gates, artifact)
    protocol = proof.Protocol(text, make_windows(chunks, window, stride), limits, baseline or named, positions, threads)
    with progress(quiet=as_json) as stages:
        found, written = proof.prove(artifact, checkpoint, target, protocol, stages)
    if not as_json:
        show(found, written)
    if written:
        write_pages(written.parent, quiet=as_json)
    if as_json:
        print_json(to_data(found))
    if not found.passed:
        raise typer.Exit(1)


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
