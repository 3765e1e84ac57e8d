"""Least-squares searches for block scales, many blocks side by side.

Sums run over the 32 weights of a block, so they do not vectorize within it without relaxed floating point; here they
run over LANES blocks at once, transposed, in a fixed order: fast, and the same bytes on every machine.
"""

import numpy as np
from numba import njit

BLOCK = 32
LANES = 128


@njit(nogil=True, cache=True, error_model="numpy")
def load(weight, importance, first, count, x, w, top):
    """Transposes `count` blocks into lanes and finds each one's weight of largest magnitude.

    Args:
        weight: float32 (blocks, 32).
        importance: float32 (blocks of a row, 32): the weights' column weights.
        first: index of the first block to load.
        count: number of blocks; the lanes after them are zeroed.
        x: float32 (32, lanes), written: the weights.
        w: float32 (32, lanes), written: their column weights.
        top: float32 (lanes,), written.
    """
    per_row = importance.shape[0]
    for lane in range(count):
        block = first + lane
        column = block % per_row
        largest = np.float32(0)
        for j in range(BLOCK):
            value = weight[block, j]
            x[j, lane] = value
            w[j, lane] = importance[column, j]
            largest = value if abs(value) > abs(largest) else largest
        top[lane] = largest
    x[:, count:] = 0
    w[:, count:] = 0
    top[count:] = 0


@njit(nogil=True, cache=True, error_model="numpy")
def reciprocal(values, out):
    """Writes 1 / values, and 0 where that is not finite."""
    for lane in range(values.shape[0]):
        inverse = np.float32(np.float32(1) / values[lane])
        out[lane] = inverse if abs(inverse) < np.float32(3e38) else np.float32(0)


@njit(nogil=True, cache=True, error_model="numpy")
def keep_best(qx, qq, best, scale):
    """Keeps the scale qx/qq where it leaves less error than the best so far: the error falls by qx**2 / qq."""
    for lane in range(qx.shape[0]):
        fit = np.float32(qx[lane] / qq[lane]) if qq[lane] > np.float32(0) else np.float32(0)
        gain = np.float32(fit * qx[lane])
        better = gain > best[lane]
        best[lane] = gain if better else best[lane]
        scale[lane] = fit if better else scale[lane]
