"""Q3_K: 3-bit codes, 16 sub-blocks of 16 with a 6-bit scale each; 3.4375 bits per weight.

weight = super_scales * scales * codes; codes in [-4, 3], scales in [-32, 31].

The 110 bytes of a super-block hold u = code + 4 and v = scale + 32: 32 bytes with the top bit of u (bit k of byte l is
of code 32 k + l), 64 bytes with its low two (bits 2 k of byte l of the i-th 32 are of code 128 i + 32 k + l), 8 bytes
with the low four bits of v (byte l is of scales l and l + 8), 4 bytes with its high two (bits 2 k of byte l are of
scale 4 k + l), float16 super_scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np

NAME = "q3_k"
BLOCK_SIZE = 256
BLOCK_BYTES = 110
GGML_TYPE = 11
FORMATS = ("gguf",)
LEVELS = range(-4, 4)

# Codes that the weight of largest magnitude is mapped to: the first guesses for the scale of a sub-block.
_PEAKS = (-5.5, -4.7, -4.3, -3.9, -3.2, -2.9, 4.1, 4.7)


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

    return kquant.quantize(NAME, weight, importance, bits=3, scale_bits=6, peaks=_PEAKS)


def dequantize(q: Quantized) -> np.ndarray:
    """The weights, float32 (rows, columns)."""
    from phi3edge.codecs import _kquant_sym as kquant

    return kquant.dequantize(q)


def pack(q: Quantized) -> np.ndarray:
    """The file's bytes, uint8 (rows, columns / 256 * 110)."""
    import numpy as np

    from phi3edge.codecs import _kquant_bytes as fields

    assert q.scales is not None
    assert q.super_scales is not None
    rows, blocks = q.super_scales.shape
    out = np.empty((rows, blocks, BLOCK_BYTES), np.uint8)
    codes = (q.codes + np.int8(4)).view(np.uint8)
    fields.pack_fields((codes >> 2).reshape(rows, blocks, 8, 32), 1, out[..., :32])
    low = (codes & 3).reshape(rows, blocks, 2, 4, 32)
    fields.pack_fields(low, 2, out[..., 32:96].reshape(rows, blocks, 2, 32))
    scales = (q.scales + np.int8(32)).view(np.uint8)
    fields.pack_fields((scales & 15).reshape(rows, blocks, 2, 8), 4, out[..., 96:104])
    fields.pack_fields((scales >> 4).reshape(rows, blocks, 4, 4), 2, out[..., 104:108])
    out[..., 108:110] = fields.half_bytes(q.super_scales)
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
    high = fields.unpack_fields(blocks[..., :32], 1).reshape(rows, -1)
    low = fields.unpack_fields(blocks[..., 32:96].reshape(rows, -1, 2, 32), 2).reshape(rows, -1)
    scales_low = fields.unpack_fields(blocks[..., 96:104], 4).reshape(rows, -1)
    scales_high = fields.unpack_fields(blocks[..., 104:108], 2).reshape(rows, -1)
    return Quantized(
        NAME,
        (low | high << 2).view(np.int8) - np.int8(4),
        (scales_low | scales_high << 4).view(np.int8) - np.int8(32),
        super_scales=fields.from_half_bytes(blocks[..., 108:110]),
    )
