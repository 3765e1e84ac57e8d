"""Round to nearest: every block on its own, with the codec's own search for the best scales. Needs no data."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from phi3edge.types import Quantized, Statistics

if TYPE_CHECKING:
    import numpy as np


def quantize(weight: np.ndarray, codec: ModuleType, statistics: Statistics | None = None) -> Quantized:
    """Round rows of a weight.

    Args:
        weight: float32, shape (rows, columns).
        codec: a module of phi3edge.codecs.
        statistics: of the linear's inputs: their mean squares weigh each column's squared error, which makes that the
            error of the linear's output if its inputs are uncorrelated; None: the codec's default weights.
    """
    return codec.quantize(weight, None if statistics is None else statistics.squares)
