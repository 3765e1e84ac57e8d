"""`phi3edge plan`: what an export would write, and whether it fits, without reading any weights."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from phi3edge.build import Prepared, formats_of, prepare
from phi3edge.cli._options import (
    BitsOption,
    BudgetOption,
    CalibrationOption,
    CheckpointArg,
    ContextOption,
    DeviceOption,
    FormatsOption,
    JsonOption,
    KVCacheOption,
    MethodOption,
    RecipeOption,
    TargetOption,
    parse_budget,
)
from phi3edge.cli._output import print_json, progress, stdout, table
from phi3edge.plan import require_fit, summarize, to_json
from phi3edge.rounding import Rounding
from phi3edge.units import size


def plan(
    checkpoint: CheckpointArg,
    target: TargetOption = "iphone",
    recipe: RecipeOption = None,
    method: MethodOption = None,
    context: ContextOption = None,
    kv_cache: KVCacheOption = None,
    format_: FormatsOption = None,
    budget: BudgetOption = None,
    bits_per_weight: BitsOption = None,
    calibration: CalibrationOption = None,
    device: DeviceOption = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Exit code 0 even if it does not fit.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what an export would write and whether it fits the target. Reads config.json only, no weights.

    Under a budget it reads the weights too, and finds out what rounding costs each; the export uses that again.

    Exit code 2 if it does not fit (0 with --force). With --format both, --json is a list of two plans.

    Examples: `phi3edge plan demo --target iphone`,
    `phi3edge plan microsoft/Phi-3-mini-4k-instruct --target android --format onnx --context 1024`,
    `phi3edge plan demo --budget 120MB`
    """
    formats, limit = formats_of(target, format_, recipe), parse_budget(budget, bits_per_weight)
    rounding = Rounding(method, calibration, device=device)
    with progress(quiet=as_json) as stages:
        plans = [
            prepare(checkpoint, target, recipe, context, chosen, kv_cache, limit, rounding, stages)
            for chosen in formats
        ]
    if as_json:
        documents = [{**describe(p), **to_json(p.plan, p.fit), "notes": p.notes} for p in plans]
        print_json(documents if len(documents) > 1 else documents[0])
    else:
        stdout.print(*map(render, plans), sep="\n")
    if not force:
        for p in plans:
            require_fit(p.plan, p.fit, p.target_name, p.target, p.format)


def describe(ready: Prepared) -> dict[str, object]:
    """The model and target of a plan, in a few fields."""
    model = ready.plan.model
    return {
        "model": model.name,
        "family": model.family,
        "parameters": model.parameters,
        "target": ready.target_name,
        "format": ready.format,
        "runtime": ready.runtime.name,
        "provider": ready.runtime.provider if ready.format == "onnx" else None,
    }


def render(ready: Prepared) -> Group:
    """The plan for a terminal."""
    plan, fit, model = ready.plan, ready.fit, ready.plan.model
    head = Text()
    head.append(f"{model.name}", style="bold")
    head.append(f"  {model.parameters / 1e9:.2f} B weights, {model.layers} layers, {model.heads} heads", style="dim")
    head.append(f" ({model.kv_heads} KV), hidden {model.hidden_size}\n", style="dim")
    head.append(f"{plan.recipe}", style="bold")
    head.append(f" for {ready.target_name}: {ready.target.summary}\n")
    head.append(f"{ready.format}", style="bold")
    head.append(f" for {ready.runtime.name}\n")
    predicted = plan.predicted_kl
    rows = table(
        "role", "codec", "method", ">tensors", ">bits/weight", ">bytes", ">" + "predicted KL" * bool(predicted)
    )
    for row in summarize(plan):
        codec = f"{row.codec} [yellow](not {row.wanted})[/yellow]" if row.wanted else row.codec
        lost = "" if row.predicted_kl is None else f"{row.predicted_kl:.4f}"
        rows.add_row(row.role, codec, row.method, str(row.tensors), f"{row.bits_per_weight:.2f}", size(row.bytes), lost)
    rows.add_row(
        "[bold]all[/bold]",
        "",
        "",
        "",
        f"[bold]{plan.bits_per_weight:.2f}[/bold]",
        f"[bold]{size(plan.weight_bytes)}[/bold]",
        "" if predicted is None else f"[bold]{predicted:.4f}[/bold]",
    )

    memory = table("memory (estimate)", ">bytes", "")
    in_file = (
        ""
        if fit.weights == plan.weight_bytes
        else f"as {ready.runtime.name} holds them; {size(plan.weight_bytes)} in the file"
    )
    memory.add_row("weights", size(fit.weights), in_file)
    memory.add_row("KV cache", size(fit.kv_cache), f"{fit.context} tokens, {ready.runtime.kv_cache}")
    memory.add_row(
        "scratch", size(fit.scratch), f"activations of a prompt's {fit.prompt} tokens at once, the runtime itself"
    )
    verdict = "[green]fits[/green]" if fit.fits else "[bold red]does not fit[/bold red]"
    memory.add_row("[bold]all[/bold]", f"[bold]{size(fit.total)}[/bold]", f"of {size(fit.limit)}: {verdict}")
    largest = f"largest context that fits: {fit.largest_context}" if fit.largest_context else "no context fits"
    speed = Text(
        f"\nRoofline: at most {fit.roofline_tokens_per_s:.0f} tokens/s decoded, {fit.roofline_full_tokens_per_s:.0f} "
        f"with a full cache. An estimate: {ready.target.bandwidth.gb_per_s:g} GB/s over the bytes a token reads; "
        "devices reach 40 to 65 % of it."
    )
    memory_source = Text(f"Memory limit: {ready.target.memory.source}.", style="dim")
    bandwidth_source = Text(f"Bandwidth: {ready.target.bandwidth.source}.", style="dim")
    notes = [Text(f"note: {text}", style="yellow") for text in ready.notes]
    return Group(head, rows, Text(), memory, Text(largest, style="dim"), speed, memory_source, bandwidth_source, *notes)
