"""The block formats with 32 weights on an even grid: Q8_0, Q4_0, Q4_1, Q5_0, Q5_1.

The plain roundings reproduce ggml's reference operation by operation, in float32. Maxima are taken over the floats'
bits as integers, which vectorizes without relaxed floating point and gives the same bytes on every machine.
"""

from functools import cache

import numpy as np
from numba import njit

from phi3edge.codecs._blocks import column_weights, whole_blocks
from phi3edge.codecs._half import from_half, to_half
from phi3edge.codecs._lanes import BLOCK, LANES, keep_best, load, reciprocal
from phi3edge.types import Quantized

_MAGNITUDE = np.int32(0x7FFFFFFF)
_ZERO = np.float32(0)
_HALF = np.float32(0.5)
_ONE = np.float32(1)
_ROUNDS = 2
_LARGEST = np.float32(65504)  # the largest float16
_HUGE = np.float32(3e38)


def quantize_signed(codec: str, weight: np.ndarray, importance: np.ndarray | None, low: int, high: int) -> Quantized:
    """Codes in [low, high] times a scale: ggml's reference rounding, or the weighted search if there is an importance.

    Returns:
        codes int8 (rows, columns), scales float32 (rows, columns / 32).
    """
    weight = whole_blocks(codec, weight, BLOCK)
    rows, columns = weight.shape
    blocks = weight.reshape(-1, BLOCK)
    codes = np.empty(blocks.shape, np.int8)
    scales = np.empty(len(blocks), np.float32)
    if importance is not None:
        columns_weights = column_weights(importance, columns).reshape(-1, BLOCK)
        limits = np.float32(low), np.float32(high)
        search_signed(blocks, columns_weights, codes, scales, *limits, _tops(low, high), _ROUNDS)
    elif low == -high:
        round_absmax(blocks, codes, scales)
    else:
        round_signed(blocks, codes, scales, -low)
    return Quantized(codec, codes.reshape(weight.shape), scales.reshape(rows, columns // BLOCK))


def quantize_ranged(codec: str, weight: np.ndarray, importance: np.ndarray | None, high: int) -> Quantized:
    """Codes in [0, high] times a scale plus a minimum, chosen as in quantize_signed.

    Returns:
        codes uint8 (rows, columns), scales and mins float32 (rows, columns / 32).
    """
    weight = whole_blocks(codec, weight, BLOCK)
    rows, columns = weight.shape
    blocks = weight.reshape(-1, BLOCK)
    codes = np.empty(blocks.shape, np.uint8)
    scales = np.empty(len(blocks), np.float32)
    mins = np.empty(len(blocks), np.float32)
    if importance is None:
        round_ranged(blocks, codes, scales, mins, high + 1)
    else:
        columns_weights = column_weights(importance, columns).reshape(-1, BLOCK)
        search_ranged(blocks, columns_weights, codes, scales, mins, np.float32(high), _trims(), _ROUNDS)
    shape = rows, columns // BLOCK
    return Quantized(codec, codes.reshape(weight.shape), scales.reshape(shape), mins.reshape(shape))


def dequantize(q: Quantized) -> np.ndarray:
    """The weights: scale * code, plus the block's minimum if there is one: float32 (rows, columns)."""
    weight = np.empty(q.codes.shape, np.float32)
    assert q.scales is not None
    codes = np.ascontiguousarray(q.codes).reshape(-1, BLOCK)
    scales = np.ascontiguousarray(q.scales).reshape(-1)
    if q.mins is None:
        scaled(codes, scales, weight.reshape(-1, BLOCK))
    else:
        scaled_from(codes, scales, np.ascontiguousarray(q.mins).reshape(-1), weight.reshape(-1, BLOCK))
    return weight


@cache
def _tops(low: int, high: int) -> np.ndarray:
    """Where the search sends the weight of largest magnitude: 10 values around either end of the codes' range.

    Coarse grids gain by clipping it (values beyond the range); on Q8_0's a narrow span around one end is enough, as
    the other end's scales are the same but for their sign.
    """
    if low == -high:
        return (high * np.linspace(0.97, 1.01, 10)).astype(np.float32)
    span = np.linspace(0.8, 1.3, 10)
    return np.concatenate([low * span, high * span]).astype(np.float32)


@cache
def _trims() -> np.ndarray:
    """Steps that the search cuts off a block's range: 8 choices below by 8 above, a negative one widens it."""
    span = np.linspace(-0.5, 2.5, 8)
    return np.stack(np.meshgrid(span, span), axis=-1).reshape(-1, 2).astype(np.float32)


@njit(nogil=True, cache=True, error_model="numpy")
def _float(bits):
    return np.int32(bits).view(np.float32)


@njit(nogil=True, cache=True, error_model="numpy")
def _ordered(bits):
    """An integer that orders as the float with these bits does; its own inverse."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & _MAGNITUDE))


@njit(nogil=True, cache=True, error_model="numpy")
def _inverse(scale):
    """Gives 1 / scale, and 0 where that is infinite: for blocks of zeros, or far below the smallest float16."""
    inverse = np.float32(_ONE / scale)
    return inverse if abs(inverse) < np.float32(np.inf) else _ZERO


@njit(nogil=True, cache=True, error_model="numpy")
def _largest(bits, top):
    """Bits of each block's largest magnitude, int32 (blocks, 32) to (blocks,).

    Four blocks at a time, since a shorter body would be unrolled before the compiler thinks of vectors.
    """
    last = bits.shape[0] - 1
    for a in range(0, last + 1, 4):
        b, c, d = min(a + 1, last), min(a + 2, last), min(a + 3, last)
        top_a = top_b = top_c = top_d = np.int32(0)
        for j in range(BLOCK):
            top_a = max(top_a, np.int32(bits[a, j] & _MAGNITUDE))
            top_b = max(top_b, np.int32(bits[b, j] & _MAGNITUDE))
            top_c = max(top_c, np.int32(bits[c, j] & _MAGNITUDE))
            top_d = max(top_d, np.int32(bits[d, j] & _MAGNITUDE))
        top[a], top[b], top[c], top[d] = top_a, top_b, top_c, top_d


@njit(nogil=True, cache=True, error_model="numpy")
def _range(bits, low, high):
    """Each block's least and largest weight, as ordered integers; two blocks at a time."""
    last = bits.shape[0] - 1
    for a in range(0, last + 1, 2):
        b = min(a + 1, last)
        low_a = low_b = _MAGNITUDE
        high_a = high_b = np.int32(-0x80000000)
        for j in range(BLOCK):
            key_a, key_b = _ordered(bits[a, j]), _ordered(bits[b, j])
            low_a, high_a = min(low_a, key_a), max(high_a, key_a)
            low_b, high_b = min(low_b, key_b), max(high_b, key_b)
        low[a], low[b], high[a], high[b] = low_a, low_b, high_a, high_b


@njit(nogil=True, cache=True, error_model="numpy")
def round_absmax(weight, codes, scales):
    """Q8_0: scale = max|w| / 127, codes rounded half away from zero.

    Args:
        weight: float32 (blocks, 32).
        codes: int8 (blocks, 32), written.
        scales: float32 (blocks,), written, on float16 values.
    """
    top = np.empty(weight.shape[0], np.int32)
    _largest(weight.view(np.int32), top)
    for b in range(weight.shape[0]):
        scale = np.float32(_float(top[b]) / np.float32(127))
        inverse = _inverse(scale)
        for j in range(BLOCK):
            value = np.float32(weight[b, j] * inverse)
            size = np.float32(abs(value))
            whole = np.floor(size)
            whole = np.float32(whole + np.floor(np.float32(2) * np.float32(size - whole)))
            codes[b, j] = np.int8(np.int32(np.copysign(whole, value)))
        scales[b] = from_half(to_half(scale))


@njit(nogil=True, cache=True, error_model="numpy")
def round_signed(weight, codes, scales, half):
    """Q4_0, Q5_0: the weight of largest magnitude becomes the code -half.

    Args:
        weight: float32 (blocks, 32).
        codes: int8 (blocks, 32), written, in [-half, half - 1].
        scales: float32 (blocks,), written, on float16 values.
        half: 8 for 4 bits, 16 for 5 bits.
    """
    bits = weight.view(np.int32)
    top = np.empty(weight.shape[0], np.int32)
    _largest(bits, top)
    least, most = np.int32(-half), np.int32(2 * half - 1)
    for b in range(weight.shape[0]):
        first = 0
        while np.int32(bits[b, first] & _MAGNITUDE) != top[b]:
            first += 1
        scale = np.float32(weight[b, first] / np.float32(-half))
        inverse = _inverse(scale)
        # Where the scale is not 0 but its inverse is infinite, the reference stores the code 0, the smallest.
        offset = np.float32(half + 0.5) if inverse != _ZERO or scale == _ZERO else _ZERO
        for j in range(BLOCK):
            code = np.int32(np.float32(np.float32(weight[b, j] * inverse) + offset))
            codes[b, j] = np.int8(np.int32(min(code, most) + least))
        scales[b] = from_half(to_half(scale))


@njit(nogil=True, cache=True, error_model="numpy")
def round_ranged(weight, codes, scales, mins, levels):
    """Q4_1, Q5_1: the block's range is cut into `levels` - 1 equal steps.

    Args:
        weight: float32 (blocks, 32).
        codes: uint8 (blocks, 32), written, in [0, levels - 1].
        scales: float32 (blocks,), written, on float16 values.
        mins: float32 (blocks,), written, on float16 values.
        levels: 16 or 32.
    """
    low = np.empty(weight.shape[0], np.int32)
    high = np.empty(weight.shape[0], np.int32)
    _range(weight.view(np.int32), low, high)
    most = np.int32(levels - 1)
    for b in range(weight.shape[0]):
        minimum = _float(_ordered(low[b]))
        scale = np.float32(np.float32(_float(_ordered(high[b])) - minimum) / np.float32(levels - 1))
        inverse = _inverse(scale)
        for j in range(BLOCK):
            code = np.int32(np.float32(np.float32(np.float32(weight[b, j] - minimum) * inverse) + _HALF))
            codes[b, j] = np.uint8(min(code, most))
        scales[b] = from_half(to_half(scale))
        mins[b] = from_half(to_half(minimum))


@njit(nogil=True, cache=True, error_model="numpy")
def scaled(codes, scales, weight):
    """Writes weight = scale * code: codes (blocks, 32), scales float32 (blocks,), weight float32 (blocks, 32)."""
    for b in range(codes.shape[0]):
        for j in range(BLOCK):
            weight[b, j] = np.float32(scales[b] * np.float32(codes[b, j]))


@njit(nogil=True, cache=True, error_model="numpy")
def scaled_from(codes, scales, mins, weight):
    """Writes weight = scale * code + min, in two float32 roundings as every decoder does it."""
    for b in range(codes.shape[0]):
        for j in range(BLOCK):
            weight[b, j] = np.float32(np.float32(scales[b] * np.float32(codes[b, j])) + mins[b])


@njit(nogil=True, cache=True, error_model="numpy")
def _sums(x, w, inverse, low, high, qx, qq):
    """For q = x * inverse rounded into [low, high]: qx = sum(w q x) and qq = sum(w q q) of each lane."""
    lanes = inverse.shape[0]
    qx[:] = 0
    qq[:] = 0
    for j in range(0, BLOCK, 4):
        for lane in range(lanes):
            for k in range(4):
                value = x[j + k, lane]
                q = min(max(np.rint(np.float32(value * inverse[lane])), low), high)
                wq = np.float32(w[j + k, lane] * q)
                qx[lane] += np.float32(wq * value)
                qq[lane] += np.float32(wq * q)


@njit(nogil=True, cache=True, error_model="numpy")
def search_signed(weight, importance, codes, scales, low, high, tops, rounds):
    """Scales and codes that minimize sum(importance * (weight - scale * code)**2) of each block.

    Tries scales that send the weight of largest magnitude to each of `tops`, solves the best one's least squares for
    the scale, rounds again, `rounds` times, and rounds last to the scale's float16 value.

    Args:
        weight: float32 (blocks, 32).
        importance: float32 (blocks of a row, 32).
        codes: int8 (blocks, 32), written.
        scales: float32 (blocks,), written, on float16 values.
        low: the smallest code, float32.
        high: the largest code, float32.
        tops: float32 (candidates,).
        rounds: how often to refine.
    """
    blocks = weight.shape[0]
    x = np.empty((BLOCK, LANES), np.float32)
    w = np.empty((BLOCK, LANES), np.float32)
    top = np.empty(LANES, np.float32)
    inverse_top = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    qx = np.empty(LANES, np.float32)
    qq = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        load(weight, importance, first, count, x, w, top)
        reciprocal(top, inverse_top)
        best[:] = 0
        scale[:] = 0
        for c in range(tops.shape[0]):
            for lane in range(LANES):
                inverse[lane] = np.float32(tops[c] * inverse_top[lane])
            _sums(x, w, inverse, low, high, qx, qq)
            keep_best(qx, qq, best, scale)
        for _ in range(rounds):
            reciprocal(scale, inverse)
            _sums(x, w, inverse, low, high, qx, qq)
            keep_best(qx, qq, best, scale)
        for lane in range(LANES):
            scale[lane] = from_half(to_half(min(max(scale[lane], -_LARGEST), _LARGEST)))
        reciprocal(scale, inverse)
        for lane in range(count):
            scales[first + lane] = scale[lane]
            for j in range(BLOCK):
                q = min(max(np.rint(np.float32(x[j, lane] * inverse[lane])), low), high)
                codes[first + lane, j] = np.int8(np.int32(q))


@njit(nogil=True, cache=True, error_model="numpy")
def _line_sums(x, w, inverse, offset, high, q1, q2, qx):
    """For q = x * inverse + offset rounded into [0, high]: the sums of w q, w q q and w q x of each lane."""
    lanes = inverse.shape[0]
    q1[:] = 0
    q2[:] = 0
    qx[:] = 0
    for j in range(0, BLOCK, 4):
        for lane in range(lanes):
            for k in range(4):
                value = x[j + k, lane]
                raw = np.rint(np.float32(np.float32(value * inverse[lane]) + offset[lane]))
                q = min(max(raw, np.float32(0)), high)
                wq = np.float32(w[j + k, lane] * q)
                q1[lane] += wq
                q2[lane] += np.float32(wq * q)
                qx[lane] += np.float32(wq * value)


@njit(nogil=True, cache=True, error_model="numpy")
def _keep_best_line(q1, q2, qx, total, best, scale, start):
    """Keeps the line scale * q + start through the lane's weights (of weighted mean 0) if its error is the least."""
    for lane in range(q1.shape[0]):
        spread = np.float32(q2[lane] - np.float32(q1[lane] * np.float32(q1[lane] / total[lane])))
        fit = np.float32(qx[lane] / spread) if spread > np.float32(0) else np.float32(0)
        gain = np.float32(fit * qx[lane])
        better = gain > best[lane]
        best[lane] = gain if better else best[lane]
        scale[lane] = fit if better else scale[lane]
        start[lane] = np.float32(np.float32(-fit * q1[lane]) / total[lane]) if better else start[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def search_ranged(weight, importance, codes, scales, mins, high, trims, rounds):
    """Scales, minima and codes that minimize sum(importance * (weight - scale * code - min)**2) of each block.

    Tries grids that trim the block's range by t0 steps below and t1 steps above for each pair of `trims`, solves the
    best one's least squares for the line, and refines as search_signed does.

    Args:
        weight: float32 (blocks, 32).
        importance: float32 (blocks of a row, 32).
        codes: uint8 (blocks, 32), written.
        scales: float32 (blocks,), written, on float16 values.
        mins: float32 (blocks,), written, on float16 values.
        high: the largest code, float32.
        trims: float32 (candidates, 2).
        rounds: how often to refine.
    """
    blocks = weight.shape[0]
    x = np.empty((BLOCK, LANES), np.float32)
    w = np.empty((BLOCK, LANES), np.float32)
    top = np.empty(LANES, np.float32)
    low = np.empty(LANES, np.float32)
    spread = np.empty(LANES, np.float32)
    total = np.empty(LANES, np.float32)
    mean = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    offset = np.empty(LANES, np.float32)
    q1 = np.empty(LANES, np.float32)
    q2 = np.empty(LANES, np.float32)
    qx = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    start = np.empty(LANES, np.float32)
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        load(weight, importance, first, count, x, w, top)
        w[:, count:] = 1
        _center(x, w, total, mean, low, spread)
        best[:] = 0
        scale[:] = 0
        start[:] = 0
        for c in range(trims.shape[0]):
            steps = np.float32(high - trims[c, 0] - trims[c, 1])
            for lane in range(LANES):
                step = np.float32(spread[lane] / steps)
                slope = np.float32(_ONE / step)
                inverse[lane] = slope if slope < _HUGE else _ZERO
                offset[lane] = np.float32(np.float32(-low[lane] * inverse[lane]) - trims[c, 0])
            _line_sums(x, w, inverse, offset, high, q1, q2, qx)
            _keep_best_line(q1, q2, qx, total, best, scale, start)
        for _ in range(rounds):
            reciprocal(scale, inverse)
            for lane in range(LANES):
                offset[lane] = np.float32(-start[lane] * inverse[lane])
            _line_sums(x, w, inverse, offset, high, q1, q2, qx)
            _keep_best_line(q1, q2, qx, total, best, scale, start)
        for lane in range(LANES):
            scale[lane] = from_half(to_half(min(scale[lane], _LARGEST)))
        reciprocal(scale, inverse)
        for lane in range(LANES):
            offset[lane] = np.float32(-start[lane] * inverse[lane])
        _line_sums(x, w, inverse, offset, high, q1, q2, qx)
        for lane in range(count):
            fit = np.float32(mean[lane] - np.float32(np.float32(scale[lane] * q1[lane]) / total[lane]))
            minimum = from_half(to_half(min(max(fit, -_LARGEST), _LARGEST)))
            for j in range(BLOCK):
                value = np.float32(weight[first + lane, j] - minimum)
                q = min(max(np.rint(np.float32(value * inverse[lane])), np.float32(0)), high)
                codes[first + lane, j] = np.uint8(np.int32(q))
            scales[first + lane] = scale[lane]
            mins[first + lane] = minimum


@njit(nogil=True, cache=True, error_model="numpy")
def _center(x, w, total, mean, low, spread):
    """Subtracts each lane's weighted mean from x, which keeps the sums exact, and measures the range."""
    lanes = mean.shape[0]
    total[:] = 0
    mean[:] = 0
    for j in range(BLOCK):
        for lane in range(lanes):
            total[lane] += w[j, lane]
            mean[lane] += np.float32(w[j, lane] * x[j, lane])
    for lane in range(lanes):
        mean[lane] = np.float32(mean[lane] / total[lane])
        low[lane] = np.float32(x[0, lane] - mean[lane])
        spread[lane] = low[lane]  # holds the maximum first
    for j in range(BLOCK):
        for lane in range(lanes):
            value = np.float32(x[j, lane] - mean[lane])
            x[j, lane] = value
            low[lane] = value if value < low[lane] else low[lane]
            spread[lane] = value if value > spread[lane] else spread[lane]
    for lane in range(lanes):
        spread[lane] = np.float32(spread[lane] - low[lane])
