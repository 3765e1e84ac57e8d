"""IQ4_NL and IQ4_XS: 16 unevenly spaced values times a scale per block of 32.

The values are denser around zero, where weights are; a scale of either sign uses the longer side for either sign.
"""

import numpy as np
from numba import njit

from phi3edge.codecs._blocks import column_weights, whole_blocks
from phi3edge.codecs._bytes import get_floats, get_nibbles, put_floats, put_nibbles
from phi3edge.codecs._half import from_half, to_half
from phi3edge.codecs._lanes import BLOCK, LANES, keep_best, load, reciprocal
from phi3edge.codecs.iq4_nl import LEVELS as VALUES
from phi3edge.types import Quantized

SUPER = 8  # blocks of a super-block
_TABLE = np.array(VALUES, np.float32)
_FIRST = np.float32(VALUES[0])
_STEPS = tuple(np.float32(VALUES[k + 1] - VALUES[k]) for k in range(15))
_MIDDLES = tuple(np.float32((VALUES[k + 1] + VALUES[k]) / 2) for k in range(15))

# Where the search sends the weight of largest magnitude, and how often it then refines.
_TOPS = np.array([-155, -143, -134, -127, -117, -109, -101, 95, 101, 108, 115, 123, 132, 143], np.float32)
_ROUNDS = 2
# Codes of the largest block scale of a super-block that are tried.
_TOP_CODES = np.array([*range(-32, -17), *range(17, 32)], np.float32)
_LARGEST = np.float32(65504)  # the largest float16
_ZERO = np.float32(0)


