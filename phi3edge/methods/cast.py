"""No rounding but that of the number format: for float codecs, which hold the weights themselves."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from phi3edge.types import Quantized, Statistics

if TYPE_CHECKING:
    import numpy as np


def quantize(weight: np.ndarray, codec: ModuleType, statistics: Statistics | None = None) -> Quantized:
    """Cast rows of a weight, float32 of shape (rows, columns); every weight by itself, so statistics have no part."""
    return codec.quantize(weight)
