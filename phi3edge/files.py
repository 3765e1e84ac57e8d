"""Files that are whole or not there: written beside their place, and named when they are done; their hashes."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from phi3edge.errors import OutputError

Advance = Callable[[int], None]


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


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that no half file is ever seen under its name.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    with new_file(path) as file:
        file.write(text.encode())


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file, open for writing, that appears under its name when the block ends well, and is gone if it does not.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    partial = _beside(path, "partial")
    with _cannot_write(path):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows: folders need no fsync
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def new_folder(folder: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place when the block ends well, and is gone if it does not.

    What was there before is kept until the new folder has its name, and comes back if that fails.

    Args:
        folder: where the new folder goes; where a link leads, that is replaced, and the link stays.
        check: raises if the place may not be taken; called before the block and again after it.

    Raises:
        OutputError: the disk is full, or nothing can be written there.
    """
    check()
    place = folder.resolve()
    partial = _beside(place, "partial")
    with _cannot_write(folder):
        partial.mkdir(parents=True)
    try:
        yield partial
        check()
        with _cannot_write(folder):
            sync_folder(partial)
            take_place(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def take_place(partial: Path, place: Path) -> None:
    """Give a finished folder its name; what had that name is kept until then, and comes back if it fails."""
    if not place.exists():
        partial.rename(place)
    else:
        aside = _beside(place, "replaced")
        place.rename(aside)
        try:
            partial.rename(place)
        except BaseException:
            aside.rename(place)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(place.parent)


def _beside(path: Path, what: str) -> Path:
    """A hidden neighbour with a name that no other process takes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{what}")


@contextmanager
def _cannot_write(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
