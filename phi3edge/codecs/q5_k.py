"""Q5_K: 5-bit codes, 8 sub-blocks of 32 with a 6-bit scale and min each; 5.5 bits per weight.

weight = super_scales * scales * codes - super_mins * mins; codes in [0, 31], scales and mins in [0, 63].

The 176 bytes of a super-block: float16 super_scale, float16 super_min, 12 bytes of scales and mins, 32 bytes with
the top bit of each code (bit k of byte l is of code 32 k + l), then 128 bytes with the low four: byte l of the k-th 32
holds code 64 k + l in its low half and code 64 k + 32 + l in its high half.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np

NAME = "q5_k"
BLOCK_SIZE = 256
BLOCK_BYTES = 176
GGML_TYPE = 13
FORMATS = ("gguf",)
LEVELS = range(32)

# Steps cut off at the top and at the bottom of a sub-block's range (negative: added): the first guesses for its scale.
_CLIPS = (
    (-2.0, -1.0),
    (-1.25, 0.0),
    (-1.0, -1.0),
    (-1.0, -0.25),
    (-0.25, 0.25),
    (0.0, 0.0),
    (0.0, 1.25),
    (0.25, -0.75),
    (0.25, 0.0),
    (0.25, 0.75),
    (0.5, -0.25),
    (0.5, 0.5),
)


def quantize(weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """Rounds float32 (rows, columns) by a least-squares search.

    Args:
        weight: columns must be a multiple of 256.
        importance: float32 (columns,): weighs each column's squared error; None weighs all alike.

    Returns:
        codes uint8 (rows, columns), scales and mins uint8 (rows, columns / 32), super_scales and super_mins float32
        (rows, columns / 256).

    Raises:
        UnsupportedError: rows that are not whole super-blocks, or an importance that does not fit them.
    """
    from phi3edge.codecs import _kquant_min as kquant

    return kquant.quantize(NAME, weight, importance, n=32, bits=5, scale_bits=6, clips=_CLIPS)


def dequantize(q: Quantized) -> np.ndarray:
    """The weights, float32 (rows, columns)."""
    from phi3edge.codecs import _kquant_min as kquant

    return kquant.dequantize(q, n=32)


def pack(q: Quantized) -> np.ndarray:
    """The file's bytes, uint8 (rows, columns / 256 * 176)."""
    import numpy as np

    from phi3edge.codecs import _kquant_bytes as fields

    assert q.scales is not None
    assert q.mins is not None
    assert q.super_scales is not None
    assert q.super_mins is not None
    rows, blocks = q.super_scales.shape
    out = np.empty((rows, blocks, BLOCK_BYTES), np.uint8)
    out[..., 0:2] = fields.half_bytes(q.super_scales)
    out[..., 2:4] = fields.half_bytes(q.super_mins)
    fields.pack_scales_mins(q.scales.reshape(rows, blocks, 8), q.mins.reshape(rows, blocks, 8), out[..., 4:16])
    high = (q.codes >> 4).reshape(rows, blocks, 8, 32)
    fields.pack_fields(high, 1, out[..., 16:48])
    low = (q.codes & 15).reshape(rows, blocks, 4, 2, 32)
    fields.pack_fields(low, 4, out[..., 48:].reshape(rows, blocks, 4, 32))
    return out.reshape(rows, -1)


def unpack(data: np.ndarray) -> Quantized:
    """The inverse of `pack`.

    Raises:
        UnsupportedError: data of another dtype, or not whole super-blocks.
    """
    from phi3edge.codecs import _kquant_bytes as fields
    from phi3edge.codecs._blocks import whole_bytes

    rows = data.shape[0]
    blocks = whole_bytes(NAME, data, BLOCK_BYTES).reshape(rows, -1, BLOCK_BYTES)
    scales, mins = fields.unpack_scales_mins(blocks[..., 4:16])
    high = fields.unpack_fields(blocks[..., 16:48], 1)
    low = fields.unpack_fields(blocks[..., 48:].reshape(rows, -1, 4, 32), 4)
    codes = low.reshape(rows, -1) | high.reshape(rows, -1) << 4
    return Quantized(
        NAME,
        codes,
        scales.reshape(rows, -1),
        mins.reshape(rows, -1),
        fields.from_half_bytes(blocks[..., 0:2]),
        fields.from_half_bytes(blocks[..., 2:4]),
    )
