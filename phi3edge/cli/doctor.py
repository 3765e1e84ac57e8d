"""`phi3edge doctor`: what is installed, what is missing, and whether the runtimes really run."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata

import typer

from phi3edge import __version__, registry
from phi3edge.cache import cache_dir
from phi3edge.cli._options import JsonOption
from phi3edge.cli._output import print_json, stdout, table
from phi3edge.errors import MissingExtraError, RunnerError, install_command
from phi3edge.machine import usable_cores
from phi3edge.types import JSON
from phi3edge.units import size

EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "gguf": (("numba",), "write GGUF files: the quantizers"),
    "onnx": (
        ("numba", "onnxruntime", "onnxruntime-genai", "onnx-ir", "torch", "transformers"),
        "write and run ONNX Runtime GenAI folders",
    ),
    "llama-cpp": (("llama-cpp-python",), "run GGUF files: llama.cpp"),
    "reference": (("torch", "transformers", "sentencepiece"), "compare with the checkpoint: the float32 reference"),
}
"""Extra: the packages that it adds, and what they are for."""


def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, what a missing extra would add, and whether each runtime really starts.

    Each runtime runs a tiny quantized model in a process of its own: on some machines it starts and then crashes.
    Exit code 1 if a runtime is installed and does not run; missing extras are no failure.

    Example: `phi3edge doctor`
    """
    runtimes = [probe(name) for name in registry.names("runners")]
    found: JSON = {"machine": machine(), "extras": extras(), "runtimes": runtimes}
    broken = any(r["installed"] and not r["runs"] for r in runtimes)
    if as_json:
        print_json(found)
    else:
        show(found)
    if broken:
        raise typer.Exit(1)


def machine() -> JSON:
    """This machine, as far as an export cares."""
    cache = cache_dir()
    existing = next(p for p in (cache, *cache.parents) if p.exists())
    return {
        "phi3edge": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "memory_bytes": _memory(),
        "cache": str(cache),
        "cache_free_bytes": shutil.disk_usage(existing).free,
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def extras() -> list[JSON]:
    """Every extra: what it is for, its packages' versions, and the command that adds what is missing."""
    rows = []
    for name, (packages, purpose) in EXTRAS.items():
        versions = {package: _version(package) for package in packages}
        complete = None not in versions.values()
        command = None if complete else install_command(name)
        rows.append(
            {"extra": name, "purpose": purpose, "packages": versions, "installed": complete, "command": command}
        )
    return rows


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def probe(name: str) -> JSON:
    """Whether a runtime is installed, starts, and computes finite logits with a tiny quantized model."""
    try:
        info = registry.load("runners", name).probe()
    except MissingExtraError as error:
        return {"runtime": name, "installed": False, "runs": False, "detail": error.hint}
    except RunnerError as error:
        return {"runtime": name, "installed": True, "runs": False, "detail": error.message}
    return {"runtime": name, "installed": True, "runs": True, "detail": info}


def show(found: JSON) -> None:
    """The findings for a terminal."""
    here = found["machine"]
    memory = f", {size(here['memory_bytes'])} of memory" if here["memory_bytes"] else ""
    stdout.print(
        f"phi3edge {here['phi3edge']}, Python {here['python']}, {here['system']}, {here['cores']} cores{memory}"
    )
    stdout.print(f"cache: {here['cache']} ({size(here['cache_free_bytes'])} free)\n")
    rows = table("extra", "for", "packages")
    for extra in found["extras"]:
        packages = ", ".join(f"{p} {v}" if v else f"[red]{p} missing[/red]" for p, v in extra["packages"].items())
        rows.add_row(extra["extra"], extra["purpose"], packages)
    stdout.print(rows)
    for extra in found["extras"]:
        if extra["command"]:
            stdout.print(f"to {extra['purpose']}:  {extra['command']}", markup=False, soft_wrap=True)
    stdout.print()
    for runtime in found["runtimes"]:
        verdict = (
            "[green]runs[/green]"
            if runtime["runs"]
            else "[red]does not run[/red]"
            if runtime["installed"]
            else "[dim]not installed[/dim]"
        )
        stdout.print(f"{runtime['runtime']}: {verdict}", end="")
        detail = runtime["detail"]
        if isinstance(detail, dict):
            detail = ", ".join(f"{k} {v}" for k, v in detail.items() if v is not None)
        stdout.print(f"  {detail}", markup=False)
