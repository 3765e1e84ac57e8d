"""No rounding: what a checkpoint already holds on a grid goes over to a codec that holds the same weights exactly."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from phi3edge.codecs import codec as codec_of
from phi3edge.errors import UnsupportedError
from phi3edge.prequantized import dequantize
from phi3edge.types import Quantized, Statistics

if TYPE_CHECKING:
    pass


def quantize(weight: Quantized, codec: ModuleType, statistics: Statistics | None = None) -> Quantized:
    """Hand over rows that are codes, scales and zero points; see phi3edge.checkpoint.Checkpoint.codes.

    A codec of the same grid takes them as they are, one with a fixed zero point takes code minus zero point; smaller
    blocks repeat the scale.

    Raises:
        UnsupportedError: a block that the codec cannot hold exactly.
    """
    import numpy as np

    assert weight.scales is not None
    assert weight.zero_points is not None
    grid = codec_of(weight.codec)
    repeats = grid.BLOCK_SIZE // codec.BLOCK_SIZE
    codes, scales = weight.codes, np.repeat(weight.scales, repeats, axis=1)
    zero_points = None
    if codec.FORMATS == grid.FORMATS:
        zero_points = None if codec.signed else weight.zero_points
    else:
        steps = codes.reshape(*weight.scales.shape, -1) - weight.zero_points[..., None]  # wraps, as int8 does
        codes = steps.view(np.int8).reshape(codes.shape)
    moved = Quantized(codec.NAME, codes, scales, zero_points=zero_points)
    wrong = codec.dequantize(codec.unpack(codec.pack(moved))) != dequantize(weight)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UnsupportedError(
            f"{codec.NAME} does not hold the checkpoint's weight in row {row} of {len(wrong)}, column {column} exactly"
        )
    return moved
