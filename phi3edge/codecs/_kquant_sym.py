"""Compiled loops of the super-block formats with a scale, and no minimum, per sub-block: Q3_K, Q6_K.

A super-block holds 256 weights in 16 sub-blocks of 16. Sub-block j stores a small signed integer, its scale code; the
super-block stores one float16 number d; weight = d * scale * code, with code in [-top, top - 1] and scale in
[-limit, limit - 1]. As both ranges reach further below zero, signs matter: d, a scale or both may be negative.

See _kquant_min for how the search uses lanes and a flat table.
"""

import numpy as np

from phi3edge.codecs._blocks import column_weights, whole_blocks
from phi3edge.codecs._kquant_bytes import SUPER
from phi3edge.codecs._kquant_lanes import BEYOND_ROUNDING, LANES, MAGIC, gather, half, half_up, jit
from phi3edge.types import Quantized

N = 16
"""Weights in a sub-block."""

_SUBS = SUPER // N
_ZERO = np.float32(0)
_ONE = np.float32(1)

# The weight of largest magnitude; the rounding in use, code = round(x * INVERSE); sums of w*code*code and w*x*code.
_PEAK, _INVERSE, _SUM_CC, _SUM_XC = 0 * LANES, 1 * LANES, 2 * LANES, 3 * LANES
# The best scale of a sub-block alone, and by how much it lowers the squared error.
_BEST_SCALE, _BEST_GAIN = 4 * LANES, 5 * LANES
# The stored numbers: d of the lane's super-block, the scale code, their product, the error; the best so far.
_D, _S, _SCALE, _ERROR = 6 * LANES, 7 * LANES, 8 * LANES, 9 * LANES
_BEST_D, _BEST_S, _BEST_ERROR = 10 * LANES, 11 * LANES, 12 * LANES
_SLOTS = 13

_REFINEMENTS = 1  # how often the best guess for a sub-block is rounded and fitted again
_ROUNDS = 2  # how often codes, stored scales and super-scales are fitted to each other


@jit
def _find_peak(x, table):
    for lane in range(LANES):
        table[_PEAK + lane] = x[lane]
    for i in range(1, N):
        for lane in range(LANES):
            v, peak = x[i * LANES + lane], table[_PEAK + lane]
            table[_PEAK + lane] = v if abs(v) > abs(peak) else peak


@jit
def _accumulate(x, w, top, measure, table):
    """Rounds all lanes with INVERSE and sums what least squares needs.

    Unless `measure` is None (which compiles it away), adds the squared error with SCALE to ERROR.
    """
    for lane in range(LANES):
        table[_SUM_CC + lane] = _ZERO
        table[_SUM_XC + lane] = _ZERO
    last = top - _ONE
    for start in range(0, N * LANES, 8 * LANES):
        for lane in range(LANES):
            inverse, sum_cc, sum_xc = table[_INVERSE + lane], table[_SUM_CC + lane], table[_SUM_XC + lane]
            error = _ZERO
            for k in range(8):
                v = x[start + k * LANES + lane]
                code = v * inverse
                code = code if code > -top else -top
                code = code if code < last else last
                code = (code + MAGIC) - MAGIC
                weighted = code if w is None else code * w[start + k * LANES + lane]
                sum_cc += weighted * code
                sum_xc += weighted * v
                if measure is not None:
                    residual = table[_SCALE + lane] * code - v
                    square = residual * residual
                    error += square if w is None else square * w[start + k * LANES + lane]
            table[_SUM_CC + lane] = sum_cc
            table[_SUM_XC + lane] = sum_xc
            if measure is not None:
                table[_ERROR + lane] += error


@jit
def _keep_better_fit(table):
    """The least-squares scale for the codes is SUM_XC / SUM_CC, and saves SUM_XC**2 / SUM_CC."""
    for lane in range(LANES):
        sum_cc, sum_xc = table[_SUM_CC + lane], table[_SUM_XC + lane]
        scale = sum_xc / sum_cc if sum_cc > _ZERO else _ZERO
        better = scale * sum_xc > table[_BEST_GAIN + lane] * BEYOND_ROUNDING
        table[_BEST_GAIN + lane] = scale * sum_xc if better else table[_BEST_GAIN + lane]
        table[_BEST_SCALE + lane] = scale if better else table[_BEST_SCALE + lane]


