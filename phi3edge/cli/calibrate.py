"""`phi3edge calibrate`: statistics of a checkpoint's linears on a text, kept to be used again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi3edge import collect
from phi3edge.cli._options import CheckpointArg, JsonOption
from phi3edge.cli._output import note, print_json, progress, say
from phi3edge.statistics import IMATRIX_NAME
from phi3edge.units import size


def calibrate(
    checkpoint: CheckpointArg,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            help="self (the model's own words), python, self+python, a text FILE, or hub:ORG/NAME:FILE.",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option("--sequences", min=1, help="Sequences of text to run.")] = 128,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of each.")] = 512,
    moments: Annotated[
        bool, typer.Option("--moments", help="Keep second moments too; gigabytes for a model of billions of weights.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="Where to compute: cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default: dist/MODEL-statistics.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier folder of statistics.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the float model over a text and keep what its linears see, for exports with --statistics.

    Also writes imatrix.gguf, the same for llama.cpp's own tools. Interrupted, the same command goes on where it was.

    Examples: `phi3edge calibrate demo --out demo-statistics`,
    `phi3edge calibrate microsoft/Phi-3-mini-4k-instruct --calibration wiki.train.raw --sequences 64 --device cuda`
    """
    with progress(quiet=as_json) as stages:
        try:
            made = collect.calibrate(
                checkpoint,
                calibration=calibration,
                sequences=sequences,
                tokens=tokens,
                moments=moments,
                device=device,
                out=out,
                force=force,
                stages=stages,
            )
        except (KeyboardInterrupt, SystemExit):
            note("finished blocks are kept; the same command goes on after them")
            raise
    text = made.statistics.calibration
    assert text.ids is not None
    count = sum(path.stat().st_size for path in made.folder.iterdir())
    if as_json:
        return print_json(
            {
                "folder": str(made.folder),
                "imatrix": str(made.folder / IMATRIX_NAME),
                "model": made.model,
                "bytes": count,
                "linears": len(made.statistics),
                "moments": made.moments,
                "calibration": {
                    "name": text.name,
                    "sha256": text.sha256,
                    "sequences": text.ids.shape[0],
                    "tokens": text.ids.shape[1],
                },
                "notes": made.notes,
            }
        )
    for line in made.notes:
        note(line)
    say(f"{made.folder}: {size(count)}, {len(made.statistics)} linears on {text.ids.size} tokens of {text.name}")
    return None
