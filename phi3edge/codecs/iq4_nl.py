"""IQ4_NL: blocks of 32 weights, 4-bit codes into 16 uneven values, one scale.

Block, 18 bytes: float16 scale; 16 bytes, byte j = code j | code j + 16 << 4.
Weight: scale * LEVELS[code]. ggml's block_iq4_nl.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np

NAME = "iq4_nl"
BLOCK_SIZE = 32
BLOCK_BYTES = 18
GGML_TYPE = 20
FORMATS = ("gguf",)
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def quantize(weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """Rounds float32 (rows, columns) to codes uint8 and scales float32 (rows, blocks), by a least-squares search.

    Args:
        weight: columns must be a multiple of 32.
        importance: float32 (columns,): weighs each column's squared error; None weighs all alike.

    Raises:
        UnsupportedError: rows that are not whole blocks, or an importance that does not fit them.
    """
    from phi3edge.codecs import _iq4

    return _iq4.quantize_nl(NAME, weight, importance)


def dequantize(q: Quantized) -> np.ndarray:
    """The weights, float32 (rows, columns)."""
    from phi3edge.codecs import _iq4

    assert q.scales is not None
    return _iq4.dequantize(q.codes, q.scales)


def pack(q: Quantized) -> np.ndarray:
    """The file's bytes, uint8 (rows, columns / 32 * 18)."""
    from phi3edge.codecs import _bytes

    assert q.scales is not None
    return _bytes.pack_blocks(q.codes, (q.scales,), bits=4, zero=0)


def unpack(data: np.ndarray) -> Quantized:
    """The inverse of `pack`.

    Raises:
        UnsupportedError: data of another dtype, or not whole blocks.
    """
    from phi3edge.codecs import _blocks, _bytes

    data = _blocks.whole_bytes(NAME, data, BLOCK_BYTES)
    codes, (scales,) = _bytes.unpack_blocks(data, floats=1, bits=4, zero=0)
    return Quantized(NAME, codes, scales)
