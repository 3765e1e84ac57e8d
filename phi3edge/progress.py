"""How long work tells that it goes on: a stage with a name, a total and steps. Who shows it is the caller's choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

Advance = Callable[[int], None]
Stages = Callable[[str, "int | None"], AbstractContextManager[Advance]]
"""stages(name, total) opens a stage of `total` units (None: unknown) and gives a function that counts units done."""

Told = Callable[[str, int, int], None]
"""told(what, done, total): for work that learns its stages and totals only as it goes."""


@contextmanager
def silent(name: str, total: int | None = None) -> Iterator[Advance]:
    """A stage that shows nothing."""
    yield lambda units: None


@contextmanager
def reporting(stages: Stages) -> Iterator[Told]:
    """A Told that opens a stage for every new `what` it hears of."""
    with ExitStack() as stack:
        opened: dict[str, Advance] = {}
        so_far: dict[str, int] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in opened:
                opened[what], so_far[what] = stack.enter_context(stages(what, total)), 0
            opened[what](done - so_far[what])
            so_far[what] = done

        yield told
