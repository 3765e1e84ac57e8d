"""Compiled loops of the affine grids: weight = scale * (code - zero point), code in [0, top].

`fit` searches the scales and zero points of 128 blocks at once, one per lane, transposed, so that every inner loop runs
over lanes and vectorizes without relaxed floating point: the same input gives the same bytes on every machine. As
zero points are whole, code - zero point = weight / scale, rounded and cut to the codes; and for given codes the best
scale is that of least squares through zero.
"""

import numpy as np

from phi3edge.codecs._blocks import column_weights, whole_blocks
from phi3edge.codecs._half import from_half, to_half
from phi3edge.codecs._kquant_lanes import BEYOND_ROUNDING, jit
from phi3edge.codecs._lanes import LANES
from phi3edge.errors import UnsupportedError
from phi3edge.types import Quantized

_ZERO = np.float32(0)
_ONE = np.float32(1)
_INFINITY = np.float32(np.inf)
_HALF_MAX = np.float32(65504)

_REFINEMENTS = 2  # how often the best guess is rounded and fitted again


@jit
def _load(source, start, count, x):
    """Transposes `count` runs of n numbers of a periodic source, from `start` on, to x (n, lanes); the rest are 0."""
    n = x.shape[0]
    position = start % source.size
    for lane in range(count):
        for j in range(n):
            x[j, lane] = source[position + j]
        position += n
        if position == source.size:
            position = 0
    x[:, count:] = 0


@jit
def _weigh(x, w):
    """Writes w = |x| + root mean square of the lane's x: large weights count more, as in llama.cpp's Q4_K search."""
    size = np.zeros(x.shape[1], np.float32)
    for j in range(x.shape[0]):
        for lane in range(x.shape[1]):
            size[lane] += x[j, lane] * x[j, lane]
    for lane in range(x.shape[1]):
        size[lane] = np.sqrt(size[lane] / np.float32(x.shape[0]))
    for j in range(x.shape[0]):
        for lane in range(x.shape[1]):
            w[j, lane] = abs(x[j, lane]) + size[lane]


@jit
def _range(x, low, high):
    """Each lane's range with 0 in it: x float32 (n, lanes), the others (lanes,), written."""
    low[:] = 0
    high[:] = 0
    for j in range(x.shape[0]):
        for lane in range(low.shape[0]):
            low[lane] = min(low[lane], x[j, lane])
            high[lane] = max(high[lane], x[j, lane])


@jit
def _inverse(scale):
    """Gives 1 / scale, and 0 where that is infinite: in blocks of zeros, or of weights too small for any scale."""
    inverse = _ONE / scale
    return inverse if abs(inverse) < _INFINITY else _ZERO


@jit
def _guess(low, high, above, below, top, inverse, zero):
    """The scale that cuts these steps off at the range's ends, and the nearest whole zero point."""
    for lane in range(low.shape[0]):
        inverse[lane] = (top + above + below) * _inverse(high[lane] - low[lane])
        zero[lane] = np.rint(min(max(-low[lane] * inverse[lane] - below, _ZERO), top))


@jit
def _guess_signed(low, high, code, middle, inverse, zero):
    """The scale, of either sign, that gives the weight of largest magnitude this code less the middle one."""
    for lane in range(low.shape[0]):
        inverse[lane] = code * _inverse(high[lane] if high[lane] > -low[lane] else low[lane])
        zero[lane] = middle


@jit
def _sums(x, w, inverse, zero, top, cc, xc):
    """For c = code - zero point: the sums of w c c and w x c of each lane."""
    cc[:] = 0
    xc[:] = 0
    for j in range(0, x.shape[0], 4):
        for lane in range(inverse.shape[0]):
            for k in range(4):
                v = x[j + k, lane]
                c = min(max(np.rint(v * inverse[lane]), -zero[lane]), top - zero[lane])
                wc = w[j + k, lane] * c
                cc[lane] += wc * c
                xc[lane] += wc * v


