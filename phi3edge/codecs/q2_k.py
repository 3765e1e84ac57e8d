"""Q2_K: 2-bit codes, 16 sub-blocks of 16 with a 4-bit scale and min each; 2.625 bits per weight.

weight = super_scales * scales * codes - super_mins * mins; codes in [0, 3], scales and mins in [0, 15].

The 84 bytes of a super-block: 16 bytes with a scale in the low and a min in the high half, 64 bytes of codes (bits 2 k
of byte l of the i-th 32 are of code 128 i + 32 k + l), float16 super_scale, float16 super_min.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np

NAME = "q2_k"
BLOCK_SIZE = 256
BLOCK_BYTES = 84
GGML_TYPE = 10
FORMATS = ("gguf",)
LEVELS = range(4)

# Steps cut off at the top and at the bottom of a sub-block's range (negative: added): the first guesses for its scale.
_CLIPS = (
    (0.0, 0.25),
    (0.0, 0.5),
    (0.0, 2.0),
    (0.25, -0.75),
    (0.25, 0.0),
    (0.25, 1.5),
    (0.5, 0.5),
    (0.5, 1.0),
    (0.75, 0.0),
    (1.0, 0.5),
    (1.5, 0.0),
    (1.5, 0.5),
)


def quantize(weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """Rounds float32 (rows, columns) by a least-squares search.

    Args:
        weight: columns must be a multiple of 256.
        importance: float32 (columns,): weighs each column's squared error; None weighs all alike.

    Returns:
        codes uint8 (rows, columns), scales and mins uint8 (rows, columns / 16), super_scales and super_mins float32
        (rows, columns / 256).

    Raises:
        UnsupportedError: rows that are not whole super-blocks, or an importance that does not fit them.
    """
    from phi3edge.codecs import _kquant_min as kquant

    return kquant.quantize(NAME, weight, importance, n=16, bits=2, scale_bits=4, clips=_CLIPS)


def dequantize(q: Quantized) -> np.ndarray:
    """The weights, float32 (rows, columns)."""
    from phi3edge.codecs import _kquant_min as kquant

    return kquant.dequantize(q, n=16)


def pack(q: Quantized) -> np.ndarray:
    """The file's bytes, uint8 (rows, columns / 256 * 84)."""
    import numpy as np

    from phi3edge.codecs import _kquant_bytes as fields

    assert q.scales is not None
    assert q.mins is not None
    assert q.super_scales is not None
    assert q.super_mins is not None
    rows, blocks = q.super_scales.shape
    out = np.empty((rows, blocks, BLOCK_BYTES), np.uint8)
    out[..., :16] = (q.scales | q.mins << 4).reshape(rows, blocks, 16)
    codes = q.codes.reshape(rows, blocks, 2, 4, 32)
    fields.pack_fields(codes, 2, out[..., 16:80].reshape(rows, blocks, 2, 32))
    out[..., 80:82] = fields.half_bytes(q.super_scales)
    out[..., 82:84] = fields.half_bytes(q.super_mins)
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
    scales = blocks[..., :16].reshape(rows, -1)
    codes = fields.unpack_fields(blocks[..., 16:80].reshape(rows, -1, 2, 32), 2)
    return Quantized(
        NAME,
        codes.reshape(rows, -1),
        scales & 15,
        scales >> 4,
        fields.from_half_bytes(blocks[..., 80:82]),
        fields.from_half_bytes(blocks[..., 82:84]),
    )
