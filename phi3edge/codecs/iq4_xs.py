"""IQ4_XS: super-blocks of 8 blocks of 32 weights, 4-bit codes into 16 uneven values, 6-bit scales.

Super-block, 136 bytes: float16 super-scale; 16 bits, bits 2b and 2b + 1 = the upper 2 bits of block b's scale;
4 bytes, byte i = the lower 4 bits of the scales of blocks 2i and, << 4, 2i + 1; then 16 bytes for each block, byte j =
code j | code j + 16 << 4. Scales are stored plus 32.
Weight: super_scale * scale * LEVELS[code], scale in [-32, 31]; the levels are those of iq4_nl.py. ggml's block_iq4_xs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3edge.codecs.iq4_nl import LEVELS as LEVELS
from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np

NAME = "iq4_xs"
BLOCK_SIZE = 256
BLOCK_BYTES = 136
GGML_TYPE = 23
FORMATS = ("gguf",)


def quantize(weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """Rounds float32 (rows, columns) by a least-squares search.

    Args:
        weight: columns must be a multiple of 256.
        importance: float32 (columns,): weighs each column's squared error; None weighs all alike.

    Returns:
        codes uint8 (rows, columns), scales int8 (rows, columns / 32), super_scales float32 (rows, columns / 256).

    Raises:
        UnsupportedError: rows that are not whole blocks, or an importance that does not fit them.
    """
    from phi3edge.codecs import _iq4

    return _iq4.quantize_xs(NAME, weight, importance)


def dequantize(q: Quantized) -> np.ndarray:
    """The weights, float32 (rows, columns)."""
    import numpy as np

    from phi3edge.codecs import _iq4

    assert q.scales is not None
    assert q.super_scales is not None
    scales = np.repeat(q.super_scales, _iq4.SUPER, axis=1) * q.scales.astype(np.float32)
    return _iq4.dequantize(q.codes, scales)


def pack(q: Quantized) -> np.ndarray:
    """The file's bytes, uint8 (rows, columns / 256 * 136)."""
    from phi3edge.codecs import _iq4

    return _iq4.pack_xs(q)


def unpack(data: np.ndarray) -> Quantized:
    """The inverse of `pack`.

    Raises:
        UnsupportedError: data of another dtype, or not whole super-blocks.
    """
    from phi3edge.codecs import _blocks, _iq4

    return _iq4.unpack_xs(NAME, _blocks.whole_bytes(NAME, data, BLOCK_BYTES))
