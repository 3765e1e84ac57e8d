"""Compiled loops of the super-block formats with a scale and a minimum per sub-block: Q2_K, Q4_K, Q5_K.

A super-block holds 256 weights in sub-blocks of n (16 or 32). Sub-block j stores two small integers, its scale code
and its min code; the super-block stores two float16 numbers, d and dmin; weight = d * scale * code - dmin * min, with
code in [0, top].

`fit` searches the scales of 64 sub-blocks at once, one per lane, so that every inner loop runs over lanes and
vectorizes without relaxed floating point: the same input gives the same bytes on every machine. All state of the
lanes lies in one flat table (slot k of lane i is table[k + i]): fixed distances tell the compiler that slots do not
overlap.
"""

import numpy as np

from phi3edge.codecs._blocks import column_weights, whole_blocks
from phi3edge.codecs._kquant_bytes import SUPER
from phi3edge.codecs._kquant_lanes import BEYOND_ROUNDING, LANES, MAGIC, gather, half, half_up, jit
from phi3edge.types import Quantized

Clips = tuple[tuple[float, float], ...]

_ZERO = np.float32(0)
_ONE = np.float32(1)
_TWO = np.float32(2)

# What is known of a sub-block's weights x with importance w.
_LOW, _HIGH, _SUM_W, _SUM_X = 0 * LANES, 1 * LANES, 2 * LANES, 3 * LANES
# Rounding in use: code = round(x * INVERSE + OFFSET); and the sums over w*code, w*code*code, w*x*code.
_INVERSE, _OFFSET, _SUM_C, _SUM_CC, _SUM_XC = 4 * LANES, 5 * LANES, 6 * LANES, 7 * LANES, 8 * LANES
# The least-squares scale and min for those codes, and how far they lower the squared error; the best so far.
_SCALE, _MIN, _GAIN = 9 * LANES, 10 * LANES, 11 * LANES
_BEST_SCALE, _BEST_MIN, _BEST_GAIN = 12 * LANES, 13 * LANES, 14 * LANES
# The stored numbers: d and dmin of the lane's super-block, its two codes, the error; the best so far.
_D, _DMIN, _S, _M, _ERROR = 15 * LANES, 16 * LANES, 17 * LANES, 18 * LANES, 19 * LANES
_BEST_D, _BEST_DMIN, _BEST_S, _BEST_M, _BEST_ERROR = 20 * LANES, 21 * LANES, 22 * LANES, 23 * LANES, 24 * LANES
_SLOTS = 25

_REFINEMENTS = 1  # how often the best guess for a sub-block is rounded and fitted again
_ROUNDS = 2  # how often codes, stored scales and super-scales are fitted to each other


@jit
def _describe(x, w, n, table):
    """LOW (at most 0), HIGH, SUM_W, SUM_X of each lane."""
    for lane in range(LANES):
        table[_LOW + lane] = _ZERO
        table[_HIGH + lane] = x[lane]
        table[_SUM_W + lane] = _ZERO
        table[_SUM_X + lane] = _ZERO
    for i in range(n):
        for lane in range(LANES):
            v = x[i * LANES + lane]
            weight = _ONE if w is None else w[i * LANES + lane]
            low, high = table[_LOW + lane], table[_HIGH + lane]
            table[_LOW + lane] = v if v < low else low
            table[_HIGH + lane] = v if v > high else high
            table[_SUM_W + lane] += weight
            table[_SUM_X + lane] += weight * v


@jit
def _accumulate(x, w, n, top, measure, table):
    """Rounds all lanes with INVERSE and OFFSET and sums what least squares needs.

    Unless `measure` is None (which compiles it away), adds the squared error with SCALE and MIN to ERROR.
    """
    for lane in range(LANES):
        table[_SUM_C + lane] = _ZERO
        table[_SUM_CC + lane] = _ZERO
        table[_SUM_XC + lane] = _ZERO
    for start in range(0, n * LANES, 8 * LANES):
        for lane in range(LANES):
            inverse, offset = table[_INVERSE + lane], table[_OFFSET + lane]
            sum_c, sum_cc, sum_xc = table[_SUM_C + lane], table[_SUM_CC + lane], table[_SUM_XC + lane]
            error = _ZERO
            for k in range(8):
                v = x[start + k * LANES + lane]
                code = v * inverse + offset
                code = code if code > _ZERO else _ZERO
                code = code if code < top else top
                code = (code + MAGIC) - MAGIC
                weighted = code if w is None else code * w[start + k * LANES + lane]
                sum_c += weighted
                sum_cc += weighted * code
                sum_xc += weighted * v
                if measure is not None:
                    residual = table[_SCALE + lane] * code - table[_MIN + lane] - v
                    square = residual * residual
                    error += square if w is None else square * w[start + k * LANES + lane]
            table[_SUM_C + lane] = sum_c
            table[_SUM_CC + lane] = sum_cc
            table[_SUM_XC + lane] = sum_xc
            if measure is not None:
                table[_ERROR + lane] += error