@jit
def _keep_better_fit(cc, xc, zero, gain, best_scale, best_zero):
    """Keeps the codes' least-squares scale, xc / cc, if it saves more of the error: xc**2 / cc."""
    for lane in range(cc.shape[0]):
        fitted = xc[lane] / cc[lane] if cc[lane] > _ZERO else _ZERO
        saved = fitted * xc[lane]
        better = saved > gain[lane] * BEYOND_ROUNDING
        gain[lane] = saved if better else gain[lane]
        best_scale[lane] = fitted if better else best_scale[lane]
        best_zero[lane] = zero[lane] if better else best_zero[lane]


@jit
def _errors(x, w, scale, zero, top, inverse, error):
    """The squared error of each lane, from its residuals: differences of sums would cancel. Overwrites `inverse`."""
    error[:] = 0
    for lane in range(scale.shape[0]):
        inverse[lane] = _inverse(scale[lane])
    for j in range(0, x.shape[0], 4):
        for lane in range(scale.shape[0]):
            for k in range(4):
                v = x[j + k, lane]
                c = min(max(np.rint(v * inverse[lane]), -zero[lane]), top - zero[lane])
                residual = scale[lane] * c - v
                error[lane] += w[j + k, lane] * residual * residual


@jit
def _half(value):
    """The nearest finite float16, as float32."""
    return from_half(to_half(min(max(value, -_HALF_MAX), _HALF_MAX)))


@jit
def fit(weight, importance, n, top, signed, guesses, scales, zero_points):
    """The scale and zero point of every block: least weighted squared error, at most that of the first guess.

    Args:
        weight: float32 (rows, columns), C order, finite.
        importance: float32 (columns,), positive, or None: `_weigh` weighs every weight by its size.
        n: weights in a block.
        top: largest code, float32.
        signed: whether every zero point is the middle code, (top + 1) / 2.
        guesses: float32 (candidates, 2), the first one being plain rounding: steps that are cut off above and below a
            block's range (a negative number widens it). If signed: the code, less the middle one, of the weight of
            largest magnitude; and 0.
        scales: float32 (rows, columns / n), written, on float16 values.
        zero_points: uint8 (rows, columns / n), written.
    """
    flat, flat_scales, flat_zeros = weight.reshape(-1), scales.reshape(-1), zero_points.reshape(-1)
    middle = (top + _ONE) / np.float32(2)
    x = np.empty((n, LANES), np.float32)
    w = np.empty((n, LANES), np.float32)
    low = np.empty(LANES, np.float32)
    high = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    zero = np.empty(LANES, np.float32)
    cc = np.empty(LANES, np.float32)
    xc = np.empty(LANES, np.float32)
    gain = np.empty(LANES, np.float32)
    best_scale = np.empty(LANES, np.float32)
    best_zero = np.empty(LANES, np.float32)
    error = np.empty(LANES, np.float32)
    plain_scale = np.empty(LANES, np.float32)
    plain_error = np.empty(LANES, np.float32)
    for start in range(0, flat_scales.size, LANES):
        count = min(LANES, flat_scales.size - start)
        _load(flat, start * n, count, x)
        if importance is None:
            _weigh(x, w)
        else:
            _load(importance, start * n, count, w)
        _range(x, low, high)
        gain[:] = 0
        best_scale[:] = 0
        best_zero[:] = middle if signed else _ZERO
        for k in range(guesses.shape[0]):
            if signed:
                _guess_signed(low, high, guesses[k, 0], middle, inverse, zero)
            else:
                _guess(low, high, guesses[k, 0], guesses[k, 1], top, inverse, zero)
            _sums(x, w, inverse, zero, top, cc, xc)
            _keep_better_fit(cc, xc, zero, gain, best_scale, best_zero)
        for _ in range(_REFINEMENTS):
            for lane in range(LANES):
                inverse[lane] = _inverse(best_scale[lane])
            _sums(x, w, inverse, best_zero, top, cc, xc)
            _keep_better_fit(cc, xc, best_zero, gain, best_scale, best_zero)
        for lane in range(LANES):
            best_scale[lane] = _half(best_scale[lane])
        _errors(x, w, best_scale, best_zero, top, inverse, error)
        if signed:
            _guess_signed(low, high, guesses[0, 0], middle, inverse, zero)
        else:
            _guess(low, high, guesses[0, 0], guesses[0, 1], top, inverse, zero)
        for lane in range(LANES):
            plain_scale[lane] = _half(_inverse(inverse[lane]))
        _errors(x, w, plain_scale, zero, top, inverse, plain_error)
        for lane in range(count):
            better = error[lane] <= plain_error[lane]
            flat_scales[start + lane] = best_scale[lane] if better else plain_scale[lane]
            flat_zeros[start + lane] = np.uint8(best_zero[lane] if better else zero[lane])


