"""`phi3edge validate`: run an artifact beside its reference and hold it against gates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi3edge import manifest
from phi3edge.build import REPORT_NAME
from phi3edge.cli._options import ChunksOption, JsonOption, TextOption, ThreadsOption
from phi3edge.cli._output import progress, say, stdout
from phi3edge.errors import UsageError
from phi3edge.files import write_text
from phi3edge.progress import reporting
from phi3edge.targets import load_target
from phi3edge.types import JSON

if TYPE_CHECKING:
    from phi3edge.report import Report

LEAST_CONTEXT = 512


def validate(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that export wrote, or a .gguf file.")],
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", help="The reference; default: what the manifest names.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="Whose gates to apply; default: what the manifest names.")
    ] = None,
    text: TextOption = None,
    chunks: ChunksOption = 16,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run an artifact beside its reference: perplexity, KL divergence, tokens, speed, memory; then the target's gates.

    Exit code 0: all gates passed; 1: one failed; 2: bad usage or input. The report is also written into the
    artifact's folder as report.json.

    Examples: `phi3edge validate dist/demo-iphone`,
    `phi3edge validate model.gguf --checkpoint demo --target iphone --text wiki.test.raw --chunks 40`
    """
    report = run(artifact, checkpoint, target, text, chunks, threads, quiet=as_json)
    if as_json:
        from phi3edge.report import to_json

        typer.echo(to_json(report), nl=False)
    if not report.passed:
        raise typer.Exit(1)


def require(target: str, text: Path | None) -> None:
    """Raise what `run` would raise for a target, a text or missing packages, before an export takes its time.

    Raises:
        Phi3EdgeError: a gate on an unknown metric, a text that cannot be read, an extra that is not installed.
    """
    from phi3edge.reference import require_reference
    from phi3edge.report import check_gates
    from phi3edge.runners.llama_cpp import require_runtime
    from phi3edge.text import read_text

    check_gates(load_target(target)[1].gates)
    if text:
        read_text(text)
    require_reference()
    require_runtime()


def run(
    artifact: Path,
    checkpoint: str | None,
    target: str | None,
    text: Path | None,
    chunks: int,
    threads: int | None,
    quiet: bool,
) -> Report:
    """Validate, show the table unless `quiet`, and write report.json if the artifact is in a folder of ours."""
    from phi3edge import report as reports
    from phi3edge import validate as validation
    from phi3edge.sources import resolve
    from phi3edge.text import read_text

    if not artifact.exists():
        raise UsageError(f"{artifact} does not exist", "expected a folder that export wrote, or a .gguf file")
    folder = artifact if artifact.is_dir() else artifact.parent
    described = manifest.read_manifest(folder) if artifact.is_dir() or (folder / manifest.NAME).is_file() else None
    path = folder / described["files"][0]["name"] if described and artifact.is_dir() else artifact
    checkpoint = checkpoint or _named(described, "checkpoint", "--checkpoint")
    _, device = load_target(target or _named(described, "target", "--target"))
    context = (described or {}).get("context") or device.context
    with progress(quiet) as stages:
        with reporting(stages) as told:
            source = resolve(checkpoint, told)
        source.close()  # the reference is computed from its folder
        result = validation.validate(
            path,
            source.path,
            text=read_text(text) if text else None,
            chunks=chunks,
            gates=device.gates,
            context=max(context, LEAST_CONTEXT),
            kv_type=device.kv_cache,
            threads=threads,
            name=source.name,
            source=source.source,
            stages=stages,
        )
    if described:
        write_text(folder / REPORT_NAME, reports.to_json(result))
    if not quiet:
        stdout.print(reports.render(result))
        if described:
            say(f"report: {folder / REPORT_NAME}")
    return result


def _named(described: JSON | None, key: str, option: str) -> str:
    """What the manifest says where the user said nothing."""
    if described is None:
        raise UsageError(f"the artifact has no {manifest.NAME} beside it that names its {key}", f"give {option}")
    value = described["model"]["checkpoint"] if key == "checkpoint" else described[key]
    return str(value)
