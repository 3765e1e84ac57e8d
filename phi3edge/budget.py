"""The best codec for every tensor under a byte budget: a multiple-choice knapsack.

Each tensor takes one of several options, of some bytes and some loss; the sum of the losses is to be least while the
bytes stay within a limit. First the convex hulls of the options are walked, from each tensor's smallest one, always by
the step that saves the most loss a byte (the Lagrangian solution; Shoham and Gersho, IEEE Trans. ASSP 36, 1988). Had
the last step been taken in part, this would be the optimum of the relaxed problem: no choice is better than that bound.
Dynamic programming then finds the best choice outright, if the bytes have a large enough common divisor; else it counts
bytes in steps of a 65536th of the room, rounded up, and the better one of both choices is taken, beside that bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from math import gcd

import numpy as np

from phi3edge.errors import DoesNotFitError
from phi3edge.types import Option
from phi3edge.units import size

STEPS = 2**16
"""Steps of bytes that dynamic programming tells apart, at most."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit: `bytes` for all files of an artifact, or `bits_per_weight` for its packed weights alone."""

    bytes: int | None = None
    bits_per_weight: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One option for each tensor.

    Attributes:
        options: the options taken, by tensor name.
        bytes: their sum.
        loss: the sum of their losses.
        bound: no choice within the limit has a lower loss.
    """

    options: dict[str, Option]
    bytes: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How much better another choice could be at most, as a share of the loss."""
        return max(0.0, self.loss - self.bound) / self.loss if self.loss > 0 else 0.0


def choose(options: Mapping[str, Sequence[Option]], limit: int, besides: int = 0) -> Choice:
    """Choose an option for every tensor such that the sum of the losses is least within a limit of bytes.

    Args:
        options: of each tensor, at least one.
        limit: what all of them may take, in bytes.
        besides: what of it is taken by other things.

    Raises:
        DoesNotFitError: the smallest options take more; the message says how much.
    """
    useful = [_useful(choices) for choices in options.values()]
    least = sum(choices[0].bytes for choices in useful) + besides
    if least > limit:
        raise DoesNotFitError(
            f"with the smallest codecs it takes {least} bytes ({size(least)}), the budget is {limit} ({size(limit)})",
            f"allow {least - limit} bytes more, or take a recipe with smaller codecs in its [budget]",
        )
    taken, bound = _walk_hulls(useful, limit - least)
    best, exact = _dynamic(useful, limit - least)
    taken = best if exact else min(taken, best, key=lambda t: _loss(useful, t))
    chosen = {name: choices[n] for name, choices, n in zip(options, useful, taken, strict=True)}
    loss = _loss(useful, taken)
    return Choice(chosen, sum(o.bytes for o in chosen.values()), loss, loss if exact else bound)


def _useful(choices: Sequence[Option]) -> list[Option]:
    """By bytes, without those that another one beats in bytes and loss."""
    kept: list[Option] = []
    for option in sorted(choices, key=lambda o: (o.bytes, o.loss, o.codec)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _loss(useful: list[list[Option]], taken: list[int]) -> float:
    return sum(choices[n].loss for choices, n in zip(useful, taken, strict=True))


def _walk_hulls(useful: list[list[Option]], room: int) -> tuple[list[int], float]:
    """The steps of all hulls by loss saved a byte, as far as they fit, and the lower bound on any choice's loss."""
    steps = []
    for tensor, choices in enumerate(useful):
        corners = _hull(choices)
        for before, after in pairwise(corners):
            grown, saved = choices[after].bytes - choices[before].bytes, choices[before].loss - choices[after].loss
            steps.append((-saved / grown, tensor, after, grown, saved))
    taken, stuck = [0] * len(useful), set[int]()
    bound = _loss(useful, taken)
    relaxed = room
    for _, tensor, corner, grown, saved in sorted(steps):  # a hull's own steps come in their order: it is convex
        bound -= saved * min(1.0, relaxed / grown)
        relaxed = max(0, relaxed - grown)
        if tensor not in stuck and grown <= room:
            taken[tensor], room = corner, room - grown
        else:
            stuck.add(tensor)
    return taken, bound


def _hull(choices: list[Option]) -> list[int]:
    """Indices of the lower convex hull of loss over bytes."""
    corners: list[int] = []
    for n, option in enumerate(choices):
        while len(corners) > 1:
            first, middle = choices[corners[-2]], choices[corners[-1]]
            straight = (option.loss - first.loss) * (middle.bytes - first.bytes)
            if (middle.loss - first.loss) * (option.bytes - first.bytes) < straight:
                break
            corners.pop()
        corners.append(n)
    return corners


def _dynamic(useful: list[list[Option]], room: int) -> tuple[list[int], bool]:
    """The best choice with bytes counted in steps, over those of the smallest options, and whether steps are exact."""
    grown = [[o.bytes - choices[0].bytes for o in choices] for choices in useful]
    room = min(room, sum(row[-1] for row in grown))
    divisor = max(1, reduce(gcd, (n for row in grown for n in row), 0))
    step = max(divisor, -(-room // STEPS))
    width = room // step + 1
    best, decided = np.zeros(width), []
    for choices, row in zip(useful, grown, strict=True):
        tried = np.full((len(choices), width), np.inf)
        for n, (option, more) in enumerate(zip(choices, row, strict=True)):
            steps = -(-more // step)
            if steps < width:
                tried[n, steps:] = best[: width - steps] + option.loss
        decided.append(tried.argmin(0).astype(np.uint8))
        best = tried.min(0)
    taken, at = [0] * len(useful), width - 1
    for tensor in reversed(range(len(useful))):
        taken[tensor] = int(decided[tensor][at])
        at -= -(-grown[tensor][taken[tensor]] // step)
    return taken, step == divisor
