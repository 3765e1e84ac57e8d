"""phi3edge.json: what an artifact is, what it was made from and how, so that it can be checked and made again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from phi3edge.errors import OutputError
from phi3edge.progress import Advance
from phi3edge.types import JSON

NAME = "phi3edge.json"
SCHEMA = 1


def sha256(path: Path, advance: Advance | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal; `advance` is told the bytes read."""
    digest = hashlib.sha256()
    buffer = bytearray(4 * 2**20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if advance:
                advance(count)
    return digest.hexdigest()


def describe(paths: Iterable[Path]) -> list[JSON]:
    """Name, size and hash of each file, sorted by name."""
    return [{"name": p.name, "bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(paths)]


def write_json(path: Path, content: Any) -> None:
    """Write a JSON document; see `write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that no half file is ever seen under its name."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(folder: Path) -> JSON:
    """The manifest of an artifact's folder.

    Raises:
        OutputError: no manifest, not JSON, or one from a newer phi3edge.
    """
    path = folder / NAME
    if not path.is_file():
        raise OutputError(f"{folder} has no {NAME}; expected a folder that phi3edge export wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is not a phi3edge manifest: {error}") from None
    if schema != SCHEMA:
        raise OutputError(
            f"{path} has schema {schema}; this phi3edge reads {SCHEMA}",
            "use the phi3edge that wrote it, or a newer one",
        )
    return manifest


def verify(folder: Path, advance: Advance | None = None) -> list[str]:
    """Compare an artifact's files with its manifest.

    Returns:
        One line for each file that is missing, has another size, or has another hash; empty if all is well.

    Raises:
        OutputError: no readable manifest.
    """
    problems = []
    for entry in read_manifest(folder)["files"]:
        name = entry["name"]
        if Path(name).name != name:
            raise OutputError(f"{folder / NAME} names a file outside its folder: {name!r}")
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name}: {path.stat().st_size} bytes, expected {entry['bytes']}")
        elif (found := sha256(path, advance)) != entry["sha256"]:
            problems.append(f"{name}: sha256 {found}, expected {entry['sha256']}")
    return problems
