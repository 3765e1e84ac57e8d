"""Round to nearest: every block on its own, with the codec's own search for the best scales. Needs no data."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np


def quantize(weight: np.ndarray, codec: ModuleType, importance: np.ndarray | None = None) -> Quantized:
    """Round rows of a weight.

    Args:
        weight: float32, shape (rows, columns).
        codec: a module of phi3edge.codecs.
        importance: float32, shape (columns,): the weight of each column's squared error; None: the codec's default.
    """
    return codec.quantize(weight, importance)