@jit
def _solve(table):
    """The scale and min (subtracted, never negative) that fit the codes best by least squares; GAIN: what they save."""
    for lane in range(LANES):
        sum_w, sum_x = table[_SUM_W + lane], table[_SUM_X + lane]
        sum_c, sum_cc, sum_xc = table[_SUM_C + lane], table[_SUM_CC + lane], table[_SUM_XC + lane]
        determinant = sum_w * sum_cc - sum_c * sum_c
        free = determinant > np.float32(1e-5) * sum_w * sum_cc
        scale = (sum_w * sum_xc - sum_c * sum_x) / determinant
        minimum = (sum_c * sum_xc - sum_cc * sum_x) / determinant
        free = free and minimum > _ZERO
        through_zero = sum_xc / sum_cc if sum_cc > _ZERO else _ZERO
        scale = scale if free else through_zero
        minimum = minimum if free else _ZERO
        table[_SCALE + lane] = scale
        table[_MIN + lane] = minimum
        table[_GAIN + lane] = scale * sum_xc - minimum * sum_x


@jit
def _keep_better_fit(table):
    for lane in range(LANES):
        better = table[_GAIN + lane] > table[_BEST_GAIN + lane] * BEYOND_ROUNDING
        table[_BEST_SCALE + lane] = table[_SCALE + lane] if better else table[_BEST_SCALE + lane]
        table[_BEST_MIN + lane] = table[_MIN + lane] if better else table[_BEST_MIN + lane]
        table[_BEST_GAIN + lane] = table[_GAIN + lane] if better else table[_BEST_GAIN + lane]


@jit
def _round_with(scale, minimum, table):
    """Sets INVERSE and OFFSET from the slots `scale` and `minimum`."""
    for lane in range(LANES):
        step = table[scale + lane]
        inverse = _ONE / step if step > _ZERO else _ZERO
        table[_INVERSE + lane] = inverse
        table[_OFFSET + lane] = table[minimum + lane] * inverse


@jit
def _search(x, w, n, top, clips, table):
    """BEST_SCALE and BEST_MIN of each sub-block alone, before they are quantized; `clips`: see quantize."""
    for lane in range(LANES):
        # Without any code: the mean is subtracted, or nothing.
        mean = table[_SUM_X + lane] / table[_SUM_W + lane]
        minimum = -mean if mean < _ZERO else _ZERO
        table[_BEST_SCALE + lane] = _ZERO
        table[_BEST_MIN + lane] = minimum
        table[_BEST_GAIN + lane] = minimum * -table[_SUM_X + lane]
    for k in range(clips.shape[0]):
        above, below = clips[k, 0], clips[k, 1]
        for lane in range(LANES):
            low = table[_LOW + lane]
            span = table[_HIGH + lane] - low
            inverse = (top + above + below) / span if span > _ZERO else _ZERO
            table[_INVERSE + lane] = inverse
            table[_OFFSET + lane] = -low * inverse - below
        _accumulate(x, w, n, top, None, table)
        _solve(table)
        _keep_better_fit(table)
    for _ in range(_REFINEMENTS):
        _round_with(_BEST_SCALE, _BEST_MIN, table)
        _accumulate(x, w, n, top, None, table)
        _solve(table)
        _keep_better_fit(table)


@jit
def _start_super(subs, limit, table):
    """D and DMIN so that the largest scale and min of a super-block get the code `limit`; zeros as the best so far."""
    for first in range(0, LANES, subs):
        scale = _ZERO
        minimum = _ZERO
        for lane in range(first, first + subs):
            scale = max(scale, table[_BEST_SCALE + lane])
            minimum = max(minimum, table[_BEST_MIN + lane])
        d = half_up(scale / limit)
        dmin = half_up(minimum / limit)
        for lane in range(first, first + subs):
            table[_D + lane] = d
            table[_DMIN + lane] = dmin
            table[_BEST_D + lane] = _ZERO
            table[_BEST_DMIN + lane] = _ZERO
            table[_BEST_S + lane] = _ZERO
            table[_BEST_M + lane] = _ZERO
        table[_BEST_ERROR + first] = np.float32(np.inf)


