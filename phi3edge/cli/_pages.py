"""The page of a folder, written after whatever changes what it shows."""

from __future__ import annotations

from pathlib import Path

from phi3edge import folders
from phi3edge.cli._output import note, say
from phi3edge.errors import MissingExtraError


def refresh_pages(folder: Path, quiet: bool) -> None:
    """Write the pages again of a folder that was validated; else there is nothing to show yet."""
    if (folder / folders.REPORT).is_file():
        write_pages(folder, quiet)


def write_pages(folder: Path, quiet: bool) -> None:
    """Write the pages of an artifact's folder, or of one with several artifacts and of each of these."""
    from phi3edge import page

    try:
        for part in [*folders.artifacts_in(folder), folder]:
            written = page.write(part)
    except MissingExtraError as error:
        if not quiet:
            note(f"no page: {error.message}; {error.hint}")
        return
    if not quiet:
        say(f"page: {written}")
