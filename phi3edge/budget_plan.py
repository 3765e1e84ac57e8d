"""A plan under a byte budget: what every codec costs every tensor, the best choice, and what its files really take.

Experts of one layer and role take one codec together: a GGUF file has one tensor for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from phi3edge.budget import Budget, Choice, choose
from phi3edge.codecs import row_bytes
from phi3edge.errors import ConfigError, DoesNotFitError, UsageError
from phi3edge.plan import budget_codecs, make_plan
from phi3edge.progress import Stages
from phi3edge.recipes import Recipe, shipped_recipes
from phi3edge.targets import Format, Target
from phi3edge.types import ModelSpec, Option, QuantPlan

if TYPE_CHECKING:
    from phi3edge.calibration import CalibrationText
    from phi3edge.forward import Basis

SEQUENCES, TOKENS = 16, 256
"""The text that losses are predicted on."""

_ROUNDS = 4  # of choosing codecs and counting what their files take besides the weights


def find_budget(name: str, recipe: Recipe, wanted: Budget | None) -> Budget | None:
    """The budget to plan for: the wanted one, or the recipe's own; None where the recipe names every codec itself.

    Raises:
        UsageError: a budget for a recipe that takes none, or none for one that needs it.
    """
    if recipe.budget is None:
        if wanted is not None:
            raise UsageError(
                f"recipe {name} names each tensor's codec itself: it takes no budget",
                f"recipes that take one: {', '.join(n for n, r in shipped_recipes().items() if r.budget)}",
            )
        return None
    if wanted is None and recipe.budget.size is None:
        raise UsageError(f"recipe {name} chooses codecs under a budget, and none is given", "--budget 1.8GiB")
    return wanted or Budget(bytes=recipe.budget.size)


def budget_recipe(format_: Format) -> str:
    """The shipped recipe that chooses under whatever budget is given, for a format."""
    for name, recipe in shipped_recipes().items():
        if recipe.budget and recipe.budget.size is None and format_ in recipe.formats:
            return name
    raise ConfigError(f"no shipped recipe chooses codecs under a budget for {format_}")


def require_room(budget: Budget, spec: ModelSpec, name: str, recipe: Recipe, target: Target, format_: Format) -> None:
    """Raise unless the smallest codecs stay within a budget, file headers aside; no weights are read.

    Raises:
        DoesNotFitError: with the least bytes that the weights take.
    """
    tried = budget_codecs(spec, name, recipe, target, format_)
    options = _options(spec, {tensor: dict.fromkeys(codecs, 0.0) for tensor, codecs in tried.items()})
    choose(options, _limit(budget, spec), _left_alone(spec, name, recipe, options))


def plan_within(
    budget: Budget,
    checkpoint: Basis,
    spec: ModelSpec,
    name: str,
    recipe: Recipe,
    target: Target,
    format_: Format,
    measure: Callable[[QuantPlan], int],
    text: CalibrationText,
    weighted: bool,
    device: str,
    stages: Stages,
) -> tuple[QuantPlan, str]:
    """Choose each tensor's codec such that the predicted KL is least under a budget.

    Args:
        budget: the limit.
        checkpoint: the opened checkpoint, in the basis in which it is rounded.
        spec: the model in it.
        name: of the recipe.
        recipe: one with a [budget].
        target: where the artifact runs: its runtime's kernels bound the choice.
        format_: of the artifact.
        measure: gives the bytes of all files of a plan's artifact, or a little more.
        text: what losses are predicted on.
        weighted: whether rounding will know what the linears' inputs are; see phi3edge.sensitivity.
        device: where to compute.
        stages: shows progress.

    Returns:
        The plan, and a line that says how good a choice it is.

    Raises:
        DoesNotFitError: no choice meets the budget; the message says what the smallest one takes.
    """
    from phi3edge.sensitivity import kept_losses

    tried = budget_codecs(spec, name, recipe, target, format_)
    options = _options(spec, kept_losses(checkpoint, spec, text.ids, tried, recipe.method, weighted, device, stages))
    alone, limit = _left_alone(spec, name, recipe, options), _limit(budget, spec)
    together = _together(spec, options)
    if budget.bytes is None:
        measure = _weight_bytes
    plan = make_plan(spec, name, recipe)
    besides = measure(plan) - plan.weight_bytes
    fitting: list[tuple[Choice, QuantPlan]] = []
    for _ in range(_ROUNDS):
        choice = choose({group: _summed(options, names) for group, names in together.items()}, limit, besides + alone)
        plan = make_plan(spec, name, recipe, _spread(choice.options, together, options))
        taken = measure(plan)
        if taken <= limit:
            fitting.append((choice, plan))
        if besides == taken - plan.weight_bytes:
            break
        besides = taken - plan.weight_bytes
    if not fitting:
        raise DoesNotFitError(f"the files of {name} take {taken} bytes, the budget is {limit}", "allow a little more")
    choice, plan = min(fitting, key=lambda found: found[0].loss)
    said = (
        f"Predicted KL {choice.loss:.4f} nats per token, from {text.ids.size} tokens of {text.name}; no mix of these "
        f"codecs under the budget is predicted more than {100 * choice.gap:.2g} % better."
    )
    return plan, said + (" It counts no changed choice of experts: the KL will be larger." if spec.experts else "")


def _options(spec: ModelSpec, losses: Mapping[str, Mapping[str, float]]) -> dict[str, list[Option]]:
    """By tensor name, from losses by tensor name and codec."""
    shapes = {t.name: (t.size // t.shape[-1], t.shape[-1]) for t in spec.tensors}
    return {
        tensor: [Option(c, shapes[tensor][0] * row_bytes(c, shapes[tensor][1]), loss) for c, loss in by_codec.items()]
        for tensor, by_codec in losses.items()
    }


def _together(spec: ModelSpec, options: Mapping[str, object]) -> dict[str, list[str]]:
    """The tensors that take one codec together, by the first one's name."""
    groups: dict[tuple[str, int | None], list[str]] = {}
    for t in spec.tensors:
        if t.name in options:  # of a role and layer there are several only where there are experts
            groups.setdefault((t.role, t.layer), []).append(t.name)
    return {names[0]: names for names in groups.values()}


def _summed(options: Mapping[str, Sequence[Option]], names: Sequence[str]) -> list[Option]:
    """The options of tensors that take one codec together, which are of one shape."""
    alike = zip(*(options[name] for name in names), strict=True)
    return [Option(of[0].codec, sum(o.bytes for o in of), sum(o.loss for o in of)) for of in alike]


def _spread(
    chosen: Mapping[str, Option], together: Mapping[str, Sequence[str]], options: Mapping[str, Sequence[Option]]
) -> dict[str, Option]:
    """Each tensor's own option, from those chosen for groups."""
    return {
        name: next(option for option in options[name] if option.codec == taken.codec)
        for group, taken in chosen.items()
        for name in together[group]
    }


def _limit(budget: Budget, spec: ModelSpec) -> int:
    """The budget in bytes."""
    if budget.bytes is not None:
        return budget.bytes
    assert budget.bits_per_weight is not None
    return int(budget.bits_per_weight * spec.parameters / 8)


def _left_alone(spec: ModelSpec, name: str, recipe: Recipe, options: Mapping[str, object]) -> int:
    """Bytes of the tensors that no budget chooses a codec for."""
    return sum(t.bytes for t in make_plan(spec, name, recipe).tensors if t.tensor.name not in options)


def _weight_bytes(plan: QuantPlan) -> int:
    return plan.weight_bytes
