"""A file that appears under its name only when it is whole; and the stream of tensors that goes into it."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from phi3edge.errors import OutputError
from phi3edge.files import sync_folder
from phi3edge.types import TensorPlan


def next_tensor(tensors: Iterator[tuple[TensorPlan, Iterable[Any]]], expected: TensorPlan) -> Iterable[Any]:
    """The packed rows of the stream's next tensor, which must be the expected one."""
    tensor, chunks = next(tensors, (None, ()))
    if tensor != expected:
        got = "the end" if tensor is None else repr(tensor.tensor.name)
        raise RuntimeError(f"expected tensor {expected.tensor.name!r} next, got {got}")
    return chunks


class PartialFile:
    """A file under a temporary name beside its own, hashed while it is written; removed unless it is published."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
        self.bytes, self.sha256 = 0, ""

    def __enter__(self) -> PartialFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.partial.open("wb")
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._hash = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1)
        self._hashed: Future[None] | None = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hasher.shutdown()
        try:
            self._file.close()
        finally:
            self.partial.unlink(missing_ok=True)

    def write(self, data: Any) -> int:
        """Write a buffer and return its size. Hashing it overlaps with the next one's quantization and writing."""
        view = memoryview(data).cast("B")
        if self._hashed is not None:
            self._hashed.result()
        self._hashed = self._hasher.submit(self._hash.update, view)
        try:
            self._file.write(view)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self.bytes += len(view)
        return len(view)

    def close(self) -> None:
        """Bring the content to the disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        self._file.close()
        self._hasher.shutdown()
        self.sha256 = self._hash.hexdigest()

    def publish(self) -> None:
        """Give the file its name."""
        try:
            self.partial.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise _cannot_write(self.path, error) from error


def _cannot_write(path: Path, error: OSError) -> OutputError:
    hint = "free some space or choose another folder" if error.errno == errno.ENOSPC else None
    return OutputError(f"{path}: cannot be written: {error.strerror}", hint)
