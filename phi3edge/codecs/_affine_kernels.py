"""Compiled loops of the affine grids: weight = scale * (code - zero point), code in [0, top].

`fit` searches the scales and zero points of 64 blocks at once, one per lane, as the K-quants' searches do: every inner
loop runs over lanes and vectorizes without relaxed floating point, so the same input gives the same bytes on every
machine. All state of the lanes lies in one flat table (slot k of lane i is table[k + i]): fixed distances tell the
compiler that slots do not overlap.
"""

import numpy as np

from phi3edge.codecs._blocks import column_weights, whole_blocks
from phi3edge.codecs._half import from_half, to_half
from phi3edge.codecs._kquant_lanes import BEYOND_ROUNDING, LANES, MAGIC, gather, jit
from phi3edge.errors import UnsupportedError
from phi3edge.types import Quantized

_ZERO = np.float32(0)
_ONE = np.float32(1)
_INFINITY = np.float32(np.inf)
_HALF_MAX = np.float32(65504)

# A block's range, with 0 in it.
_LOW, _HIGH = 0 * LANES, 1 * LANES
# Rounding in use: code - zero = round(x * INVERSE) cut to the codes; sums of w*c*c, w*x*c over c = code - zero.
_INVERSE, _GRID_ZERO, _SUM_CC, _SUM_XC = 2 * LANES, 3 * LANES, 4 * LANES, 5 * LANES
# The best so far by least squares: what it saves of the squared error.
_BEST_SCALE, _BEST_ZERO, _BEST_GAIN = 6 * LANES, 7 * LANES, 8 * LANES
# Stored numbers (scale on a float16) and their squared error; the best so far.
_SCALE, _ERROR, _KEPT_SCALE, _KEPT_ZERO, _KEPT_ERROR = 9 * LANES, 10 * LANES, 11 * LANES, 12 * LANES, 13 * LANES
_SLOTS = 14

_REFINEMENTS = 2  # how often the best guess is rounded and fitted again


@jit
def _describe(x, n, table):
    """LOW (at most 0) and HIGH (at least 0) of each lane."""
    for lane in range(LANES):
        table[_LOW + lane] = _ZERO
        table[_HIGH + lane] = _ZERO
    for i in range(n):
        for lane in range(LANES):
            v = x[i * LANES + lane]
            low, high = table[_LOW + lane], table[_HIGH + lane]
            table[_LOW + lane] = v if v < low else low
            table[_HIGH + lane] = v if v > high else high


@jit
def _inverse(scale):
    """Gives 1 / scale, and 0 where that is infinite: in blocks of zeros, or of weights too small for any scale."""
    inverse = _ONE / scale
    return inverse if abs(inverse) < _INFINITY else _ZERO


@jit
def _guess_signed(code, zero, table):
    """The scale that gives the weight of largest magnitude this code (less the zero point), of either sign."""
    for lane in range(LANES):
        low, high = table[_LOW + lane], table[_HIGH + lane]
        table[_INVERSE + lane] = code * _inverse(high if high > -low else low)
        table[_GRID_ZERO + lane] = zero


@jit
def _guess_ranged(above, below, top, table):
    """The scale that cuts these steps off at the range's ends, and the nearest integer zero point."""
    for lane in range(LANES):
        low = table[_LOW + lane]
        inverse = (top + above + below) * _inverse(table[_HIGH + lane] - low)
        zero = -low * inverse - below
        zero = zero if zero > _ZERO else _ZERO
        zero = zero if zero < top else top
        table[_INVERSE + lane] = inverse
        table[_GRID_ZERO + lane] = (zero + MAGIC) - MAGIC


@jit
def _guess(guesses, k, top, zero, table):
    """Sets INVERSE and GRID_ZERO to guess k; `zero` is the grid's fixed zero point, or None."""
    if zero is None:
        _guess_ranged(guesses[k, 0], guesses[k, 1], top, table)
    else:
        _guess_signed(guesses[k, 0], zero, table)


@jit
def _accumulate(x, w, n, top, table):
    """Rounds all lanes with INVERSE and GRID_ZERO and sums what least squares needs."""
    for lane in range(LANES):
        table[_SUM_CC + lane] = _ZERO
        table[_SUM_XC + lane] = _ZERO
    for start in range(0, n * LANES, 8 * LANES):
        for lane in range(LANES):
            inverse, low = table[_INVERSE + lane], -table[_GRID_ZERO + lane]
            high = top + low
            sum_cc, sum_xc = table[_SUM_CC + lane], table[_SUM_XC + lane]
            for k in range(8):
                v = x[start + k * LANES + lane]
                code = v * inverse
                code = code if code > low else low
                code = code if code < high else high
                code = (code + MAGIC) - MAGIC
                weighted = code if w is None else code * w[start + k * LANES + lane]
                sum_cc += weighted * code
                sum_xc += weighted * v
            table[_SUM_CC + lane] = sum_cc
            table[_SUM_XC + lane] = sum_xc


@jit
def _keep_better_fit(table):
    """Keeps the codes' least-squares scale, sum_xc / sum_cc, if it saves more of the error: sum_xc**2 / sum_cc."""
    for lane in range(LANES):
        sum_cc, sum_xc = table[_SUM_CC + lane], table[_SUM_XC + lane]
        scale = sum_xc / sum_cc if sum_cc > _ZERO else _ZERO
        gain = scale * sum_xc
        better = gain > table[_BEST_GAIN + lane] * BEYOND_ROUNDING
        table[_BEST_SCALE + lane] = scale if better else table[_BEST_SCALE + lane]
        table[_BEST_ZERO + lane] = table[_GRID_ZERO + lane] if better else table[_BEST_ZERO + lane]
        table[_BEST_GAIN + lane] = gain if better else table[_BEST_GAIN + lane]


