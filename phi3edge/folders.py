"""An artifact's folder: the files that are ours in it, and when another may take its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from phi3edge import manifest
from phi3edge.calibration import CalibrationText
from phi3edge.emitters import FILES
from phi3edge.errors import OutputError
from phi3edge.types import JSON

REPORT, PAGE, CARD = "report.json", "report.html", "README.md"
LAYERS, BENCH, EVAL = "layers.json", "bench.json", "eval.json"
COMPARISON, COMPARISON_PAGE = "comparison.json", "comparison.html"
CALIBRATION = "calibration.npy"
"""Token ids of the calibration text, int32 (sequences, tokens): what may never be evaluated on."""

_OURS = (manifest.NAME, REPORT, PAGE, CARD, LAYERS, BENCH, EVAL, CALIBRATION)


def artifacts_in(folder: Path) -> list[Path]:
    """The artifacts' folders within a folder that `export_formats` wrote; empty for anything else."""
    if not folder.is_dir() or (folder / manifest.NAME).is_file():
        return []
    return [folder / name for name in FILES if (folder / name / manifest.NAME).is_file()]


def require_free(folder: Path, force: bool) -> None:
    """Raise unless an artifact may take the place of `folder`.

    Raises:
        OutputError: `folder` exists and `force` is false, or it is not an artifact, which is never replaced, or it is
            the working folder or holds it.
    """
    if not folder.exists():
        return
    if Path.cwd().is_relative_to(folder.resolve()):
        raise OutputError(f"{folder} is the working folder or holds it", "choose a folder of its own: --out NAME")
    if not folder.is_dir() or (strange := _strangers(folder)):
        what = f"holds {strange[0]}, which phi3edge did not write" if folder.is_dir() else "is a file"
        raise OutputError(f"{folder} {what}; it is never replaced", "choose another --out")
    if not force:
        raise OutputError(f"{folder} exists", "--force replaces it, --out writes elsewhere")


def _strangers(folder: Path) -> list[str]:
    """Names in a folder that are no part of an artifact of ours, sorted."""
    found = {path.name for path in folder.iterdir()}
    if manifest.NAME in found:
        found -= {*_OURS, *(entry["name"] for entry in manifest.read_manifest(folder)["files"])}
    parts = artifacts_in(folder)
    if parts:
        found -= {COMPARISON, COMPARISON_PAGE, *(part.name for part in parts)}
    return sorted([*found, *(f"{part.name}/{name}" for part in parts for name in _strangers(part))])


def calibration_of(folder: Path, said: JSON) -> CalibrationText | None:
    """What an artifact of ours was calibrated on.

    Raises:
        OutputError: its file is not the one that the manifest speaks of.
    """
    described = said.get("calibration")
    if not described or described["sha256"] is None:  # an importance matrix has no text with it
        return None
    try:
        text = CalibrationText(np.load(folder / CALIBRATION).astype(np.int64), described["text"])
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot read {folder / CALIBRATION}: {error}", "export the artifact again") from error
    if text.sha256 != described["sha256"]:
        raise OutputError(f"{folder / CALIBRATION} is not what {manifest.NAME} says", "export the artifact again")
    return text
