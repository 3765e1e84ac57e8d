"""`phi3edge eval`: standard tasks on an artifact and its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phi3edge.cli._options import JsonOption, ThreadsOption
from phi3edge.cli._output import print_json, progress, say, stdout
from phi3edge.cli._pages import refresh_pages
from phi3edge.errors import UsageError

if TYPE_CHECKING:
    from phi3edge.evaluate import Estimate


def run(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that export wrote, or a .gguf file")],
    tasks: Annotated[
        str, typer.Option("--tasks", help="Names of lm-evaluation-harness's tasks or groups, with commas between.")
    ],
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", help="What it was made from; default: what the manifest names.")
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Run the checkpoint in float32, too, and compare document by document.")
    ] = False,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples in each prompt; default: what the task says.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only so many documents of each task: to try things out.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts by the checkpoint's chat template, examples as turns.")
    ] = False,
    task_folder: Annotated[
        Path | None,
        typer.Option("--task-folder", help="Your own task files (YAML); paths in them are relative to it."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=160, help="Longest prompt, and a perplexity's window; default: 4096 or fewer."),
    ] = None,
    threads: ThreadsOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run standard tasks (MMLU, HellaSwag, ARC, GSM8K ...) through lm-evaluation-harness.

    The cost is shown before it starts. Every answer is kept as it comes: a run that was interrupted goes on, and one
    with a higher --limit pays for the new documents alone. With --reference the table also shows the checkpoint, the
    difference with its standard error, and how many answers turned wrong or right. The result is also written into
    the artifact's folder as eval.json, unless --checkpoint names another than its own.

    Data sets come from the hub's cache or the hub; for a machine without one, --task-folder holds task files whose
    data are local JSON. No code is fetched, and tasks that run what a model writes are refused.

    Examples: `phi3edge eval dist/phi-3-mini-iphone --tasks mmlu --num-fewshot 5 --reference`,
    `phi3edge eval model.gguf --checkpoint microsoft/Phi-3-mini-4k-instruct --tasks hellaswag,arc_easy --limit 200`,
    `phi3edge eval dist/demo-iphone --tasks my_task --task-folder tasks/`
    """
    from phi3edge.evaluate import evaluate, render, to_data

    def confirm(estimates: Sequence[Estimate]) -> None:
        if dry_run:
            _show(estimates, as_json)
            raise typer.Exit
        if not as_json:
            for estimate in estimates:
                say(str(estimate))

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks names no task", "for example --tasks mmlu,hellaswag")
    with progress(quiet=as_json) as stages:
        found, written = evaluate(
            artifact,
            names,
            checkpoint,
            reference=reference,
            num_fewshot=num_fewshot,
            limit=limit,
            chat=chat,
            task_folder=task_folder,
            context=context,
            threads=threads,
            confirm=confirm,
            stages=stages,
        )
    if as_json:
        print_json(to_data(found))
    else:
        stdout.print(render(found))
        if written:
            say(f"evaluation: {written}")
    if written:
        refresh_pages(written.parent, quiet=as_json)


def _show(estimates: Sequence[Estimate], as_json: bool) -> None:
    if as_json:
        print_json([asdict(estimate) for estimate in estimates])
    else:
        for estimate in estimates:
            stdout.print(str(estimate), soft_wrap=True)
