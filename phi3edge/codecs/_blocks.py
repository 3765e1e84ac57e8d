"""What every codec asks of its arguments, and the fast way from rows to blocks."""

import numpy as np

from phi3edge.errors import UnsupportedError


def whole_blocks(codec: str, weight: np.ndarray, block_size: int) -> np.ndarray:
    """The weight as a contiguous float32 array.

    Raises:
        UnsupportedError: not two-dimensional, or rows that are not whole blocks.
    """
    if weight.ndim != 2 or weight.shape[1] % block_size:
        raise UnsupportedError(
            f"{codec} holds rows of whole blocks of {block_size} weights, got shape {weight.shape}",
            "give this tensor another codec, or the recipe a fallback for it",
        )
    return np.ascontiguousarray(weight, dtype=np.float32)


def whole_bytes(codec: str, data: np.ndarray, block_bytes: int) -> np.ndarray:
    """Packed rows as a contiguous uint8 array of shape (rows, bytes).

    Raises:
        UnsupportedError: not two-dimensional bytes, or rows that are not whole packed blocks.
    """
    if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] % block_bytes:
        raise UnsupportedError(
            f"{codec} packs rows of whole blocks of {block_bytes} bytes, got {data.dtype} of shape {data.shape}",
            "the data is cut off or of another type",
        )
    return np.ascontiguousarray(data)


def column_weights(importance: np.ndarray | None, columns: int) -> np.ndarray:
    """The weight of each column's squared error: float32 (columns,), of mean 1, never 0.

    A column that calibration never reached keeps a millionth of the mean, so that no block is thrown away.

    Raises:
        UnsupportedError: importance of another length, or negative or not finite.
    """
    if importance is None:
        return np.ones(columns, np.float32)
    if importance.shape != (columns,):
        raise UnsupportedError(f"importance has shape {importance.shape}, the weight has {columns} columns")
    mean = float(np.mean(importance, dtype=np.float64))
    if not np.isfinite(mean) or np.min(importance) < 0:
        raise UnsupportedError("importance must be finite and not negative")
    if mean == 0:
        return np.ones(columns, np.float32)
    return (importance / mean + 1e-6).astype(np.float32)
