"""`phi3edge targets` and `phi3edge recipes`: what can be named in an export."""

from __future__ import annotations

from phi3edge.cli._options import JsonOption
from phi3edge.cli._output import print_json, stdout, table
from phi3edge.recipes import shipped_recipes
from phi3edge.targets import shipped_targets
from phi3edge.units import size


def targets(as_json: JsonOption = False) -> None:
    """List the targets: devices that a model can be exported for.

    A target is a TOML file; give the path of your own wherever a name is asked for.

    Example: `phi3edge targets`
    """
    found = shipped_targets()
    if as_json:
        return print_json({name: target.model_dump(mode="json") for name, target in found.items()})
    rows = table("target", "format", "runtime", "recipe", ">context", "KV cache", ">app memory", ">bandwidth")
    for name, t in found.items():
        device = [size(t.memory.app), f"{t.bandwidth.gb_per_s:g} GB/s"]
        for format_, r in t.formats.items():
            first = format_ == next(iter(t.formats))
            rows.add_row(
                f"[bold]{name}[/bold]" if first else "",
                format_,
                r.name,
                r.recipe,
                str(r.context or t.context),
                r.kv_cache,
                *(device if first else ["", ""]),
            )
    stdout.print(rows)
    names = table("target", "what")
    for name, t in found.items():
        names.add_row(f"[bold]{name}[/bold]", t.summary)
    stdout.print("", names)
    return None


def recipes(as_json: JsonOption = False) -> None:
    """List the recipes: which codec each role of a model gets.

    A recipe is a TOML file; give the path of your own wherever a name is asked for.

    Example: `phi3edge recipes`
    """
    found = shipped_recipes()
    if as_json:
        return print_json({name: recipe.model_dump(mode="json") for name, recipe in found.items()})
    rows = table("recipe", "formats", "linear", "embedding", "head", "in some layers")
    for name, recipe in found.items():
        linear = recipe.codecs.get("linear", "")
        rows.add_row(
            f"[bold]{name}[/bold]",
            ", ".join(recipe.formats),
            linear,
            recipe.codecs.get("embedding", linear),
            recipe.codecs.get("head", linear),
            "; ".join(f"{', '.join(u.roles)} {u.codec}" for u in recipe.upgrades),
        )
    stdout.print(rows)
    names = table("recipe", "what")
    for name, recipe in found.items():
        names.add_row(f"[bold]{name}[/bold]", recipe.summary)
    stdout.print("", names)
    return None
