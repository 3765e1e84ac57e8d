"""`phi3edge verify`: are an artifact's files what its manifest says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi3edge import manifest
from phi3edge.cli._options import JsonOption
from phi3edge.cli._output import print_json, progress, stdout
from phi3edge.errors import OutputError
from phi3edge.units import size


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that phi3edge export wrote.")],
    as_json: JsonOption = False,
) -> None:
    """Check the size and SHA-256 of every file of an artifact against its manifest. Exit code 2 if one differs.

    Example: `phi3edge verify dist/demo-iphone`
    """
    files = manifest.read_manifest(folder)["files"]
    with progress(quiet=as_json) as stages, stages("verify", sum(f["bytes"] for f in files)) as advance:
        problems = manifest.verify(folder, advance)
    if problems:
        raise OutputError(f"{folder}: {'; '.join(problems)}", "export again, or copy the folder again")
    if as_json:
        return print_json({"folder": str(folder), "files": files, "passed": True})
    for f in files:
        stdout.print(f"{f['name']}: {size(f['bytes'])}, as written")
    return None
