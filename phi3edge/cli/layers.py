"""`phi3edge layers`: where an artifact loses quality."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi3edge.cli._options import JsonOption, ReferenceOption, TextOption
from phi3edge.cli._output import note, print_json, progress, say, stdout, table
from phi3edge.cli._pages import refresh_pages
from phi3edge.errors import UsageError
from phi3edge.progress import reporting
from phi3edge.units import size

if TYPE_CHECKING:
    from phi3edge.layers import Losses, Row


def layers(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="An exported folder, .gguf file or ONNX folder.")
    ],
    by: Annotated[str, typer.Option("--by", help="block or role.")] = "role",
    checkpoint: ReferenceOption = None,
    text: TextOption = None,
    chunks: Annotated[
        int, typer.Option("--chunks", min=1, help="Chunks of 512 tokens to score on; time grows with them.")
    ] = 4,
    as_json: JsonOption = False,
) -> None:
    """Find where an artifact loses quality: its KL with one block, or one role, back in full precision.

    Computed in float32 on the artifact's own weights, with the basis that it was rounded in. Also the reverse: the KL
    of the reference with that one alone from the artifact; and what the next bigger codec would add in bytes and
    save in KL, an estimate. The table is also written into the artifact's folder as layers.json.

    Examples: `phi3edge layers dist/demo-iphone`, `phi3edge layers dist/demo-iphone --by block --chunks 2`,
    `phi3edge layers model.gguf --checkpoint demo --text wiki.test.raw`
    """
    from phi3edge.artifact import find_artifact
    from phi3edge.families import parse_config
    from phi3edge.reference import require_reference
    from phi3edge.sources import resolve
    from phi3edge.text import read_text

    if by not in ("block", "role"):
        raise UsageError(f"--by {by}: expected block or role")
    require_reference()
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "passive"
    )  # before torch loads OpenMP: threads that spin slow a busy machine
    from phi3edge.layers import find_losses, to_data, write

    found = find_artifact(artifact)
    if found.said is None and checkpoint is None:
        raise UsageError(f"{artifact} has no manifest beside it that says what it is", "give --checkpoint")
    name = checkpoint or (found.said or {})["model"]["checkpoint"]
    wanted = read_text(text) if text else None
    with progress(quiet=as_json) as stages:
        with reporting(stages) as told:
            source = resolve(name, told)
        with source:
            spec = parse_config(source.config, source.generation_config, source.name)
            source.check(spec)
            losses = find_losses(
                found,
                source,
                spec,
                "block" if by == "block" else "role",
                wanted,
                chunks,
                on_estimate=lambda seconds: None if as_json else say(f"about {_duration(seconds)}"),
                stages=stages,
            )
    written = write(losses, found.folder) if found.said and checkpoint is None else None
    if as_json:
        print_json(to_data(losses))
    else:
        _show(losses)
        if written:
            say(f"layers: {written}")
    if written:
        refresh_pages(written.parent, quiet=as_json)


def _show(losses: Losses) -> None:
    stdout.print(
        f"{losses.artifact}: KL {losses.kl:.4f} ± {losses.kl_error:.4f} over {losses.scored_tokens} tokens of "
        f"{losses.text}\nweights in basis: {losses.basis}\n",
        soft_wrap=True,
    )
    shown = table(
        losses.by,
        "codecs",
        ">bytes",
        ">KL without its loss",
        ">saved",
        ">KL of its loss alone",
        "next",
        ">adds",
        ">saves*",
        ">per MB*",
    )
    for row in losses.rows:
        bigger = row.next
        shown.add_row(
            _name(row),
            ", ".join(row.codecs),
            size(row.bytes),
            f"{row.kl_without:.4f}",
            f"{losses.kl - row.kl_without:+.4f}",
            f"{row.kl_only:.4f}",
            ", ".join(bigger.codecs) if bigger else "",
            size(bigger.bytes) if bigger else "",
            f"{bigger.kl_saved:.4f}" if bigger else "",
            f"{bigger.kl_saved_per_mb:.4f}" if bigger else "",
        )
    stdout.print(shown)
    stdout.print("* estimated: one bit more leaves a quarter of a loss", style="dim")
    offers = [row for row in losses.rows if row.next and row.next.kl_saved > 0]
    if offers:
        best = max(offers, key=lambda row: row.next.kl_saved_per_mb if row.next else 0.0)
        assert best.next is not None
        note(
            f"most for its bytes: {_name(best)} in {', '.join(best.next.codecs)}: {size(best.next.bytes)} more, "
            f"KL about {best.next.kl_saved:.4f} less"
        )


def _name(row: Row) -> str:
    return f"block {row.layer}" if row.role is None else row.role


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
