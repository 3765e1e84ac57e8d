"""The `phi3edge` command: puts its subcommands together."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from phi3edge import __version__
from phi3edge.cli import (
    bench,
    calibrate,
    chat,
    ci,
    compare,
    doctor,
    export,
    inspect,
    layers,
    listings,
    plan,
    pull,
    push,
    validate,
    verify,
)
from phi3edge.cli import eval as evaluation
from phi3edge.cli._errors import guard, leave_on_signals

app = typer.Typer(
    name="phi3edge",
    help="Puts a Phi-3 checkpoint on a phone or a PC, and proves that it still is the same model.",
    epilog="Start with: phi3edge export demo --target iphone",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

MAKE, PROVE, LOOK = "Make an artifact", "Prove it", "Look around"
COMMANDS: dict[str, tuple[Callable[..., object], str]] = {
    "export": (export.export, MAKE),
    "plan": (plan.plan, MAKE),
    "calibrate": (calibrate.calibrate, MAKE),
    "pull": (pull.pull, MAKE),
    "push": (push.push, MAKE),
    "validate": (validate.validate, PROVE),
    "compare": (compare.compare, PROVE),
    "ci": (ci.ci, PROVE),
    "layers": (layers.layers, PROVE),
    "bench": (bench.bench, PROVE),
    "eval": (evaluation.run, PROVE),
    "chat": (chat.chat, LOOK),
    "inspect": (inspect.inspect, LOOK),
    "verify": (verify.verify, LOOK),
    "targets": (listings.targets, LOOK),
    "recipes": (listings.recipes, LOOK),
    "doctor": (doctor.doctor, LOOK),
}
for name, (command, panel) in COMMANDS.items():
    app.command(name, rich_help_panel=panel)(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before any subcommand."""


def main() -> None:
    """Entry point of the `phi3edge` script."""
    leave_on_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows has a code page that lacks most letters
            stream.reconfigure(encoding="utf-8")
    sys.exit(guard(lambda: app(sys.argv[1:] or ["--help"], standalone_mode=False)))
