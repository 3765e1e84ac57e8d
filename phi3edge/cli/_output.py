"""Where a command's output goes: data to stdout, talk and progress to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from phi3edge.progress import Advance, Stages, silent

PIPE_WIDTH = 140
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
stderr = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else PIPE_WIDTH)


printed_json = False


def print_json(content: Any) -> None:
    """One JSON document on stdout."""
    global printed_json
    printed_json = True
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def note(text: str) -> None:
    """A remark on stderr."""
    stderr.print(f"[yellow]note:[/yellow] {_plain(text)}", soft_wrap=not stderr.is_terminal)


def say(text: str) -> None:
    """A line of talk on stderr."""
    stderr.print(_plain(text), soft_wrap=True)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def table(*columns: str, title: str | None = None) -> Table:
    """A table in the one style of phi3edge; columns whose names start with ">" are aligned to the right."""
    result = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for number, column in enumerate(columns):
        right = column.startswith(">")
        justify: Literal["left", "right"] = "right" if right else "left"
        result.add_column(column.lstrip(">"), justify=justify, header_style="dim", no_wrap=right or number == 0)
    return result


@contextmanager
def progress(quiet: bool) -> Iterator[Stages]:
    """Bars on stderr, one per stage; nothing if `quiet` or if stderr is no terminal (then one line per stage)."""
    if quiet:
        yield silent
        return
    if not stderr.is_terminal:
        yield _lines
        return
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]left[/dim]"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr) as bars:

        @contextmanager
        def stage(name: str, total: int | None = None) -> Iterator[Advance]:
            task = bars.add_task(name, total=total)
            yield lambda units: bars.advance(task, units)
            bars.update(task, total=total or 1, completed=total or 1)

        yield stage


@contextmanager
def _lines(name: str, total: int | None = None) -> Iterator[Advance]:
    stderr.print(f"{name} ...")
    yield lambda units: None
