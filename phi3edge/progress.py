"""How long work tells that it goes on: a stage with a name, a total and steps. Who shows it is the caller's choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[int], None]
Stages = Callable[[str, "int | None"], AbstractContextManager[Advance]]
"""stages(name, total) opens a stage of `total` units (None: unknown) and gives a function that counts units done."""


@contextmanager
def silent(name: str, total: int | None = None) -> Iterator[Advance]:
    """A stage that shows nothing."""
    yield lambda units: None