@jit
def _choose_codes(limit, table):
    """S and M of each sub-block, given D, DMIN and the codes: of three scales, each with its best min, the best."""
    for lane in range(LANES):
        sum_w, sum_x = table[_SUM_W + lane], table[_SUM_X + lane]
        sum_c, sum_cc, sum_xc = table[_SUM_C + lane], table[_SUM_CC + lane], table[_SUM_XC + lane]
        d, dmin = table[_D + lane], table[_DMIN + lane]
        per_d = _ONE / d if d > _ZERO else _ZERO
        per_dmin = _ONE / dmin if dmin > _ZERO else _ZERO
        middle = (table[_SCALE + lane] * per_d + MAGIC) - MAGIC
        best_s, best_m, best_error = _ZERO, _ZERO, np.float32(np.inf)
        for k in range(3):
            s = middle + np.float32(k - 1)
            s = s if s > _ZERO else _ZERO
            s = s if s < limit else limit
            scale = s * d
            m = (scale * sum_c - sum_x) / sum_w * per_dmin
            m = m if m > _ZERO else _ZERO
            m = m if m < limit else limit
            m = (m + MAGIC) - MAGIC
            minimum = m * dmin
            error = scale * (scale * sum_cc - _TWO * (sum_xc + minimum * sum_c)) + minimum * (
                minimum * sum_w + _TWO * sum_x
            )
            better = error < best_error
            best_s = s if better else best_s
            best_m = m if better else best_m
            best_error = error if better else best_error
        table[_S + lane] = best_s
        table[_M + lane] = best_m


@jit
def _round_stored(x, w, n, top, table):
    """Rounds with the stored scales: the sums, and the ERROR of each lane from its residuals (sums would cancel)."""
    for lane in range(LANES):
        table[_SCALE + lane] = table[_D + lane] * table[_S + lane]
        table[_MIN + lane] = table[_DMIN + lane] * table[_M + lane]
        table[_ERROR + lane] = _ZERO
    _round_with(_SCALE, _MIN, table)
    _accumulate(x, w, n, top, True, table)


@jit
def _keep_better_super(subs, table):
    for first in range(0, LANES, subs):
        error = _ZERO
        for lane in range(first, first + subs):
            error += table[_ERROR + lane]
        if error < table[_BEST_ERROR + first]:
            table[_BEST_ERROR + first] = error
            for lane in range(first, first + subs):
                table[_BEST_D + lane] = table[_D + lane]
                table[_BEST_DMIN + lane] = table[_DMIN + lane]
                table[_BEST_S + lane] = table[_S + lane]
                table[_BEST_M + lane] = table[_M + lane]


@jit
def _refit_super(subs, table):
    """D and DMIN by least squares over a super-block, given the codes of its weights, scales and mins."""
    for first in range(0, LANES, subs):
        dd = dm = mm = dx = mx = 0.0
        for lane in range(first, first + subs):
            s, m = np.float64(table[_S + lane]), np.float64(table[_M + lane])
            dd += s * s * table[_SUM_CC + lane]
            dm += s * m * table[_SUM_C + lane]
            mm += m * m * table[_SUM_W + lane]
            dx += s * table[_SUM_XC + lane]
            mx += m * table[_SUM_X + lane]
        determinant = dd * mm - dm * dm
        d = dmin = 0.0
        if determinant > 1e-9 * dd * mm:
            d = (dx * mm - dm * mx) / determinant
            dmin = (dx * dm - dd * mx) / determinant
        elif dd > 0.0:
            d = dx / dd
        if d > 0.0 and dmin >= 0.0:
            half_d, half_dmin = half(np.float32(d)), half(np.float32(dmin))
            for lane in range(first, first + subs):
                table[_D + lane] = half_d
                table[_DMIN + lane] = half_dmin


