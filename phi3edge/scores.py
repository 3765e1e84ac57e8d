"""Figures of an artifact's distributions against the reference's, token by token, and what they come to.

Per scored token a few numbers are kept, whatever the vocabulary, so memory hardly grows with the text. Standard errors
take the tokens as independent. A flip is a token that only one of the two, reference or artifact, holds most likely of
all ("Accuracy is not all you need", arXiv 2407.09141).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from phi3edge.distributions import Distributions
from phi3edge.metrics import Metric
from phi3edge.report import Band, Choice, Context, Histogram

WORST = 12
"""Contexts kept of those where the artifact differs most."""

CHOICES = 5
"""Likeliest tokens shown of each."""

_BEFORE = 48  # tokens of context shown
_EDGES = np.logspace(-8, 2, 41)  # four bins to a power of ten


@dataclass(order=True, slots=True)
class _Worst:
    kl: float
    order: int  # no two are alike, so that nothing else is compared
    at: tuple[int, int] = field(compare=False)  # chunk, position of the token before
    tokens: np.ndarray = field(compare=False)
    log_probs: np.ndarray = field(compare=False)
    reference: Distributions = field(compare=False)


@dataclass(slots=True)
class Scores:
    """Figures per scored token, in order; blocks of float32, shape (rows,)."""

    nll: list[np.ndarray] = field(default_factory=list)
    reference_nll: list[np.ndarray] = field(default_factory=list)
    kl: list[np.ndarray] = field(default_factory=list)
    drawing: list[np.ndarray] = field(default_factory=list)
    agree: list[np.ndarray] = field(default_factory=list)
    among: list[np.ndarray] = field(default_factory=list)
    flips: list[np.ndarray] = field(default_factory=list)
    _worst: list[_Worst] = field(default_factory=list)
    _count: int = 0

    def add(
        self,
        chunk: int,
        position: int,
        following: np.ndarray,
        reference: Distributions,
        reference_log_probs: np.ndarray,
        log_probs: np.ndarray,
    ) -> None:
        """Score the next rows.

        Args:
            chunk: which one they are of.
            position: of the first row in it.
            following: the text's next token of each row, int64, shape (rows,).
            reference: the reference's distributions.
            reference_log_probs: the reference's log-probabilities of the text's next tokens, float32, shape (rows,).
            log_probs: the artifact's log-probabilities, float32, shape (rows, vocabulary).
        """
        rows = np.arange(len(following))
        kl, drawing = reference.kl(log_probs)
        top1, best = reference.top1, log_probs.argmax(-1)
        self.nll.append(-log_probs[rows, following])
        self.reference_nll.append(-reference_log_probs)
        self.kl.append(kl.astype(np.float32))
        self.drawing.append(drawing.astype(np.float32))
        self.agree.append(best == top1)
        likelier = (log_probs > log_probs[rows, top1][:, None]).sum(-1)
        self.among.append((likelier < CHOICES) & ~np.isnan(log_probs[rows, top1]))
        self.flips.append((best == following) != (top1 == following))
        self._remember(chunk, position, kl, reference, log_probs)

    def _remember(
        self, chunk: int, position: int, kl: np.ndarray, reference: Distributions, log_probs: np.ndarray
    ) -> None:
        ranked = np.nan_to_num(kl, nan=np.inf)
        for row in np.argsort(-ranked)[:WORST]:
            if len(self._worst) == WORST and ranked[row] <= self._worst[0].kl:
                break
            best = np.argsort(-log_probs[row])[:CHOICES]
            self._count += 1
            place = (chunk, position + int(row))
            entry = _Worst(
                float(ranked[row]), -self._count, place, best, log_probs[row, best], reference[int(row)].copy()
            )
            (heapq.heappush if len(self._worst) < WORST else heapq.heappushpop)(self._worst, entry)

    def metrics(self) -> dict[str, Metric]:
        """The figures of a report, by their names in METRICS."""
        nll, reference_nll, kl = _join(self.nll), _join(self.reference_nll), _join(self.kl)
        ppl, reference_ppl = np.exp(nll.mean()), np.exp(reference_nll.mean())
        ratio = np.exp((nll - reference_nll).mean())
        return {
            # the error of exp(x) is exp(x) times x's; a ratio's is far smaller than its parts', which move together
            "ppl": _metric(ppl, ppl * _error(nll)),
            "reference_ppl": _metric(reference_ppl, reference_ppl * _error(reference_nll)),
            "ppl_ratio": _metric(ratio, ratio * _error(nll - reference_nll)),
            "kl_mean": mean_of(self.kl),
            "kl_median": _metric(np.median(kl)),
            "kl_p90": _metric(np.quantile(kl, 0.9)),
            "kl_p99": _metric(np.quantile(kl, 0.99)),
            "kl_max": _metric(kl.max()),
            "top1": mean_of(self.agree),
            "top5": mean_of(self.among),
            "flips": mean_of(self.flips),
        }

    def apart(self, shared: np.ndarray) -> dict[str, Metric]:
        """Figures of a mixture of experts: see phi3edge.reference.Reference.shared, of all scored tokens in order."""
        kl, rest = _join(self.kl), ~shared.reshape(-1)
        found = {"experts_shared": mean_of([shared.reshape(-1)])}
        return found | ({"kl_unshared": mean_of([kl[rest]])} if rest.any() else {})

    def drawing_error(self) -> float:
        """Standard error of the mean KL that comes of keeping the reference's distributions light, in nats."""
        variances = _join(self.drawing)
        return float(np.sqrt(variances.sum()) / len(variances))

    def histogram(self) -> Histogram:
        """How the KL of the tokens is spread."""
        kl = np.nan_to_num(_join(self.kl), nan=np.inf).clip(_EDGES[0], _EDGES[-1])
        counts, _ = np.histogram(kl, _EDGES)
        return Histogram(edges=[float(f"{e:.4g}") for e in _EDGES], counts=[int(n) for n in counts])

    def worst(self, chunks: np.ndarray, decode: Callable[[Sequence[int]], str]) -> list[Context]:
        """Where the KL was largest, the largest first.

        Args:
            chunks: the token ids scored, int64, shape (chunks, tokens).
            decode: makes text of token ids.
        """
        return [
            Context(
                kl=entry.kl,
                before=decode(chunks[chunk, max(0, position + 1 - _BEFORE) : position + 1].tolist()),
                token=decode([int(chunks[chunk, position + 1])]),
                reference=[
                    Choice(token=decode([int(t)]), probability=float(p))
                    for t, p in zip(*entry.reference.likeliest(CHOICES), strict=True)
                ],
                artifact=[
                    Choice(token=decode([int(t)]), probability=float(np.exp(p)))
                    for t, p in zip(entry.tokens, entry.log_probs, strict=True)
                ],
            )
            for entry in sorted(self._worst, reverse=True)
            for chunk, position in [entry.at]
        ]


def band(positions: range, tokens: int, allocated: int, reference: Distributions, log_probs: np.ndarray) -> Band:
    """Figures of neighbouring positions.

    Args:
        positions: them.
        tokens: of the sequence.
        allocated: tokens of KV cache the runtime was opened with.
        reference: the reference's distributions there, rows as many.
        log_probs: the artifact's log-probabilities there, float32, shape (rows, vocabulary).
    """
    kl, _ = reference.kl(log_probs)
    top1 = float((log_probs.argmax(-1) == reference.top1).mean())
    return Band(first=positions[0], last=positions[-1], tokens=tokens, allocated=allocated, kl=mean_of([kl]), top1=top1)


def mean_of(values: Sequence[np.ndarray]) -> Metric:
    """The mean of figures per token, with its standard error."""
    joined = _join(values)
    return _metric(joined.mean(), _error(joined))


def _join(values: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(values).astype(np.float64)


def _metric(value: float, error: float | None = None) -> Metric:
    return Metric(value=float(value), standard_error=None if error is None else float(error))


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
