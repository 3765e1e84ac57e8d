"""What the compiled searches of the super-block formats share: 64 sub-blocks side by side, one per lane."""

import numpy as np
from numba import njit

from phi3edge.codecs._half import from_half, to_half

LANES = 64
MAGIC = np.float32(12582912.0)
"""1.5 * 2**23: adding and then subtracting it rounds a float32 below 2**22 to the nearest integer, ties to even."""

BEYOND_ROUNDING = np.float32(1 + 2.0**-21)
"""How much better a guess must be to replace an earlier one, so that equal sub-blocks get equal scales."""

_ZERO = np.float32(0)
_HALF_MAX = np.float32(65504)

jit = njit(nogil=True, cache=True, error_model="numpy")


@jit
def gather(source, start, count, n, x):
    """Transposes `count` runs of n numbers of a periodic source, from `start` on, to x[i * LANES + lane]; rest 0."""
    position = start % source.size
    for lane in range(count):
        for i in range(n):
            x[i * LANES + lane] = source[position + i]
        position += n
        if position == source.size:
            position = 0
    for lane in range(count, LANES):
        for i in range(n):
            x[i * LANES + lane] = _ZERO


@jit
def half(value):
    """The nearest finite float16 of a value that is not negative, as float32."""
    return from_half(to_half(min(value, _HALF_MAX)))


@jit
def half_up(value):
    """The smallest finite float16 that is at least `value` (not negative), as float32."""
    nearest = half(value)
    return nearest if nearest >= min(value, _HALF_MAX) else from_half(np.uint16(to_half(nearest) + np.uint16(1)))
