"""Two models' results on the same documents: figures, their difference, and how sure both are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from phi3edge._toml import Strict

GROUPS = 200
"""Most groups of a jackknife."""

Aggregation = Callable[[Sequence[Any]], float]


class Figure(Strict):
    """A value with the standard error that the choice of documents gives it; None where there is no telling."""

    value: float
    standard_error: float | None


class Flips(Strict):
    """Questions whose answer changed.

    Attributes:
        questions: number of them that both models answered.
        to_wrong: right by the reference, wrong by the artifact.
        to_right: wrong by the reference, right by the artifact.
    """

    questions: int
    to_wrong: int
    to_right: int

    def __add__(self, other: Flips) -> Flips:
        """Of two sets of questions together."""
        return Flips(
            questions=self.questions + other.questions,
            to_wrong=self.to_wrong + other.to_wrong,
            to_right=self.to_right + other.to_right,
        )


def mean(values: Sequence[Any]) -> float:
    """The aggregation of accuracies and the like."""
    return float(np.mean(values))


def figure(values: Sequence[Any], aggregate: Aggregation) -> Figure:
    """A metric over documents: `aggregate` of their values, and its standard error."""
    if aggregate is mean:
        return Figure(value=mean(values), standard_error=_mean_error(np.asarray(values, float)))
    error = _jackknife(len(values), lambda kept: aggregate(_of(values, kept)))
    return Figure(value=float(aggregate(values)), standard_error=error)


def difference(artifact: Sequence[Any], reference: Sequence[Any], aggregate: Aggregation) -> Figure:
    """The artifact's metric less the reference's over the same documents.

    Both answer the same questions, so the error of the difference is far below that of either: documents are left out
    of both at once.
    """
    if aggregate is mean:
        return figure(np.subtract(np.asarray(artifact, float), np.asarray(reference, float)).tolist(), mean)
    error = _jackknife(len(artifact), lambda kept: aggregate(_of(artifact, kept)) - aggregate(_of(reference, kept)))
    return Figure(value=float(aggregate(artifact)) - float(aggregate(reference)), standard_error=error)


def flips(artifact: Sequence[Any], reference: Sequence[Any]) -> Flips | None:
    """How many answers changed; None unless each is right (1) or wrong (0)."""
    if not {*artifact, *reference} <= {0, 1}:
        return None
    ours, theirs = np.asarray(artifact, bool), np.asarray(reference, bool)
    return Flips(questions=len(ours), to_wrong=int((theirs & ~ours).sum()), to_right=int((~theirs & ours).sum()))


def weighted(figures: Sequence[Figure], weights: Sequence[float]) -> Figure:
    """The weighted mean of independent figures."""
    share = np.asarray(weights, float) / np.sum(weights)
    errors = [figure.standard_error for figure in figures]
    return Figure(
        value=float(share @ [figure.value for figure in figures]),
        standard_error=None if None in errors else float(np.sqrt(np.sum((share * np.array(errors, float)) ** 2))),
    )


def _of(values: Sequence[Any], kept: np.ndarray) -> list[Any]:
    return [values[i] for i in kept]


def _mean_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def _jackknife(count: int, statistic: Callable[[np.ndarray], float]) -> float | None:
    """Standard error of a statistic of documents, by leaving out one group of them at a time.

    It serves whatever is no plain mean: perplexity by words, F1. Shao and Tu, The Jackknife and Bootstrap (1995), 2.3.

    Args:
        count: number of documents.
        statistic: of the documents with given indices, int64 (kept,).

    Returns:
        None for fewer than two documents.
    """
    groups = min(count, GROUPS)
    if groups < 2:
        return None
    group = np.arange(count) % groups
    left = np.array([statistic(np.flatnonzero(group != g)) for g in range(groups)], float)
    return float(np.sqrt((groups - 1) / groups * np.sum((left - left.mean()) ** 2)))
