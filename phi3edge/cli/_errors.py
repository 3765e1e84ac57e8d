"""The one place where errors become text and exit codes: 1 a gate failed, 2 bad usage or input, 101 our own bug."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import typer

from phi3edge.cli import _output
from phi3edge.cli._output import print_json, stderr
from phi3edge.errors import Phi3EdgeError

BUG, INTERRUPTED, TERMINATED = 101, 130, 143
UsageError: Any = typer.BadParameter.__base__  # of every wrong option or argument; typer has no name of its own for it


def guard(command: Callable[[], object]) -> int:
    """Run a command; print what went wrong in one line, with the next thing to do; return the exit code."""
    try:
        code = command()
    except Phi3EdgeError as error:
        return _failed(error.message, error.hint, error.exit_code)
    except UsageError as error:
        return _failed(error.format_message(), f"{error.ctx.command_path} --help" if error.ctx else None, 2)
    except typer.Abort:
        code = INTERRUPTED
    except SystemExit as leaving:  # typer's way out of --help, and ours of a signal
        code = leaving.code
    except BrokenPipeError:
        return 0
    except OSError as error:  # a disk, a permission: nothing that a traceback explains better
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error), None, 2)
    except Exception:
        stderr.print_exception()
        stderr.print("[bold red]This is a bug in phi3edge.[/bold red] Please report it with the lines above.")
        return BUG
    if code in (INTERRUPTED, TERMINATED):
        stderr.print("interrupted; no half-written result was left behind")
    return code if isinstance(code, int) else 0


def leave_on_signals() -> None:
    """Let the signals that ask a process to end run its clean-up, as Ctrl-C does."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, leave)


def _failed(message: str, hint: str | None, code: int) -> int:
    if "--json" in sys.argv and not _output.printed_json:  # a document that is out says it already
        print_json({"error": message, "hint": hint, "exit_code": code})
    stderr.print("[bold red]error:[/bold red]", end=" ")
    stderr.print(message, markup=False, soft_wrap=True)
    if hint:
        stderr.print("  [dim]try:[/dim]", end=" ")
        stderr.print(hint, markup=False, soft_wrap=True)
    return code
