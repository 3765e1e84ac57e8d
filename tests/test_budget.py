"""Choosing codecs under a byte budget, against brute force."""

import itertools
import random

import pytest

from phi3edge.budget import Choice, choose
from phi3edge.errors import DoesNotFitError
from phi3edge.types import Option


def random_options(generator: random.Random, tensors: int, unit: int = 1) -> dict[str, list[Option]]:
    """Options whose losses mostly fall with their bytes, as those of codecs do; a few do not."""
    options = {}
    for n in range(tensors):
        weights, weight = generator.randint(1, 40) * unit, generator.expovariate(1)
        sizes = sorted(generator.sample(range(2, 20), generator.randint(1, 5)))
        options[f"t{n}"] = [
            Option(f"c{bits}", bits * weights, weight * 2**-bits * generator.uniform(0.3, 3)) for bits in sizes
        ]
    return options


def brute_force(options: dict[str, list[Option]], limit: int) -> float | None:
    """The least loss within the limit, from all combinations; None if there is none."""
    losses = [
        sum(o.loss for o in chosen)
        for chosen in itertools.product(*options.values())
        if sum(o.bytes for o in chosen) <= limit
    ]
    return min(losses, default=None)


def check(choice: Choice, options: dict[str, list[Option]], limit: int) -> None:
    """That a choice is what it says, and within the limit."""
    assert list(choice.options) == list(options)
    assert all(option in options[name] for name, option in choice.options.items())
    assert choice.bytes == sum(o.bytes for o in choice.options.values()) <= limit
    assert choice.loss == pytest.approx(sum(o.loss for o in choice.options.values()))
    assert choice.bound <= choice.loss * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_the_best_choice_is_found(seed: int) -> None:
    generator = random.Random(seed)
    options = random_options(generator, generator.randint(1, 6))
    sizes = [[o.bytes for o in choices] for choices in options.values()]
    limit = generator.randint(sum(map(min, sizes)), sum(map(max, sizes)) + 5)
    choice = choose(options, limit)
    check(choice, options, limit)
    best = brute_force(options, limit)
    assert best is not None
    assert choice.loss == pytest.approx(best)
    assert choice.bound <= best * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_with_bytes_of_no_common_divisor_the_choice_is_near_the_bound(seed: int) -> None:
    generator = random.Random(seed)
    options = random_options(generator, 130, unit=100_003)
    options["t0"] = [Option(o.codec, o.bytes + n, o.loss) for n, o in enumerate(options["t0"])]
    sizes = [[o.bytes for o in choices] for choices in options.values()]
    limit = (sum(map(min, sizes)) + sum(map(max, sizes))) // 2
    choice = choose(options, limit)
    check(choice, options, limit)
    assert choice.gap < 0.01


def test_a_budget_above_everything_takes_the_best_and_no_more_bytes_than_that_needs() -> None:
    options = {"a": [Option("small", 10, 1.0), Option("best", 20, 0.1), Option("large and worse", 30, 0.2)]}
    choice = choose(options, 10**12)
    assert choice.options["a"].codec == "best"
    assert choice.gap == pytest.approx(0)


def test_what_no_choice_meets_is_refused_with_the_least_possible_bytes() -> None:
    options = {"a": [Option("small", 10, 1.0), Option("best", 20, 0.1)], "b": [Option("only", 7, 0.0)]}
    assert choose(options, 17).bytes == 17
    assert choose(options, 20, besides=3).bytes == 17
    with pytest.raises(DoesNotFitError, match=r"it takes 20 bytes .* budget is 19") as caught:
        choose(options, 19, besides=3)
    assert "\n" not in caught.value.message
    assert "1 bytes more" in str(caught.value.hint)


def test_what_lies_above_the_hull_fills_what_is_left() -> None:
    # Per byte the last option is the best step, but only the middle one fits.
    options = {"a": [Option("2", 2, 1.0), Option("3", 3, 0.9), Option("4", 4, 0.1)]}
    assert choose(options, 3).options["a"].codec == "3"


def test_the_same_options_give_the_same_choice_in_whatever_order_they_come() -> None:
    options = random_options(random.Random(7), 30)
    options["twins"] = [Option("b", 50, 0.5), Option("a", 50, 0.5)]
    limit = sum(min(o.bytes for o in choices) for choices in options.values()) * 2
    shuffled = {name: choices[::-1] for name, choices in options.items()}
    assert choose(options, limit) == choose(shuffled, limit)