@jit
def round_codes(weight, scales, zero_points, n, top, codes):
    """The nearest code of every weight, given scales and zero points; ties to even distances from the zero point.

    Args:
        weight: float32 (rows, columns), C order.
        scales: float32 (rows, columns / n).
        zero_points: uint8 (rows, columns / n).
        n: weights in a block.
        top: largest code, float32.
        codes: uint8 (rows, columns), written.
    """
    for row in range(weight.shape[0]):
        for j in range(scales.shape[1]):
            inverse = _inverse(scales[row, j])
            zero = np.float32(zero_points[row, j])
            for i in range(j * n, j * n + n):
                c = min(max(np.rint(weight[row, i] * inverse), -zero), top - zero)
                codes[row, i] = np.uint8(np.int32(c + zero))


@jit
def _expand(codes, scales, zero_points, n, weight):
    """Writes scale * (code - zero point) of every weight; arguments as in round_codes."""
    for row in range(codes.shape[0]):
        for j in range(scales.shape[1]):
            scale, zero = scales[row, j], np.float32(zero_points[row, j])
            for i in range(j * n, j * n + n):
                weight[row, i] = scale * (np.float32(codes[row, i]) - zero)


def quantize(
    codec: str,
    weight: np.ndarray,
    importance: np.ndarray | None,
    n: int,
    bits: int,
    signed: bool,
    guesses: tuple[tuple[float, float], ...],
) -> Quantized:
    """Fits the scale and zero point of every block and rounds: the `quantize` of the affine codecs.

    Args:
        codec: its name.
        weight: float32 (rows, columns).
        importance: float32 (columns,) or None; see `fit`.
        n: weights in a block.
        bits: of a code.
        signed: the zero point of every block is the middle code, and not stored.
        guesses: where the search starts; see `fit`.

    Raises:
        UnsupportedError: rows that are not whole blocks, an importance that does not fit them, or a weight that is not
            finite or beyond what codes times the largest float16 can reach.
    """
    weight = whole_blocks(codec, weight, n)
    _check_range(codec, weight, bits)
    rows, columns = weight.shape
    scales = np.empty((rows, columns // n), np.float32)
    zero_points = np.empty((rows, columns // n), np.uint8)
    codes = np.empty((rows, columns), np.uint8)
    top = np.float32(2**bits - 1)
    starts = np.array(guesses, np.float32)
    importance = None if importance is None else column_weights(importance, columns)
    fit(weight, importance, n, top, signed, starts, scales, zero_points)
    round_codes(weight, scales, zero_points, n, top, codes)
    return Quantized(codec, codes, scales, zero_points=None if signed else zero_points)


def dequantize(q: Quantized, n: int, bits: int) -> np.ndarray:
    """The `dequantize` of the affine codecs: float32 (rows, columns)."""
    assert q.scales is not None
    weight = np.empty(q.codes.shape, np.float32)
    middle = np.full(q.scales.shape, 2 ** (bits - 1), np.uint8)
    _expand(q.codes, q.scales, middle if q.zero_points is None else q.zero_points, n, weight)
    return weight


def _check_range(codec: str, weight: np.ndarray, bits: int) -> None:
    """Refuses NaN, infinity, and weights that no float16 scale reaches, which would turn into others unnoticed."""
    limit = float(_HALF_MAX) * 2 ** (bits - 1)
    low, high = (float(weight.min()), float(weight.max())) if weight.size else (0.0, 0.0)
    if not (-limit <= low and high <= limit):  # NaN compares as false
        raise UnsupportedError(
            f"{codec} holds finite weights within +-{limit:g}, got {low:g} to {high:g}",
            "the checkpoint is damaged, or this tensor needs a float codec",
        )