@jit
def _search(x, w, top, peaks, table):
    """BEST_SCALE of each sub-block alone, before it is quantized; `peaks`: see quantize."""
    for lane in range(LANES):
        table[_BEST_SCALE + lane] = _ZERO
        table[_BEST_GAIN + lane] = _ZERO
    for target in peaks:
        for lane in range(LANES):
            peak = table[_PEAK + lane]
            table[_INVERSE + lane] = target / peak if peak != _ZERO else _ZERO
        _accumulate(x, w, top, None, table)
        _keep_better_fit(table)
    for _ in range(_REFINEMENTS):
        _round_with_best(table)
        _accumulate(x, w, top, None, table)
        _keep_better_fit(table)


@jit
def _round_with_best(table):
    for lane in range(LANES):
        scale = table[_BEST_SCALE + lane]
        table[_INVERSE + lane] = _ONE / scale if scale != _ZERO else _ZERO


@jit
def _start_super(limit, table):
    """D so that the scale of largest magnitude gets the code -limit; zeros as the best so far."""
    for first in range(0, LANES, _SUBS):
        largest = _ZERO
        for lane in range(first, first + _SUBS):
            scale = table[_BEST_SCALE + lane]
            largest = scale if abs(scale) > abs(largest) else largest
        d = half_up(abs(largest) / limit)
        for lane in range(first, first + _SUBS):
            table[_D + lane] = -d if largest > _ZERO else d
            table[_BEST_D + lane] = _ZERO
            table[_BEST_S + lane] = _ZERO
        table[_BEST_ERROR + first] = np.float32(np.inf)


@jit
def _choose_scales(limit, table):
    """S of each sub-block, given D and the codes: the nearest to the least-squares scale."""
    last = limit - _ONE
    for lane in range(LANES):
        sum_cc, d = table[_SUM_CC + lane], table[_D + lane]
        scale = table[_SUM_XC + lane] / sum_cc if sum_cc > _ZERO else _ZERO
        s = scale / d if d != _ZERO else _ZERO
        s = s if s > -limit else -limit
        s = s if s < last else last
        table[_S + lane] = (s + MAGIC) - MAGIC


@jit
def _round_stored(x, w, top, table):
    """Rounds with the stored scales: the sums, and the ERROR of each lane from its residuals (sums would cancel)."""
    for lane in range(LANES):
        scale = table[_D + lane] * table[_S + lane]
        table[_SCALE + lane] = scale
        table[_INVERSE + lane] = _ONE / scale if scale != _ZERO else _ZERO
        table[_ERROR + lane] = _ZERO
    _accumulate(x, w, top, True, table)


@jit
def _keep_better_super(table):
    for first in range(0, LANES, _SUBS):
        error = _ZERO
        for lane in range(first, first + _SUBS):
            error += table[_ERROR + lane]
        if error < table[_BEST_ERROR + first]:
            table[_BEST_ERROR + first] = error
            for lane in range(first, first + _SUBS):
                table[_BEST_D + lane] = table[_D + lane]
                table[_BEST_S + lane] = table[_S + lane]


@jit
def _refit_super(table):
    """D by least squares over a super-block, given the codes of its weights and scales."""
    for first in range(0, LANES, _SUBS):
        dd = dx = 0.0
        for lane in range(first, first + _SUBS):
            s = np.float64(table[_S + lane])
            dd += s * s * table[_SUM_CC + lane]
            dx += s * table[_SUM_XC + lane]
        d = np.float32(dx / dd) if dd > 0.0 else _ZERO
        nearest = np.float32(np.copysign(half(abs(d)), d))
        for lane in range(first, first + _SUBS):
            table[_D + lane] = nearest


