"""F16: the weights as little-endian IEEE float16, rounded to nearest, ties to even."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np

NAME = "f16"
BLOCK_SIZE = 1
BLOCK_BYTES = 2
GGML_TYPE = 1
FORMATS = ("gguf", "onnx")


def quantize(weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """Rounds to float16.

    Args:
        weight: float32 (rows, columns).
        importance: not used; every weight is rounded by itself.

    Raises:
        UnsupportedError: not two-dimensional, or a weight beyond float16's range, which would become infinite.
    """
    import numpy as np

    from phi3edge.codecs._blocks import whole_blocks
    from phi3edge.errors import UnsupportedError

    weight = whole_blocks(NAME, weight, BLOCK_SIZE)
    try:
        with np.errstate(over="raise"):
            return Quantized(NAME, weight.astype(np.float16))
    except FloatingPointError as error:
        largest = float(np.abs(weight).max())
        raise UnsupportedError(
            f"f16 holds weights up to 65504, got {largest:g}", "give this tensor bf16 or f32"
        ) from error


def dequantize(q: Quantized) -> np.ndarray:
    """The weights, float32 (rows, columns)."""
    import numpy as np

    return q.codes.astype(np.float32)


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

    return Quantized(NAME, whole_bytes(NAME, data, BLOCK_BYTES).view(np.float16))
