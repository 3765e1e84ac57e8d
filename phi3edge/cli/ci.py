"""`phi3edge ci`: hold artifacts to gates and baselines, for machines to read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from phi3edge import ci as checks
from phi3edge.cli._options import (
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
from phi3edge.cli._output import note, print_json, progress, say, stdout
from phi3edge.proof import Protocol
from phi3edge.report import render


def ci(
    artifacts: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT...", help="Folders that export wrote, or .gguf files.")
    ],
    gates: GatesOption = None,
    baselines: Annotated[
        Path | None, typer.Option("--baselines", help="A folder with an earlier report of each artifact, NAME.json.")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Write the baselines from what is found now.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A folder for junit.xml, summary.md and ci.json.")
    ] = None,
    checkpoint: ReferenceOption = None,
    target: GatesOfOption = None,
    text: TextOption = None,
    chunks: ChunksOption = 16,
    window: WindowOption = 512,
    stride: StrideOption = None,
    positions: PositionsOption = True,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Validate artifacts, hold them to gates and baselines, and write JUnit XML, a Markdown summary and JSON.

    Gates: those of target and recipe, and over them those of --gates. Where GITHUB_STEP_SUMMARY is set, the summary
    goes there too. Exit code 0: all gates of all artifacts passed; 1: one failed; 2: one could not be validated.

    Examples: `phi3edge ci dist/demo-cpu --gates gates.toml --out ci-results`,
    `phi3edge ci dist/* --baselines baselines --update`
    """
    protocol = Protocol(text, make_windows(chunks, window, stride), positions=positions, threads=threads)
    with progress(quiet=as_json) as stages:
        found = checks.check(artifacts, protocol, checkpoint, target, gates, baselines, update, stages)
    written = checks.write(found, out, os.environ) if out else []
    if as_json:
        print_json(checks.data(found))
    else:
        for one in found:
            if one.report:
                stdout.print(render(one.report), "")
            else:
                note(f"{one.name} was not validated: {one.error}")
        for path in written:
            say(f"written: {path}")
    if code := checks.exit_code(found):
        raise typer.Exit(code)
