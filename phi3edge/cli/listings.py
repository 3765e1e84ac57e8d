"""`phi3edge targets` and `phi3edge recipes`: what can be named in an export."""

from __future__ import annotations

from phi3edge.cli._options import JsonOption
from phi3edge.cli._output import print_json, stdout, table
from phi3edge.recipes import GROUPS, shipped_recipes
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
    rows = table("target", "what", "formats", "recipe", ">context", "KV cache", ">app memory", ">bandwidth")
    for name, t in found.items():
        rows.add_row(
            f"[bold]{name}[/bold]",
            t.summary,
            ", ".join(t.formats),
            ", ".join(r.recipe for r in t.formats.values()),
            str(t.context),
            ", ".join(r.kv_cache for r in t.formats.values()),
            size(t.memory.app),
            f"{t.bandwidth.gb_per_s:g} GB/s",
        )
    stdout.print(rows)
    return None


def recipes(as_json: JsonOption = False) -> None:
    """List the recipes: which codec each role of a model gets.

    A recipe is a TOML file; give the path of your own wherever a name is asked for.

    Example: `phi3edge recipes`
    """
    found = shipped_recipes()
    if as_json:
        return print_json({name: recipe.model_dump(mode="json") for name, recipe in found.items()})
    rows = table("recipe", "what", "formats", "codecs")
    for name, recipe in found.items():
        codecs = [f"{recipe.codecs[g]}" if g in recipe.codecs else "" for g in GROUPS[:1]]
        codecs += [f"{role} {codec}" for role, codec in recipe.codecs.items() if role not in GROUPS]
        codecs += [f"{', '.join(u.roles)} {u.codec} (some layers)" for u in recipe.upgrades]
        rows.add_row(f"[bold]{name}[/bold]", recipe.summary, ", ".join(recipe.formats), "; ".join(filter(None, codecs)))
    stdout.print(rows)
    return None
