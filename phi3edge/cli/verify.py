"""`phi3edge verify`: are an artifact's files what its manifest says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phi3edge import manifest
from phi3edge.cli._options import JsonOption
from phi3edge.cli._output import print_json, progress, stdout
from phi3edge.errors import OutputError
from phi3edge.folders import artifacts_in
from phi3edge.units import size


def verify(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that phi3edge export wrote.")],
    as_json: JsonOption = False,
) -> None:
    """Check the size and SHA-256 of every file of an artifact against its manifest. Exit code 2 if one differs.

    A folder with several artifacts, which `--format both` wrote, is checked as a whole.

    Example: `phi3edge verify dist/demo-iphone`
    """
    folders = artifacts_in(folder) or [folder]
    files = {one: manifest.read_manifest(one)["files"] for one in folders}
    with progress(quiet=as_json) as stages:
        for one in folders:
            with stages("verify", sum(f["bytes"] for f in files[one])) as advance:
                problems = manifest.verify(one, advance)
            if problems:
                raise OutputError(f"{one}: {'; '.join(problems)}", "export again, or copy the folder again")
    if as_json:
        described = [{"folder": str(one), "files": files[one], "passed": True} for one in folders]
        return print_json(described[0] if folders == [folder] else {"folder": str(folder), "artifacts": described})
    for one in folders:
        for f in files[one]:
            stdout.print(f"{(one / f['name']).relative_to(folder)}: {size(f['bytes'])}, as written")
    return None
