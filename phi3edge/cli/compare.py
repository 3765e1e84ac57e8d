"""`phi3edge compare`: any artifacts of one checkpoint side by side, in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from phi3edge import comparison, folders, page, proof
from phi3edge.cli._options import (
    ChunksOption,
    GatesOfOption,
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
from phi3edge.comparison import Comparison
from phi3edge.errors import UsageError
from phi3edge.files import write_text


def compare(
    artifacts: Annotated[
        list[Path],
        typer.Argument(metavar="ARTIFACTS...", help="Folders that export wrote, .gguf files or GenAI folders."),
    ],
    checkpoint: ReferenceOption = None,
    target: GatesOfOption = None,
    text: TextOption = None,
    chunks: ChunksOption = 16,
    window: WindowOption = 512,
    stride: StrideOption = None,
    positions: PositionsOption = True,
    threads: ThreadsOption = None,
    reports: Annotated[
        bool, typer.Option("--reports", help="Run nothing: show the report.json that is in each folder, or given.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write the comparison as a page, to this file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put artifacts of one checkpoint side by side: each against the reference, and each against the others.

    Anybody's artifacts can be compared; --checkpoint says of what they are, where no manifest does. With --reports,
    nothing runs: reports of different texts, protocols or references are refused.

    Exit code 0: every artifact passed its gates; 1: one failed; 2: bad usage or input.

    Examples: `phi3edge compare dist/demo-q4_0 dist/demo-q4_k_m --html comparison.html`,
    `phi3edge compare dist/demo-iphone peer.gguf --checkpoint demo --chunks 40`,
    `phi3edge compare --reports dist/demo-q4_0 old/report.json`
    """
    if html is not None:
        _require_page(html)
    if reports:
        found, places = _read(artifacts)
    else:
        places = _require_several(proof.name_artifacts(artifacts))
        protocol = proof.Protocol(text, make_windows(chunks, window, stride), positions=positions, threads=threads)
        with progress(quiet=as_json) as stages:
            found = proof.validate_together(places, checkpoint, target, protocol, stages)
    if as_json:
        print_json(comparison.comparison_data(found))
    else:
        stdout.print(comparison.render(found))
    if html is not None:
        write_text(html, page.render(found, {n: p if p.is_dir() else p.parent for n, p in places.items()}))
        say(f"page: {html}")
    if not found.passed:
        raise typer.Exit(1)


def _read(given: list[Path]) -> tuple[Comparison, Mapping[str, Path]]:
    """Reports that are there, or the comparison of a folder that was exported in several formats."""
    named = proof.name_artifacts([path.parent if path.name == folders.REPORT else path for path in given])
    if len(given) == 1 and (kept := given[0] / folders.COMPARISON).is_file():
        return comparison.read_comparison(kept), named
    named = {name.removesuffix(".json"): path for name, path in _require_several(named).items()}
    files = {name: path / folders.REPORT if path.is_dir() else path for name, path in named.items()}
    return comparison.read_reports(files), named


def _require_several(named: Mapping[str, Path]) -> Mapping[str, Path]:
    if len(named) < 2:
        raise UsageError("expected two artifacts or more, got one", "phi3edge validate is for one")
    return named


def _require_page(path: Path) -> None:
    """Raise what would keep the page from being written, before time is spent."""
    page.require_plotting()
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--html {path}: expected a file whose name ends in .html")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"--html {path}: there is no folder {path.parent}", "make it, or name another")
