"""ggml's own quantizer, from the library that llama-cpp-python brings: the yardstick of error and speed."""

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np


@cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    path = next(p for p in (Path(spec.origin).parent / "lib").iterdir() if p.stem in ("libggml-base", "ggml-base"))
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        [ctypes.c_int] + [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    )
    return library


def quantize_chunk(codec: ModuleType, weight: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Packed bytes, uint8 (rows, bytes), of float32 (rows, columns), weighed by importance, float32 (columns,)."""
    rows, columns = weight.shape
    assert columns % codec.BLOCK_SIZE == 0
    assert weight.dtype == np.float32
    assert weight.flags.c_contiguous
    assert importance is None or (importance.dtype == np.float32 and importance.shape == (columns,))
    packed = np.empty((rows, columns // codec.BLOCK_SIZE * codec.BLOCK_BYTES), np.uint8)
    importance_at = None if importance is None else importance.ctypes.data
    written = _library().ggml_quantize_chunk(
        codec.GGML_TYPE, weight.ctypes.data, packed.ctypes.data, 0, rows, columns, importance_at
    )
    assert written == packed.nbytes
    return packed
