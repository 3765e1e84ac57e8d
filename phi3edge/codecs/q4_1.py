"""Q4_1: blocks of 32 weights, 4-bit codes, one scale and one minimum.

Block, 20 bytes: float16 scale; float16 minimum; 16 bytes, byte j = code j | code j + 16 << 4.
Weight: scale * code + minimum, codes in [0, 15]. ggml's block_q4_1.
Without importance the rounding is ggml's reference, bit for bit; with it, a weighted least-squares search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np

NAME = "q4_1"
BLOCK_SIZE = 32
BLOCK_BYTES = 20
GGML_TYPE = 3
FORMATS = ("gguf",)
LEVELS = range(16)


def quantize(weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """Rounds float32 (rows, columns) to codes uint8, scales and mins float32 (rows, blocks).

    Args:
        weight: columns must be a multiple of 32.
        importance: float32 (columns,): weighs each column's squared error.

    Raises:
        UnsupportedError: rows that are not whole blocks, or an importance that does not fit them.
    """
    from phi3edge.codecs import _linear

    return _linear.quantize_ranged(NAME, weight, importance, high=LEVELS[-1])


def dequantize(q: Quantized) -> np.ndarray:
    """The weights, float32 (rows, columns)."""
    from phi3edge.codecs import _linear

    return _linear.dequantize(q)


def pack(q: Quantized) -> np.ndarray:
    """The file's bytes, uint8 (rows, columns / 32 * 20)."""
    from phi3edge.codecs import _bytes

    assert q.scales is not None
    assert q.mins is not None
    return _bytes.pack_blocks(q.codes, (q.scales, q.mins), bits=4, zero=0)


def unpack(data: np.ndarray) -> Quantized:
    """The inverse of `pack`.

    Raises:
        UnsupportedError: data of another dtype, or not whole blocks.
    """
    from phi3edge.codecs import _blocks, _bytes

    data = _blocks.whole_bytes(NAME, data, BLOCK_BYTES)
    codes, (scales, mins) = _bytes.unpack_blocks(data, floats=2, bits=4, zero=0)
    return Quantized(NAME, codes, scales, mins)
