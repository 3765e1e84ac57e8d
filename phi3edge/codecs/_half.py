"""float32 <-> IEEE float16 bits, for use inside compiled loops (numba has no float16 on the CPU).

Both are branch-free, so that a loop over them vectorizes. Checked on all 65536 halves and against numpy's rounding.
"""

import numpy as np
from numba import njit

_SIGN = np.uint32(0x80000000)
_FLOAT_INF = np.uint32(0x7F800000)
_HALF_LIMIT = np.uint32((127 + 16) << 23)  # 65536.0: no finite half from here on
_HALF_NORMAL = np.uint32((127 - 14) << 23)  # 2**-14: the smallest normal half
_REBIAS = np.uint32((127 - 15) << 23)
_ONE_HALF = np.uint32(126 << 23)  # the float 0.5


@njit(nogil=True, cache=True)
def to_half(x: np.float32) -> np.uint16:
    """Bits of the float16 nearest to x: ties to even, overflow to infinity, subnormals exact, NaN stays NaN."""
    bits = np.float32(x).view(np.uint32)
    sign = np.uint32(bits & _SIGN)
    bits = np.uint32(bits ^ sign)
    odd = np.uint32((bits >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(bits - _REBIAS + np.uint32(0xFFF) + odd) >> np.uint32(13))
    # Adding 0.5 lines the last bit of a half subnormal (2**-24) up with the last bit of a float in [0.5, 1).
    aligned = np.float32(bits.view(np.float32) + np.float32(0.5))
    subnormal = np.uint32(aligned.view(np.uint32) - _ONE_HALF)
    special = np.uint32(0x7E00) if bits > _FLOAT_INF else np.uint32(0x7C00)
    finite = subnormal if bits < _HALF_NORMAL else normal
    half = special if bits >= _HALF_LIMIT else finite
    return np.uint16(half | (sign >> np.uint32(16)))


@njit(nogil=True, cache=True)
def from_half(h: np.uint16) -> np.float32:
    """The float32 that equals the float16 with bits h."""
    magnitude = np.uint32(h) & np.uint32(0x7FFF)
    shifted = np.uint32(magnitude << np.uint32(13))
    small = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24))
    subnormal = small.view(np.uint32)
    rebias = np.uint32(_REBIAS + _REBIAS) if magnitude >= np.uint32(0x7C00) else _REBIAS
    bits = subnormal if magnitude < np.uint32(0x0400) else np.uint32(shifted + rebias)
    sign = np.uint32((np.uint32(h) & np.uint32(0x8000)) << np.uint32(16))
    signed = np.uint32(bits | sign)
    return signed.view(np.float32)
