"""The numbers that a block of a codec can hold, seen alike for all codecs: for methods that choose codes themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from phi3edge.codecs import codec
from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Grid:
    """weight = step * level + offset, with a step and an offset for each block of `columns / blocks` weights.

    Attributes:
        step: float32, shape (rows, blocks); 0 or negative in some blocks.
        offset: float32, shape (rows, blocks).
        levels: float32, ascending; the code of levels[i] is `first + i`.
        first: the lowest code.
    """

    step: np.ndarray
    offset: np.ndarray
    levels: np.ndarray
    first: int


def grid(q: Quantized) -> Grid:
    """The grid of a quantized weight: what its codes choose from."""
    import numpy as np

    assert q.scales is not None
    step = q.scales.astype(np.float32)
    offset = np.zeros_like(step)
    if q.super_scales is not None:
        step *= _spread(q.super_scales, step)
    if q.mins is not None:
        offset = q.mins.astype(np.float32)
        if q.super_mins is not None:
            offset *= -_spread(q.super_mins, step)
    if q.zero_points is not None:
        offset = -step * q.zero_points
    levels = np.array(codec(q.codec).LEVELS, np.float32)
    first = int(levels[0]) if q.codes.dtype == np.int8 else 0  # unsigned codes are counted from the lowest level
    return Grid(step, offset, levels, first)


def _spread(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Per super-block values, one for each of its blocks."""
    import numpy as np

    return np.repeat(values, like.shape[1] // values.shape[1], axis=1)


def with_levels(q: Quantized, chosen: np.ndarray) -> Quantized:
    """The same blocks with other codes: `chosen` are indices into the grid's levels, shape (rows, columns)."""
    return replace(q, codes=(chosen + grid(q).first).astype(q.codes.dtype))
