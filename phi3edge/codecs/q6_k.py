"""Q6_K: 6-bit codes, 16 sub-blocks of 16 with an 8-bit scale each; 6.5625 bits per weight.

weight = super_scales * scales * codes; codes in [-32, 31], scales in [-128, 127].

The 210 bytes of a super-block hold u = code + 32: 128 bytes with the low four bits (byte l of the i-th 64 is of codes
128 i + l and 128 i + 64 + l), 64 bytes with the high two (bits 2 k of byte l of the i-th 32 are of code
128 i + 32 k + l), 16 bytes of scales, float16 super_scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np

NAME = "q6_k"
BLOCK_SIZE = 256
BLOCK_BYTES = 210
GGML_TYPE = 14
FORMATS = ("gguf",)
LEVELS = range(-32, 32)

# Codes that the weight of largest magnitude is mapped to: the first guesses for the scale of a sub-block.
_PEAKS = (-33.4, -32.8, -32.4, -32.0, -31.6, -31.0, -30.0, 29.0)


def quantize(weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """Rounds float32 (rows, columns) by a least-squares search.

    Args:
        weight: columns must be a multiple of 256.
        importance: float32 (columns,): weighs each column's squared error; None weighs all alike.

    Returns:
        codes int8 (rows, columns), scales int8 (rows, columns / 16), super_scales float32
        (rows, columns / 256).

    Raises:
        UnsupportedError: rows that are not whole super-blocks, or an importance that does not fit them.
    """
    from phi3edge.codecs import _kquant_sym as kquant

    return kquant.quantize(NAME, weight, importance, bits=6, scale_bits=8, peaks=_PEAKS)


def dequantize(q: Quantized) -> np.ndarray:
    """The weights, float32 (rows, columns)."""
    from phi3edge.codecs import _kquant_sym as kquant

    return kquant.dequantize(q)


def pack(q: Quantized) -> np.ndarray:
    """The file's bytes, uint8 (rows, columns / 256 * 210)."""
    import numpy as np

    from phi3edge.codecs import _kquant_bytes as fields

    assert q.scales is not None
    assert q.super_scales is not None
    rows, blocks = q.super_scales.shape
    out = np.empty((rows, blocks, BLOCK_BYTES), np.uint8)
    codes = (q.codes + np.int8(32)).view(np.uint8)
    low = (codes & 15).reshape(rows, blocks, 2, 2, 64)
    fields.pack_fields(low, 4, out[..., :128].reshape(rows, blocks, 2, 64))
    high = (codes >> 4).reshape(rows, blocks, 2, 4, 32)
    fields.pack_fields(high, 2, out[..., 128:192].reshape(rows, blocks, 2, 32))
    out[..., 192:208] = q.scales.view(np.uint8).reshape(rows, blocks, 16)
    out[..., 208:210] = fields.half_bytes(q.super_scales)
    return out.reshape(rows, -1)


def unpack(data: np.ndarray) -> Quantized:
    """The inverse of `pack`.

    Raises:
        UnsupportedError: data of another dtype, or not whole super-blocks.
    """
    import numpy as np

    from phi3edge.codecs import _kquant_bytes as fields
    from phi3edge.codecs._blocks import whole_bytes

    rows = data.shape[0]
    blocks = whole_bytes(NAME, data, BLOCK_BYTES).reshape(rows, -1, BLOCK_BYTES)
    low = fields.unpack_fields(blocks[..., :128].reshape(rows, -1, 2, 64), 4)
    high = fields.unpack_fields(blocks[..., 128:192].reshape(rows, -1, 2, 32), 2)
    codes = low.reshape(rows, -1) | high.reshape(rows, -1) << 4
    return Quantized(
        NAME,
        codes.view(np.int8) - np.int8(32),
        blocks[..., 192:208].reshape(rows, -1).view(np.int8),
        super_scales=fields.from_half_bytes(blocks[..., 208:210]),
    )
