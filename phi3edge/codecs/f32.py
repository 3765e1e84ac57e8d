"""F32: the weights as they are, little-endian float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phi3edge.types import Quantized

if TYPE_CHECKING:
    import numpy as np

NAME = "f32"
BLOCK_SIZE = 1
BLOCK_BYTES = 4
GGML_TYPE = 0
FORMATS = ("gguf", "onnx")


def quantize(weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """The weights themselves.

    Args:
        weight: float32 (rows, columns).
        importance: not used; every weight is rounded by itself.

    Raises:
        UnsupportedError: not two-dimensional.
    """
    from phi3edge.codecs._blocks import whole_blocks

    return Quantized(NAME, whole_blocks(NAME, weight, BLOCK_SIZE))


def dequantize(q: Quantized) -> np.ndarray:
    """The weights, float32 (rows, columns)."""
    return q.codes


def pack(q: Quantized) -> np.ndarray:
    """The file's bytes, uint8 (rows, 4 * columns)."""
    import numpy as np

    return np.ascontiguousarray(q.codes).view(np.uint8)


def unpack(data: np.ndarray) -> Quantized:
    """The inverse of `pack`.

    Raises:
        UnsupportedError: data of another dtype, or not whole weights.
    """
    import numpy as np

    from phi3edge.codecs._blocks import whole_bytes

    return Quantized(NAME, whole_bytes(NAME, data, BLOCK_BYTES).view(np.float32))