def quantize_nl(codec: str, weight: np.ndarray, importance: np.ndarray | None) -> Quantized:
    """Codes uint8 (rows, columns) into VALUES, scales float32 (rows, columns / 32)."""
    weight = whole_blocks(codec, weight, BLOCK)
    rows, columns = weight.shape
    blocks = weight.reshape(-1, BLOCK)
    codes = np.empty(blocks.shape, np.uint8)
    scales = np.empty(len(blocks), np.float32)
    search_nl(blocks, column_weights(importance, columns).reshape(-1, BLOCK), codes, scales)
    return Quantized(codec, codes.reshape(weight.shape), scales.reshape(rows, columns // BLOCK))


def quantize_xs(codec: str, weight: np.ndarray, importance: np.ndarray | None) -> Quantized:
    """Codes as above, scales int8 (rows, columns / 32) in [-32, 31], super_scales float32 (rows, columns / 256)."""
    weight = whole_blocks(codec, weight, BLOCK * SUPER)
    rows, columns = weight.shape
    blocks = weight.reshape(-1, BLOCK)
    codes = np.empty(blocks.shape, np.uint8)
    scales = np.empty(len(blocks), np.int8)
    super_scales = np.empty(len(blocks) // SUPER, np.float32)
    search_xs(blocks, column_weights(importance, columns).reshape(-1, BLOCK), codes, scales, super_scales)
    return Quantized(
        codec,
        codes.reshape(weight.shape),
        scales.reshape(rows, columns // BLOCK),
        super_scales=super_scales.reshape(rows, columns // BLOCK // SUPER),
    )


def dequantize(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weights scale * VALUES[code], float32 (rows, columns), for float32 scales (rows, columns / 32)."""
    weight = np.empty(codes.shape, np.float32)
    looked_up(np.ascontiguousarray(codes).reshape(-1, BLOCK), scales.reshape(-1), weight.reshape(-1, BLOCK))
    return weight


def pack_xs(q: Quantized) -> np.ndarray:
    """Super-blocks as iq4_xs.py lays them out: uint8 (rows, columns / 256 * 136)."""
    assert q.scales is not None
    assert q.super_scales is not None
    rows, columns = q.codes.shape
    count = rows * (columns // BLOCK // SUPER)
    out = np.empty((count, 68), np.uint16)
    put_floats(np.ascontiguousarray(q.super_scales).reshape(count), out, 0)
    put_scales(np.ascontiguousarray(q.scales).reshape(count, SUPER), out)
    words = np.ascontiguousarray(q.codes).view(np.uint64).reshape(count, 4 * SUPER)
    for b in range(SUPER):
        put_nibbles(words[:, 4 * b : 4 * b + 4], out, 4 + 8 * b, 0)
    return out.view(np.uint8).reshape(rows, columns // 256 * 136)


def unpack_xs(codec: str, data: np.ndarray) -> Quantized:
    """The inverse of pack_xs."""
    rows = data.shape[0]
    per_row = data.shape[1] // 136
    packed = data.view(np.uint16).reshape(rows * per_row, 68)
    super_scales = np.empty(rows * per_row, np.float32)
    scales = np.empty((rows * per_row, SUPER), np.int8)
    words = np.empty((rows * per_row, 4 * SUPER), np.uint64)
    get_floats(packed, 0, super_scales)
    get_scales(packed, scales)
    for b in range(SUPER):
        get_nibbles(packed, 4 + 8 * b, words[:, 4 * b : 4 * b + 4])
    return Quantized(
        codec,
        words.view(np.uint8).reshape(rows, per_row * 256),
        scales.reshape(rows, per_row * SUPER),
        super_scales=super_scales.reshape(rows, per_row),
    )


@njit(nogil=True, cache=True)
def put_scales(scales, out):
    """Writes int8 scales (super-blocks, 8), plus 32, to words 1 to 3 of out: upper 2 bits, then lower 4 bits."""
    for s in range(scales.shape[0]):
        upper = 0
        lower = 0
        for b in range(SUPER):
            stored = int(scales[s, b]) + 32
            upper |= (stored >> 4) << (2 * b)
            lower |= (stored & 15) << (4 * b)
        out[s, 1] = np.uint16(upper)
        out[s, 2] = np.uint16(lower & 0xFFFF)
        out[s, 3] = np.uint16(lower >> 16)


@njit(nogil=True, cache=True)
def get_scales(data, scales):
    """The inverse of put_scales."""
    for s in range(scales.shape[0]):
        upper = int(data[s, 1])
        lower = int(data[s, 2]) | (int(data[s, 3]) << 16)
        for b in range(SUPER):
            scales[s, b] = np.int8((((upper >> (2 * b)) & 3) << 4 | ((lower >> (4 * b)) & 15)) - 32)


@njit(nogil=True, cache=True)
def looked_up(codes, scales, weight):
    """Writes weight = scale * VALUES[code]: uint8 (blocks, 32), float32 (blocks,), float32 (blocks, 32)."""
    for b in range(codes.shape[0]):
        for j in range(BLOCK):
            weight[b, j] = np.float32(scales[b] * _TABLE[codes[b, j] & 15])


@njit(nogil=True, cache=True, error_model="numpy")
def _nearest(t):
    """The one of VALUES nearest to t; sums of steps vectorize, a search does not."""
    value = _FIRST
    for k in range(15):
        value += _STEPS[k] if t > _MIDDLES[k] else _ZERO
    return value


@njit(nogil=True, cache=True, error_model="numpy")
def _sums(x, w, inverse, qx, qq):
    """For q the values nearest to x * inverse: qx = sum(w q x) and qq = sum(w q q) of each lane."""
    lanes = inverse.shape[0]
    qx[:] = 0
    qq[:] = 0
    for j in range(BLOCK):
        for lane in range(lanes):
            q = _nearest(np.float32(x[j, lane] * inverse[lane]))
            wq = np.float32(w[j, lane] * q)
            qx[lane] += np.float32(wq * x[j, lane])
            qq[lane] += np.float32(wq * q)


@njit(nogil=True, cache=True, error_model="numpy")
def _fit(x, w, top, inverse, qx, qq, best, scale):
    """The best scale of each lane: candidates by `top`, the weight of largest magnitude, then least squares."""
    lanes = top.shape[0]
    best[:] = 0
    scale[:] = 0
    for c in range(_TOPS.shape[0]):
        reciprocal(top, inverse)
        for lane in range(lanes):
            inverse[lane] = np.float32(_TOPS[c] * inverse[lane])
        _sums(x, w, inverse, qx, qq)
        keep_best(qx, qq, best, scale)
    for _ in range(_ROUNDS):
        reciprocal(scale, inverse)
        _sums(x, w, inverse, qx, qq)
        keep_best(qx, qq, best, scale)


@njit(nogil=True, cache=True, error_model="numpy")
def _store(x, inverse, first, count, transposed, codes):
    """Writes the codes of the values nearest to x * inverse."""
    for j in range(BLOCK):
        for lane in range(inverse.shape[0]):
            t = np.float32(x[j, lane] * inverse[lane])
            code = np.int32(0)
            for k in range(15):
                code += np.int32(1) if t > _MIDDLES[k] else np.int32(0)
            transposed[j, lane] = np.uint8(code)
    for lane in range(count):
        for j in range(BLOCK):
            codes[first + lane, j] = transposed[j, lane]


@njit(nogil=True, cache=True, error_model="numpy")
def _half(value):
    """The finite float16 nearest to value."""
    return from_half(to_half(min(max(value, -_LARGEST), _LARGEST)))


@njit(nogil=True, cache=True, error_model="numpy")
def search_nl(weight, importance, codes, scales):
    """Scales and codes that minimize sum(importance * (weight - scale * value)**2) of each block.

    Args:
        weight: float32 (blocks, 32).
        importance: float32 (blocks of a row, 32).
        codes: uint8 (blocks, 32), written.
        scales: float32 (blocks,), written, on float16 values.
    """
    x = np.empty((BLOCK, LANES), np.float32)
    w = np.empty((BLOCK, LANES), np.float32)
    transposed = np.empty((BLOCK, LANES), np.uint8)
    top = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    qx = np.empty(LANES, np.float32)
    qq = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    for first in range(0, weight.shape[0], LANES):
        count = min(LANES, weight.shape[0] - first)
        load(weight, importance, first, count, x, w, top)
        _fit(x, w, top, inverse, qx, qq, best, scale)
        for lane in range(LANES):
            scale[lane] = _half(scale[lane])
        reciprocal(scale, inverse)
        _store(x, inverse, first, count, transposed, codes)
        scales[first : first + count] = scale[:count]


@njit(nogil=True, cache=True, error_model="numpy")
def _fit_super(fits, weights, codes):
    """One scale for 8 blocks: the d, of float16, and codes l in [-32, 31] that bring d * l nearest to their fits.

    Args:
        fits: float32 (8,): the blocks' own best scales.
        weights: float32 (8,): what a squared deviation from each costs, sum(w q q).
        codes: float32 (8,), written.

    Returns:
        d.
    """
    largest = _ZERO
    for i in range(SUPER):
        largest = fits[i] if abs(fits[i]) > abs(largest) else largest
    best = np.float32(np.inf)
    chosen = _ZERO
    for c in range(_TOP_CODES.shape[0]):
        d = _half(np.float32(largest / _TOP_CODES[c]))
        inverse = np.float32(np.float32(1) / d) if d != _ZERO else _ZERO
        cost = _ZERO
        for i in range(SUPER):
            code = min(max(np.rint(np.float32(fits[i] * inverse)), np.float32(-32)), np.float32(31))
            miss = np.float32(np.float32(d * code) - fits[i])
            cost += np.float32(weights[i] * np.float32(miss * miss))
        chosen = d if cost < best else chosen
        best = min(best, cost)
    inverse = np.float32(np.float32(1) / chosen) if chosen != _ZERO else _ZERO
    for i in range(SUPER):
        codes[i] = min(max(np.rint(np.float32(fits[i] * inverse)), np.float32(-32)), np.float32(31))
    return chosen


@njit(nogil=True, cache=True, error_model="numpy")
def search_xs(weight, importance, codes, scales, super_scales):
    """As search_nl, with the scales of 8 blocks on a grid of their own.

    After the blocks' own scales come the super-blocks' scales; the codes rounded to these give new least-squares
    scales, and with them the super-blocks' scales are chosen once more.

    Args:
        weight: float32 (blocks, 32).
        importance: float32 (blocks of a row, 32).
        codes: uint8 (blocks, 32), written.
        scales: int8 (blocks,), written.
        super_scales: float32 (blocks / 8,), written, on float16 values.
    """
    x = np.empty((BLOCK, LANES), np.float32)
    w = np.empty((BLOCK, LANES), np.float32)
    transposed = np.empty((BLOCK, LANES), np.uint8)
    top = np.empty(LANES, np.float32)
    inverse = np.empty(LANES, np.float32)
    qx = np.empty(LANES, np.float32)
    qq = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    scale = np.empty(LANES, np.float32)
    scale_codes = np.empty(LANES, np.float32)
    for first in range(0, weight.shape[0], LANES):
        count = min(LANES, weight.shape[0] - first)
        load(weight, importance, first, count, x, w, top)
        _fit(x, w, top, inverse, qx, qq, best, scale)
        for _ in range(2):
            reciprocal(scale, inverse)
            _sums(x, w, inverse, qx, qq)
            for lane in range(LANES):
                scale[lane] = np.float32(qx[lane] / qq[lane]) if qq[lane] > _ZERO else _ZERO
            for lane in range(0, count, SUPER):
                blocks = slice(lane, lane + SUPER)
                d = _fit_super(scale[blocks], qq[blocks], scale_codes[blocks])
                super_scales[(first + lane) // SUPER] = d
                for i in range(lane, lane + SUPER):
                    scale[i] = np.float32(d * scale_codes[i])
        reciprocal(scale, inverse)
        _store(x, inverse, first, count, transposed, codes)
        for lane in range(count):
            scales[first + lane] = np.int8(np.int32(scale_codes[lane]))
