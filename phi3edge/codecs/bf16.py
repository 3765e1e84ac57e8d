"""BF16: the upper 16 bits of a float32, rounded to nearest, ties to even; codes are those bits, uint16.

Weights that come from a bfloat16 checkpoint are copied exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np

NAME = "bf16"
BLOCK_SIZE = 1
BLOCK_BYTES = 2
GGML_TYPE = 30
FORMATS = ("gguf",)


def quantize(weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """Rounds to bfloat16; NaN stays NaN.

    Args:
        weight: float32 (rows, columns).
        importance: not used; every weight is rounded by itself.

    Raises:
        UnsupportedError: not two-dimensional.
    """
    import numpy as np

    from phi3edge.codecs import _bfloat
    from phi3edge.codecs._blocks import whole_blocks

    weight = whole_blocks(NAME, weight, BLOCK_SIZE)
    codes = np.empty(weight.shape, np.uint16)
    _bfloat.round_bits(weight.view(np.uint32).reshape(-1), codes.reshape(-1))
    return Quantized(NAME, codes)


def dequantize(q: Quantized) -> np.ndarray:
    """The weights, float32 (rows, columns)."""
    import numpy as np

    from phi3edge.codecs import _bfloat

    weight = np.empty(q.codes.shape, np.float32)
    _bfloat.extend_bits(np.ascontiguousarray(q.codes).reshape(-1), weight.view(np.uint32).reshape(-1))
    return weight


def pack(q: Quantized) -> np.ndarray:
    """The file's bytes, uint8 (rows, 2 * columns)."""
    import numpy as np

    return np.ascontiguousarray(q.codes).view(np.uint8)


def unpack(data: np.ndarray) -> Quantized:
    """The inverse of `pack`.

    Raises:
        UnsupportedError: data of another dtype, or not whole weights.
    """
    import numpy as np

    from phi3edge.codecs._blocks import whole_bytes

    return Quantized(NAME, whole_bytes(NAME, data, BLOCK_BYTES).view(np.uint16))
