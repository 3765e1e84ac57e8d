"""Compiled loops float32 <-> bfloat16, on bits."""

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def round_bits(bits: np.ndarray, codes: np.ndarray) -> None:
    """Rounds uint32 bits of float32 to their upper 16, ties to even, into uint16 codes; NaN becomes a quiet NaN."""
    for i in range(bits.size):
        b = bits[i]
        rounded = np.uint32(b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        quiet = (b >> np.uint32(16)) | np.uint32(0x40)
        codes[i] = np.uint16(quiet if (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded)


@njit(nogil=True, cache=True)
def extend_bits(codes: np.ndarray, bits: np.ndarray) -> None:
    """Writes the float32 bits of bfloat16 codes: exact."""
    for i in range(codes.size):
        bits[i] = np.uint32(codes[i]) << np.uint32(16)
