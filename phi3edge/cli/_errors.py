"""The one place where errors become text and exit codes: 1 a gate failed, 2 bad usage or input, 101 our own bug."""

from __future__ import annotations

import sys
from collections.abc import Callable

from phi3edge.cli._output import print_json, stderr
from phi3edge.errors import Phi3EdgeError

BUG, INTERRUPTED = 101, 130


def guard(command: Callable[[], object]) -> int:
    """Run a command; print what went wrong in one line, with the next thing to do; return the exit code."""
    try:
        command()
    except Phi3EdgeError as error:
        if "--json" in sys.argv:
            print_json({"error": error.message, "hint": error.hint, "exit_code": error.exit_code})
        stderr.print("[bold red]error:[/bold red]", end=" ")
        stderr.print(error.message, markup=False, soft_wrap=True)
        if error.hint:
            stderr.print("  [dim]try:[/dim]", end=" ")
            stderr.print(error.hint, markup=False, soft_wrap=True)
        return error.exit_code
    except SystemExit as leaving:  # typer's way out, also of Ctrl-C and of its own usage errors
        if leaving.code == INTERRUPTED:
            stderr.print("interrupted; nothing half-written was left behind")
        return leaving.code if isinstance(leaving.code, int) else 0
    except BrokenPipeError:
        return 0
    except Exception:
        stderr.print_exception()
        stderr.print("[bold red]This is a bug in phi3edge.[/bold red] Please report it with the lines above.")
        return BUG
    return 0