@jit
def fit(weight, importance, top, limit, peaks, scales, super_scales):
    """The stored scales of every super-block: least (weighted) squared error.

    Args:
        weight: float32 (rows, columns), C order.
        importance: float32 (columns,), positive, or None.
        top: codes are in [-top, top - 1]; a float.
        limit: scales are in [-limit, limit - 1]; a float.
        peaks: float32 (candidates,): see quantize.
        scales: int8 (rows, columns / 16), written.
        super_scales: float32 (rows, columns / 256), written, on float16 values.
    """
    flat, flat_scales, flat_d = weight.reshape(-1), scales.reshape(-1), super_scales.reshape(-1)
    total = flat.size // N
    x = np.empty(N * LANES, np.float32)
    w = None if importance is None else np.empty(N * LANES, np.float32)
    table = np.zeros(_SLOTS * LANES, np.float32)
    for start in range(0, total, LANES):
        count = min(LANES, total - start)
        gather(flat, start * N, count, N, x)
        if importance is not None:
            gather(importance, start * N, count, N, w)
        _find_peak(x, table)
        _search(x, w, top, peaks, table)
        _start_super(limit, table)
        _round_with_best(table)
        _accumulate(x, w, top, None, table)
        for _ in range(_ROUNDS):
            _choose_scales(limit, table)
            _round_stored(x, w, top, table)
            _keep_better_super(table)
            _refit_super(table)
            _round_stored(x, w, top, table)
            _keep_better_super(table)
        for lane in range(count):
            flat_scales[start + lane] = np.int8(table[_BEST_S + lane])
        for block in range(count // _SUBS):
            flat_d[start // _SUBS + block] = table[_BEST_D + block * _SUBS]


@jit
def round_codes(weight, scales, super_scales, top, codes):
    """The nearest code of every weight, given the stored scales; ties to even.

    Args:
        weight: float32 (rows, columns), C order.
        scales: int8 (rows, columns / 16).
        super_scales: float32 (rows, columns / 256).
        top: codes are in [-top, top - 1]; a float.
        codes: int8 (rows, columns), written.
    """
    last = top - _ONE
    for row in range(weight.shape[0]):
        for j in range(scales.shape[1]):
            step = super_scales[row, j // _SUBS] * np.float32(scales[row, j])
            inverse = _ONE / step if step != _ZERO else _ZERO
            for i in range(j * N, j * N + N):
                code = weight[row, i] * inverse
                code = code if code > -top else -top
                code = code if code < last else last
                codes[row, i] = np.int8(np.int32((code + MAGIC) - MAGIC))


@jit
def _expand(codes, scales, super_scales, weight):
    """(d * scale) * code of every weight; arguments as in round_codes, `weight` written."""
    for row in range(weight.shape[0]):
        for j in range(scales.shape[1]):
            step = super_scales[row, j // _SUBS] * np.float32(scales[row, j])
            for i in range(j * N, j * N + N):
                weight[row, i] = step * np.float32(codes[row, i])


def quantize(
    codec: str, weight: np.ndarray, importance: np.ndarray | None, bits: int, scale_bits: int, peaks: tuple[float, ...]
) -> Quantized:
    """Fits the scales of every super-block and rounds: the `quantize` of the codecs without a minimum.

    Args:
        codec: its name.
        weight: float32 (rows, columns).
        importance: float32 (columns,) or None.
        bits: of a code.
        scale_bits: of a scale code.
        peaks: the first guesses for a sub-block: codes, before rounding, of its weight of largest magnitude.

    Raises:
        UnsupportedError: rows that are not whole super-blocks, or an importance that does not fit them.
    """
    weight = whole_blocks(codec, weight, SUPER)
    rows, columns = weight.shape
    importance = None if importance is None else column_weights(importance, columns)
    scales = np.empty((rows, columns // N), np.int8)
    super_scales = np.empty((rows, columns // SUPER), np.float32)
    codes = np.empty((rows, columns), np.int8)
    top, limit = np.float32(2 ** (bits - 1)), np.float32(2 ** (scale_bits - 1))
    fit(weight, importance, top, limit, np.array(peaks, np.float32), scales, super_scales)
    round_codes(weight, scales, super_scales, top, codes)
    return Quantized(codec, codes, scales, super_scales=super_scales)


def dequantize(q: Quantized) -> np.ndarray:
    """The `dequantize` of the codecs without a minimum: float32 (rows, columns)."""
    weight = np.empty(q.codes.shape, np.float32)
    _expand(q.codes, q.scales, q.super_scales, weight)
    return weight