@jit
def fit(weight, importance, n, top, limit, clips, scales, mins, super_scales, super_mins):
    """The stored scales of every super-block: least (weighted) squared error.

    Args:
        weight: float32 (rows, columns), C order.
        importance: float32 (columns,), positive, or None.
        n: weights in a sub-block: 16 or 32.
        top: largest code of a weight, a float.
        limit: largest code of a scale or min, a float.
        clips: float32 (candidates, 2): see quantize.
        scales: uint8 (rows, columns / n), written.
        mins: uint8 (rows, columns / n), written.
        super_scales: float32 (rows, columns / 256), written, on float16 values.
        super_mins: float32 (rows, columns / 256), written, on float16 values.
    """
    flat = weight.reshape(-1)
    flat_scales, flat_mins = scales.reshape(-1), mins.reshape(-1)
    flat_d, flat_dmin = super_scales.reshape(-1), super_mins.reshape(-1)
    subs = SUPER // n
    total = flat.size // n
    x = np.empty(n * LANES, np.float32)
    table = np.zeros(_SLOTS * LANES, np.float32)
    w = None if importance is None else np.empty(n * LANES, np.float32)
    for start in range(0, total, LANES):
        count = min(LANES, total - start)
        gather(flat, start * n, count, n, x)
        if importance is not None:
            gather(importance, start * n, count, n, w)
        _describe(x, w, n, table)
        if importance is not None:
            for lane in range(count, LANES):
                table[_SUM_W + lane] = _ONE
        _search(x, w, n, top, clips, table)
        _start_super(subs, limit, table)
        _round_with(_BEST_SCALE, _BEST_MIN, table)
        _accumulate(x, w, n, top, None, table)
        for _ in range(_ROUNDS):
            _solve(table)
            _choose_codes(limit, table)
            _round_stored(x, w, n, top, table)
            _keep_better_super(subs, table)
            _refit_super(subs, table)
            _round_stored(x, w, n, top, table)
            _keep_better_super(subs, table)
        for lane in range(count):
            flat_scales[start + lane] = np.uint8(table[_BEST_S + lane])
            flat_mins[start + lane] = np.uint8(table[_BEST_M + lane])
        for block in range(count // subs):
            flat_d[start // subs + block] = table[_BEST_D + block * subs]
            flat_dmin[start // subs + block] = table[_BEST_DMIN + block * subs]


@jit
def round_codes(weight, scales, mins, super_scales, super_mins, n, top, codes):
    """The nearest code of every weight, given the stored scales; ties to even.

    Args:
        weight: float32 (rows, columns), C order.
        scales: uint8 (rows, columns / n).
        mins: uint8 (rows, columns / n).
        super_scales: float32 (rows, columns / 256).
        super_mins: float32 (rows, columns / 256).
        n: weights in a sub-block.
        top: largest code, a float.
        codes: uint8 (rows, columns), written.
    """
    subs = SUPER // n
    for row in range(weight.shape[0]):
        for j in range(scales.shape[1]):
            step = super_scales[row, j // subs] * np.float32(scales[row, j])
            inverse = _ONE / step if step > _ZERO else _ZERO
            offset = super_mins[row, j // subs] * np.float32(mins[row, j]) * inverse
            for i in range(j * n, j * n + n):
                code = weight[row, i] * inverse + offset
                code = code if code > _ZERO else _ZERO
                code = code if code < top else top
                codes[row, i] = np.uint8(np.int32((code + MAGIC) - MAGIC))


@jit
def _expand(codes, scales, mins, super_scales, super_mins, n, weight):
    """(d * scale) * code - dmin * min of every weight; arguments as in round_codes, `weight` written."""
    subs = SUPER // n
    for row in range(weight.shape[0]):
        for j in range(scales.shape[1]):
            step = super_scales[row, j // subs] * np.float32(scales[row, j])
            minimum = super_mins[row, j // subs] * np.float32(mins[row, j])
            for i in range(j * n, j * n + n):
                weight[row, i] = step * np.float32(codes[row, i]) - minimum


def quantize(
    codec: str, weight: np.ndarray, importance: np.ndarray | None, n: int, bits: int, scale_bits: int, clips: Clips
) -> Quantized:
    """Fits the scales of every super-block and rounds: the `quantize` of the codecs with a minimum.

    Args:
        codec: its name.
        weight: float32 (rows, columns).
        importance: float32 (columns,) or None.
        n: weights in a sub-block.
        bits: of a code.
        scale_bits: of a scale or min code.
        clips: the first guesses for a sub-block: pairs of the steps that are cut off at the top and at the bottom of
            its range (a negative number widens the range).

    Raises:
        UnsupportedError: rows that are not whole super-blocks, or an importance that does not fit them.
    """
    weight = whole_blocks(codec, weight, SUPER)
    rows, columns = weight.shape
    importance = None if importance is None else column_weights(importance, columns)
    scales = np.empty((rows, columns // n), np.uint8)
    mins = np.empty((rows, columns // n), np.uint8)
    super_scales = np.empty((rows, columns // SUPER), np.float32)
    super_mins = np.empty((rows, columns // SUPER), np.float32)
    codes = np.empty((rows, columns), np.uint8)
    top, limit = np.float32(2**bits - 1), np.float32(2**scale_bits - 1)
    guesses = np.array(clips, np.float32)
    fit(weight, importance, n, top, limit, guesses, scales, mins, super_scales, super_mins)
    round_codes(weight, scales, mins, super_scales, super_mins, n, top, codes)
    return Quantized(codec, codes, scales, mins, super_scales, super_mins)


def dequantize(q: Quantized, n: int) -> np.ndarray:
    """The `dequantize` of the codecs with a minimum: float32 (rows, columns)."""
    weight = np.empty(q.codes.shape, np.float32)
    _expand(q.codes, q.scales, q.mins, q.super_scales, q.super_mins, n, weight)
    return weight
