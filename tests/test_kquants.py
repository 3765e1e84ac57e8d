"""What is special about Q2_K .. Q6_K, beyond what test_codecs.py asks of every codec."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from _ggml import quantize_chunk

from phi3edge.codecs import codec
from phi3edge.types import Quantized

# Of each codec: range of codes, of scale codes, and weights in a sub-block.
GRIDS = {
    "q2_k": ((0, 3), (0, 15), 16),
    "q3_k": ((-4, 3), (-32, 31), 16),
    "q4_k": ((0, 15), (0, 63), 32),
    "q5_k": ((0, 31), (0, 63), 32),
    "q6_k": ((-32, 31), (-128, 127), 16),
}
every_codec = pytest.mark.parametrize("name", GRIDS)
with_and_without_importance = pytest.mark.parametrize("weighted", [False, True])


def weights(kind: str, rows: int = 64, columns: int = 768) -> np.ndarray:
    random = np.random.default_rng(11)
    weight = random.standard_normal((rows, columns)) * 0.02
    if kind == "laplace":
        weight = random.laplace(size=(rows, columns)) * 0.02
    elif kind == "heavy tails":
        weight = random.standard_t(3, (rows, columns)) * 0.01
    elif kind == "outlier channels":
        weight[:, random.integers(0, columns, 6)] *= 25
    elif kind == "sizes":  # every sub-block of another size, so that the super-scales matter
        weight *= np.exp(random.standard_normal((rows, columns // 16))).repeat(16, axis=1)
    elif kind == "shifted":
        weight += 0.02 * random.standard_normal((rows, columns // 32)).repeat(32, axis=1)
    elif kind == "bfloat16":
        weight = (weight.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return weight.astype(np.float32)


KINDS = ("normal", "laplace", "heavy tails", "outlier channels", "sizes", "shifted", "bfloat16")


def importance(columns: int) -> np.ndarray:
    return np.exp(1.5 * np.random.default_rng(12).standard_normal(columns)).astype(np.float32)


def squared_error(weight: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None) -> float:
    error = (weight.astype(np.float64) - decoded) ** 2
    return float((error if importance is None else error * importance).sum())


def grid(q: Quantized, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The step and the offset of every weight, float64 (rows, columns): weight = step * code - offset."""
    step = q.super_scales.repeat(256 // n, axis=1) * q.scales.astype(np.float64)
    offset = 0 * step if q.mins is None else q.super_mins.repeat(256 // n, axis=1) * q.mins.astype(np.float64)
    return step.repeat(n, axis=1), offset.repeat(n, axis=1)


@pytest.mark.parametrize("kind", KINDS)
@with_and_without_importance
@every_codec
def test_squared_error_is_at_most_ggmls_whatever_the_weights(name: str, weighted: bool, kind: str):
    module, weight = codec(name), weights(kind)
    columns = importance(weight.shape[1]) if weighted else None
    ours = module.dequantize(module.quantize(weight, columns))
    packed = quantize_chunk(module, weight, columns)
    theirs = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(module.GGML_TYPE))
    assert squared_error(weight, ours, columns) <= squared_error(weight, theirs, columns)


@pytest.mark.parametrize("kind", ["normal", "sizes"])
@with_and_without_importance
@every_codec
def test_fields_are_in_range_and_codes_are_the_nearest(name: str, weighted: bool, kind: str):
    (low, high), (scale_low, scale_high), n = GRIDS[name]
    module, weight = codec(name), weights(kind)
    q = module.quantize(weight, importance(weight.shape[1]) if weighted else None)
    assert low <= q.codes.min() <= q.codes.max() <= high
    assert scale_low <= q.scales.min() <= q.scales.max() <= scale_high
    assert q.codes.shape == weight.shape
    assert q.scales.shape == (weight.shape[0], weight.shape[1] // n)
    for numbers in (q.super_scales, q.super_mins):
        if numbers is not None:
            assert numbers.shape == (weight.shape[0], weight.shape[1] // 256)
            np.testing.assert_array_equal(numbers.astype(np.float16), numbers)
    step, offset = grid(q, n)
    distance = np.abs(step * q.codes - offset - weight)
    for other in range(low, high + 1):
        # What may be missing are ties, decided in float32.
        assert np.all(distance <= np.abs(step * other - offset - weight) + 1e-5 * np.abs(step))


@every_codec
def test_super_scales_are_fitted_to_the_codes(name: str):
    """Least squares over a super-block: no super-scale nearby has a smaller error by more than float16 can tell."""
    module, weight = codec(name), weights("sizes")
    q = module.quantize(weight)
    best = squared_error(weight, module.dequantize(q), None)
    for factor in (0.99, 0.997, 1.003, 1.01):
        moved = Quantized(name, q.codes, q.scales, q.mins, q.super_scales * np.float32(factor), q.super_mins)
        assert squared_error(weight, module.dequantize(moved), None) > best


@pytest.mark.parametrize("shape", [(1, 256), (3, 256), (1, 8192), (5, 1280), (9, 512)])
@every_codec
def test_any_number_of_super_blocks(name: str, shape: tuple[int, int]):
    """The search handles a few at once, the last ones may be fewer: each comes out as it does alone."""
    module, weight = codec(name), weights("heavy tails", *shape)
    whole = module.quantize(weight)
    for row in range(shape[0]):
        for block in range(shape[1] // 256):
            at = slice(256 * block, 256 * block + 256)
            alone = module.quantize(weight[row : row + 1, at])
            np.testing.assert_array_equal(alone.codes[0], whole.codes[row, at])
            assert alone.super_scales[0, 0] == whole.super_scales[row, block]


@pytest.mark.parametrize("name", ["q3_k", "q6_k"])
def test_a_peak_of_either_sign_uses_the_longer_side_of_the_range(name: str):
    """Codes reach one further below zero than above: the sign of the scale decides which weights profit."""
    (low, _), _, _ = GRIDS[name]
    module = codec(name)
    weight = np.abs(weights("heavy tails"))
    for sign in (1, -1):
        q = module.quantize(sign * weight)
        assert q.codes.min() == low
    both = module.dequantize(module.quantize(weight)), module.dequantize(module.quantize(-weight))
    np.testing.assert_array_equal(both[0], -both[1])


@pytest.mark.parametrize("name", ["q2_k", "q4_k", "q5_k"])
def test_mins_hold_weights_that_are_all_negative_or_all_positive(name: str):
    module = codec(name)
    weight = np.abs(weights("normal")) + np.float32(0.1)
    negative, positive = module.quantize(-weight), module.quantize(weight)
    # A grid that starts at the smallest weight resolves their spread; one that starts at zero, as a min is never
    # positive, resolves their size. The mean is 0.116, the spread 0.012.
    below = squared_error(-weight, module.dequantize(negative), None)
    above = squared_error(weight, module.dequantize(positive), None)
    assert below < 0.15 * squared_error(weight, np.full_like(weight, weight.mean()), None)
    assert below < above < 0.05 * squared_error(weight, 0 * weight, None)
    assert negative.super_mins.min() > 0
    assert positive.super_mins.min() >= 0


@every_codec
def test_bytes_do_not_depend_on_the_processor(name: str):
    """The loops compiled for a plain processor, without wide vectors or fused operations, give the same bytes."""
    code = (
        "import hashlib, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from test_kquants import weights\n"
        "from phi3edge.codecs import codec\n"
        "m = codec(sys.argv[1])\n"
        "print(hashlib.sha256(m.pack(m.quantize(weights('sizes')))).hexdigest())"
    )
    here = str(Path(__file__).parent)
    plain = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    run = subprocess.run(
        [sys.executable, "-c", code, name, here], env=plain, check=True, capture_output=True, text=True
    )
    module = codec(name)
    packed = module.pack(module.quantize(weights("sizes")))
    assert run.stdout.strip() == hashlib.sha256(packed).hexdigest()
