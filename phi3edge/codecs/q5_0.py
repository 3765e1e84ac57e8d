"""Q5_0: blocks of 32 weights, signed 5-bit codes, one scale.

Block, 22 bytes: float16 scale; 32 bits, bit j = bit 4 of code j;
16 bytes, byte j = low nibbles of code j and, << 4, of code j + 16.
Weight: scale * code, codes in [-16, 15], stored plus 16. ggml's block_q5_0.
Without importance the rounding is ggml's reference, bit for bit; with it, a weighted least-squares search.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np

NAME = "q5_0"
BLOCK_SIZE = 32
BLOCK_BYTES = 22
GGML_TYPE = 6
FORMATS = ("gguf",)
LEVELS = range(-16, 16)


def quantize(weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """Rounds float32 (rows, columns) to codes int8 and scales float32 (rows, blocks).

    Args:
        weight: columns must be a multiple of 32.
        importance: float32 (columns,): weighs each column's squared error.

    Raises:
        UnsupportedError: rows that are not whole blocks, or an importance that does not fit them.
    """
    from phi3edge.codecs import _linear

    return _linear.quantize_signed(NAME, weight, importance, low=LEVELS[0], high=LEVELS[-1])


def dequantize(q: Quantized) -> np.ndarray:
    """The weights, float32 (rows, columns)."""
    from phi3edge.codecs import _linear

    return _linear.dequantize(q)


def pack(q: Quantized) -> np.ndarray:
    """The file's bytes, uint8 (rows, columns / 32 * 22)."""
    from phi3edge.codecs import _bytes

    assert q.scales is not None
    return _bytes.pack_blocks(q.codes, (q.scales,), bits=5, zero=16)


def unpack(data: np.ndarray) -> Quantized:
    """The inverse of `pack`.

    Raises:
        UnsupportedError: data of another dtype, or not whole blocks.
    """
    from phi3edge.codecs import _blocks, _bytes

    data = _blocks.whole_bytes(NAME, data, BLOCK_BYTES)
    codes, (scales,) = _bytes.unpack_blocks(data, floats=1, bits=5, zero=16)
    return Quantized(NAME, codes, scales)
