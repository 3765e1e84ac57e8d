"""Answers of a model to requests, kept as they come: a line of JSON each, so that an interrupted run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi3edge.errors import OutputError


class Answers:
    """What one model has answered under one protocol, by the request's key; in memory, and in a file that only grows.

    Args:
        path: the file; made with its folder if it is not there. A line that an interruption cut off is dropped.

    Raises:
        OutputError: the file cannot be read or made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.is_file() else b""
            whole = data.rfind(b"\n") + 1
            self._file = path.open("ab")
            if whole < len(data):
                self._file.truncate(whole)
        except OSError as error:
            raise OutputError(
                f"cannot keep answers in {path}: {error.strerror}", "PHI3EDGE_CACHE names another folder"
            ) from error
        for line in data[:whole].splitlines():
            entry = json.loads(line)
            self._found[entry["key"]] = entry["answer"]

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> Any:
        return self._found[key]

    def add(self, key: str, asked: str, answer: Any) -> None:
        """Keeps an answer; the file has it before this returns.

        Args:
            key: names the request by all that its answer depends on.
            asked: where it comes from (task and document), for people who read the file.
            answer: what JSON can hold.
        """
        self._found[key] = answer
        self._file.write(json.dumps({"key": key, "asked": asked, "answer": answer}).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
