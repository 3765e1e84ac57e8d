"""AWQ: input channels that matter get finer steps, at the cost of those that do not.

A column of a weight times s, and its input over s, compute what they did; but the column's rounding error, about the
same as before, counts 1 / s as much in the output (Lin et al., arXiv 2306.00978, section 3.2). The scales are

    s = a^alpha / w^beta,   a = mean |x| of a channel (the paper's), w = root mean square of the columns that read it

with the exponents that lose least of the linear's output, tr((Q(W s) / s - W) H (Q(W s) / s - W)^T) with H = E x x^T,
where Q is the codec's own weighted rounding. What the paper searches besides, clipped ranges, is part of Q: every codec
searches its blocks' scales for the least weighted error, and narrower ranges than the block's are among those it tries.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from types import ModuleType

import numpy as np
import torch

from phi3edge.errors import UnsupportedError
from phi3edge.types import Quantized, Statistics

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
BETAS = (0.0, 0.5, 1.0)
SAMPLED_ROWS = 128
"""Rows of a weight, evenly spaced, that every pair of exponents is tried on."""

LEAST = 1e-4
"""Of a channel's mean absolute input, and of its columns' norm, over the largest: one that is silent has no say."""


@dataclass(frozen=True, slots=True)
class Scales:
    """What the search found.

    Attributes:
        values: float32, shape (channels,), geometric mean 1; all 1 where no scales lose less than none.
        error: of the sampled rows' outputs, over that without scales; 1 where there are none.
    """

    values: np.ndarray
    error: float


def quantize(
    weight: np.ndarray, codec: ModuleType, statistics: Statistics | None = None, device: str = "cpu"
) -> Quantized:
    """Round a weight whose columns are scaled already: to nearest, the columns weighted by their inputs' squares."""
    return codec.quantize(weight, None if statistics is None else statistics.squares)


def search(
    weight: np.ndarray, codec: ModuleType, statistics: Statistics, channel: np.ndarray, device: str = "cpu"
) -> Scales:
    """The channel scales that lose least of a linear's output.

    Args:
        weight: float32, shape (rows, columns).
        codec: a module of phi3edge.codecs.
        statistics: of the linear's input, with `absolute` and `moments`.
        channel: int64, shape (columns,): the channel that each column reads, one of 0 to channels - 1. Several columns
            read the same where query heads share a head of values.
        device: where the outputs' errors are computed.

    Raises:
        UnsupportedError: moments that are not finite.
    """
    assert statistics.absolute is not None
    assert statistics.moments is not None
    if not np.isfinite(statistics.moments).all():
        raise UnsupportedError("its inputs on the calibration text are not finite", "calibrate on other text")
    rows = np.ascontiguousarray(weight[:: -(-len(weight) // SAMPLED_ROWS)])
    moments = torch.from_numpy(statistics.moments).to(device)
    activation = _relative(_mean(statistics.absolute, channel))
    norm = _relative(np.sqrt(_mean(np.square(weight).mean(0), channel)))

    def error(values: np.ndarray) -> float:
        scale = values[channel]
        rounded = codec.dequantize(codec.quantize(rows * scale, statistics.squares / np.square(scale)))
        lost = torch.from_numpy(rounded / scale - rows).to(device)
        return float((lost @ moments * lost).sum())

    none = np.ones(len(activation), np.float32)
    unscaled = error(none)
    best, least = none, unscaled
    for alpha, beta in product(ALPHAS, BETAS):
        values = _normalized(activation**alpha / norm**beta)
        if (alpha or beta) and (found := error(values)) < least:
            best, least = values, found
    return Scales(best, least / unscaled if unscaled else 1.0)


def _mean(values: np.ndarray, channel: np.ndarray) -> np.ndarray:
    """Of the columns that read each channel."""
    return np.bincount(channel, values) / np.bincount(channel)


def _relative(values: np.ndarray) -> np.ndarray:
    """To the largest, and at least LEAST; 1 if all are 0."""
    return np.maximum(values / values.max(), LEAST) if values.any() else np.ones_like(values)


def _normalized(values: np.ndarray) -> np.ndarray:
    return (values / np.exp(np.log(values).mean())).astype(np.float32)