@jit
def _search(x, w, n, top, guesses, zero, table):
    """BEST_SCALE and BEST_ZERO of each block, before the scale becomes a float16."""
    for lane in range(LANES):
        table[_BEST_SCALE + lane] = _ZERO
        table[_BEST_ZERO + lane] = _ZERO if zero is None else zero
        table[_BEST_GAIN + lane] = _ZERO
    for k in range(guesses.shape[0]):
        _guess(guesses, k, top, zero, table)
        _accumulate(x, w, n, top, table)
        _keep_better_fit(table)
    for _ in range(_REFINEMENTS):
        for lane in range(LANES):
            table[_INVERSE + lane] = _inverse(table[_BEST_SCALE + lane])
            table[_GRID_ZERO + lane] = table[_BEST_ZERO + lane]
        _accumulate(x, w, n, top, table)
        _keep_better_fit(table)


@jit
def _measure(x, w, n, top, table):
    """The squared ERROR of each lane when rounded with SCALE and GRID_ZERO, from its residuals (sums would cancel)."""
    for lane in range(LANES):
        table[_ERROR + lane] = _ZERO
        table[_INVERSE + lane] = _inverse(table[_SCALE + lane])
    for start in range(0, n * LANES, 8 * LANES):
        for lane in range(LANES):
            inverse, low = table[_INVERSE + lane], -table[_GRID_ZERO + lane]
            scale, high, error = table[_SCALE + lane], top + low, table[_ERROR + lane]
            for k in range(8):
                v = x[start + k * LANES + lane]
                code = v * inverse
                code = code if code > low else low
                code = code if code < high else high
                residual = scale * ((code + MAGIC) - MAGIC) - v
                square = residual * residual
                error += square if w is None else square * w[start + k * LANES + lane]
            table[_ERROR + lane] = error


@jit
def _keep_better_stored(table):
    for lane in range(LANES):
        better = table[_ERROR + lane] < table[_KEPT_ERROR + lane]
        table[_KEPT_SCALE + lane] = table[_SCALE + lane] if better else table[_KEPT_SCALE + lane]
        table[_KEPT_ZERO + lane] = table[_GRID_ZERO + lane] if better else table[_KEPT_ZERO + lane]
        table[_KEPT_ERROR + lane] = table[_ERROR + lane] if better else table[_KEPT_ERROR + lane]


@jit
def _half(value):
    """The nearest finite float16, as float32."""
    return from_half(to_half(min(max(value, -_HALF_MAX), _HALF_MAX)))


@jit
def fit(weight, importance, n, top, zero, guesses, scales, zero_points):
    """The scale and zero point of every block: least (weighted) squared error, at most that of the first guess.

    Args:
        weight: float32 (rows, columns), C order, finite.
        importance: float32 (columns,), positive, or None.
        n: weights in a block.
        top: largest code, float32.
        zero: the zero point of every block, float32; or None: each has its own.
        guesses: float32, the first one being plain rounding. If each block has its own zero point, (candidates, 2):
            steps that are cut off above and below its range (a negative number widens it). Else (candidates, 1): the
            code, less `zero`, of its weight of largest magnitude.
        scales: float32 (rows, columns / n), written, on float16 values.
        zero_points: uint8 (rows, columns / n), written.
    """
    flat = weight.reshape(-1)
    flat_scales, flat_zeros = scales.reshape(-1), zero_points.reshape(-1)
    total = flat.size // n
    x = np.empty(n * LANES, np.float32)
    w = None if importance is None else np.empty(n * LANES, np.float32)
    table = np.zeros(_SLOTS * LANES, np.float32)
    for start in range(0, total, LANES):
        count = min(LANES, total - start)
        gather(flat, start * n, count, n, x)
        if importance is not None:
            gather(importance, start * n, count, n, w)
        _describe(x, n, table)
        _search(x, w, n, top, guesses, zero, table)
        for lane in range(LANES):
            table[_SCALE + lane] = _half(table[_BEST_SCALE + lane])
            table[_GRID_ZERO + lane] = table[_BEST_ZERO + lane]
            table[_KEPT_ERROR + lane] = _INFINITY
        _measure(x, w, n, top, table)
        _keep_better_stored(table)
        _guess(guesses, 0, top, zero, table)
        for lane in range(LANES):
            table[_SCALE + lane] = _half(_inverse(table[_INVERSE + lane]))
        _measure(x, w, n, top, table)
        _keep_better_stored(table)
        for lane in range(count):
            flat_scales[start + lane] = table[_KEPT_SCALE + lane]
            flat_zeros[start + lane] = np.uint8(table[_KEPT_ZERO + lane])


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
                code = weight[row, i] * inverse
                code = code if code > -zero else -zero
                code = code if code < top - zero else top - zero
                codes[row, i] = np.uint8(np.int32((code + MAGIC) - MAGIC + zero))


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
    guesses: tuple[float, ...] | tuple[tuple[float, float], ...],
) -> Quantized:
    """Fits the scale and zero point of every block and rounds: the `quantize` of the affine codecs.

    Args:
        codec: its name.
        weight: float32 (rows, columns).
        importance: float32 (columns,) or None.
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
    importance = None if importance is None else column_weights(importance, columns)
    scales = np.empty((rows, columns // n), np.float32)
    zero_points = np.empty((rows, columns // n), np.uint8)
    codes = np.empty((rows, columns), np.uint8)
    top, zero = np.float32(2**bits - 1), np.float32(2 ** (bits - 1)) if signed else None
    fit(weight, importance, n, top, zero, np.array(guesses, np.float32).reshape(len(guesses), -1), scales, zero_points)
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
