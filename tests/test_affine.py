import subprocess
import sys

import _ort
import numpy as np
import pytest

from phi3edge.codecs import codec, codec_names, holds, row_bytes
from phi3edge.codecs._affine import _CLIPS, _TOPS, CODECS, AffineCodec
from phi3edge.codecs._affine_kernels import fit, round_codes
from phi3edge.codecs._blocks import column_weights
from phi3edge.errors import UnsupportedError
from phi3edge.types import Quantized

COLUMNS = 384  # three blocks of 128: an odd number, so that packed 4-bit zero points end in half a byte
EVERY = pytest.mark.parametrize("grid", CODECS.values(), ids=list(CODECS))
SIGNED = pytest.mark.parametrize("grid", [c for c in CODECS.values() if c.signed], ids=lambda c: c.NAME)
RANGED = pytest.mark.parametrize("grid", [c for c in CODECS.values() if not c.signed], ids=lambda c: c.NAME)
WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])


def realistic(rows: int = 64, columns: int = 4 * COLUMNS) -> np.ndarray:
    """Heavy-tailed rows of different size with a few outlier channels, as linears of a language model have them."""
    random = np.random.default_rng(3)
    weight = random.standard_t(5, (rows, columns)) * 0.02 * np.exp(0.4 * random.standard_normal((rows, 1)))
    weight[:, ::97] *= 6
    return weight.astype(np.float32)


def importance_of(columns: int) -> np.ndarray:
    """Mean squared activations: spread over orders of magnitude."""
    return np.exp(1.5 * np.random.default_rng(4).standard_normal(columns)).astype(np.float32)


def edge_cases() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    normal = random.standard_normal((5, COLUMNS)).astype(np.float32)
    outlier = normal * np.float32(1e-3)
    outlier[:, 5::16] = 5
    alone = np.zeros((5, COLUMNS), np.float32)
    alone[:, 7::16] = -0.37
    return {
        "zeros": np.zeros((5, COLUMNS), np.float32),
        "constant": np.full((5, COLUMNS), 0.123, np.float32),
        "negative constant": np.full((5, COLUMNS), -0.123, np.float32),
        "positive only": np.abs(normal) + np.float32(3),
        "negative only": -np.abs(normal) - np.float32(3),
        "one weight": alone,
        "one outlier": outlier,
        "small": normal * np.float32(1e-6),
        "scales below float16": normal * np.float32(1e-12),
        "below float32's normals": normal * np.float32(1e-40),
        "large": normal * np.float32(1e5),
        "integers and ties": random.integers(-8, 8, (5, COLUMNS)).astype(np.float32) / 2,
    }


def squared_errors(weight: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None, block: int) -> np.ndarray:
    """The weighted squared error of each block, float64 (blocks,)."""
    error = (weight.astype(np.float64) - decoded) ** 2 * (1.0 if importance is None else importance)
    return error.reshape(-1, block).sum(axis=1)


def weights_of_errors(weight: np.ndarray, importance: np.ndarray | None, block: int) -> np.ndarray:
    """What the search minimizes: without importance, large weights count more."""
    if importance is not None:
        return importance
    blocks = weight.astype(np.float64).reshape(-1, block)
    return (np.abs(blocks) + np.sqrt((blocks**2).mean(axis=1, keepdims=True))).reshape(weight.shape)


def plain(grid: AffineCodec, weight: np.ndarray) -> np.ndarray:
    """Min/max rounding (by magnitude if signed) with float16 scales, as text books have it; decoded."""
    blocks, top = weight.reshape(-1, grid.BLOCK_SIZE), 2**grid.bits - 1
    low, high = np.minimum(blocks.min(axis=1), 0), np.maximum(blocks.max(axis=1), 0)
    ideal = (
        np.where(high > -low, high, low) / np.float32(-(top + 1) // 2)
        if grid.signed
        else (high - low) / np.float32(top)
    )
    scale = ideal.astype(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        zero = np.full(len(blocks), (top + 1) // 2) if grid.signed else np.rint(-low / ideal)
        code = np.clip(np.rint(blocks / scale[:, None]) + zero[:, None], 0, top)
        decoded = scale[:, None] * (code - zero[:, None])
    return np.where(scale[:, None] == 0, 0, decoded).reshape(weight.shape)


def assert_same(a: Quantized, b: Quantized) -> None:
    assert a.codec == b.codec
    for field in ("codes", "scales", "zero_points"):
        one, other = getattr(a, field), getattr(b, field)
        assert (one is None) == (other is None), field
        if one is not None:
            assert one.dtype == other.dtype, field
            np.testing.assert_array_equal(one, other, err_msg=field)


def test_the_sixteen_grids_are_codecs_and_plans_need_neither_numpy_nor_numba():
    assert {f"{u}int{b}_b{n}" for u in ("", "u") for b in (4, 8) for n in (16, 32, 64, 128)} == set(CODECS)
    assert set(CODECS) <= set(codec_names())
    script = (
        "import sys; sys.modules.update(numpy=None, numba=None)\n"
        "from phi3edge.codecs import row_bytes\n"
        "assert row_bytes('uint4_b32', 96) == 48 + 6 + 2\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("int4_b32", 96, (48, 6, 0)),
        ("uint4_b32", 96, (48, 6, 2)),
        ("uint4_b16", 96, (48, 12, 3)),
        ("uint8_b32", 96, (96, 6, 3)),
        ("int8_b128", 256, (256, 4, 0)),
    ],
)
def test_bytes_of_a_row(name: str, columns: int, expected: tuple[int, int, int]):
    assert codec(name).sections(columns) == expected
    assert row_bytes(name, columns) == sum(expected)
    assert holds(name, columns)
    assert not holds(name, columns + 8)


def test_the_packed_bytes_of_a_row_by_hand():
    codes = np.arange(48, dtype=np.uint8)[None] % 16
    scales = np.float32([[1.0, -2.0, 0.5]])
    q = Quantized("uint4_b16", codes, scales, zero_points=np.uint8([[1, 2, 3]]))
    expected = "1032547698badcfe" * 3 + "003c" + "00c0" + "0038" + "2103"
    assert codec("uint4_b16").pack(q).tobytes().hex() == expected


@EVERY
@WEIGHTED
def test_onnxruntime_multiplies_with_what_we_pack(grid: AffineCodec, weighted: bool):
    weight = realistic(24, COLUMNS)
    q = grid.quantize(weight, importance_of(COLUMNS) if weighted else None)
    packed = grid.pack(q)
    assert packed.dtype == np.uint8
    assert packed.shape == (24, grid.row_bytes(COLUMNS))
    x = np.random.default_rng(6).standard_normal((3, COLUMNS)).astype(np.float32)
    expected = x.astype(np.float64) @ grid.dequantize(q).astype(np.float64).T
    size = np.abs(expected).max()
    for level in (0, 1):
        assert np.abs(_ort.matmul_nbits(grid, packed, x, level) - expected).max() < 3e-6 * size
    # Level 4 rounds activations to 8 bits: an error of about 0.4 %.
    assert np.abs(_ort.matmul_nbits(grid, packed, x, 4) - expected).max() < 0.02 * size


@EVERY
def test_onnxruntime_gathers_the_rows_that_we_pack(grid: AffineCodec):
    q = grid.quantize(realistic(24, COLUMNS))
    ids = np.array([[3, 0, 23], [7, 7, 11]])
    gathered = _ort.gather_block_quantized(grid, grid.pack(q), ids, COLUMNS)
    np.testing.assert_array_equal(gathered, grid.dequantize(q)[ids])


@EVERY
@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_unpacking_gives_back_what_was_packed(grid: AffineCodec, blocks: int):
    q = grid.quantize(realistic(7, blocks * grid.BLOCK_SIZE))
    assert q.codes.dtype == np.uint8
    assert q.codes.max() < 2**grid.bits
    assert q.scales is not None
    np.testing.assert_array_equal(q.scales.astype(np.float16), q.scales)
    assert (q.zero_points is None) == grid.signed
    assert_same(grid.unpack(grid.pack(q)), q)


@EVERY
def test_squared_error_is_well_below_onnxruntimes_own_quantizers(grid: AffineCodec):
    weight = realistic()
    ours = squared_errors(weight, grid.dequantize(grid.quantize(weight)), None, grid.BLOCK_SIZE).sum()
    theirs = squared_errors(weight, grid.dequantize(_ort.quantize(grid, weight)), None, grid.BLOCK_SIZE).sum()
    assert 0 < ours < 0.97 * theirs


@EVERY
@WEIGHTED
@pytest.mark.parametrize("case", ["realistic", *edge_cases()])
def test_no_block_is_worse_than_plain_rounding(grid: AffineCodec, weighted: bool, case: str):
    weight = realistic(64, COLUMNS) if case == "realistic" else edge_cases()[case]
    importance = importance_of(COLUMNS) if weighted else None
    decoded = grid.dequantize(grid.quantize(weight, importance))
    assert np.isfinite(decoded).all()
    counts = weights_of_errors(weight, importance, grid.BLOCK_SIZE)
    ours = squared_errors(weight, decoded, counts, grid.BLOCK_SIZE)
    theirs = squared_errors(weight, plain(grid, weight), counts, grid.BLOCK_SIZE)
    # Sums are in float32: they tell errors apart to about a millionth.
    size = squared_errors(weight, 0 * weight, counts, grid.BLOCK_SIZE)
    assert np.all(ours <= theirs * (1 + 1e-5) + 1e-12 * size)


@EVERY
def test_zeros_stay_zeros_and_constants_are_within_a_float16s_rounding(grid: AffineCodec):
    cases = edge_cases()
    assert not grid.dequantize(grid.quantize(cases["zeros"])).any()
    for name in ("constant", "negative constant"):
        decoded = grid.dequantize(grid.quantize(cases[name]))
        np.testing.assert_allclose(decoded, cases[name], rtol=2.0**-11)


@SIGNED
def test_a_signed_grid_turns_its_longer_side_to_the_larger_weight(grid: AffineCodec):
    weight = np.tile(np.float32([8, -7, 7, -6, 5, 3, -2, 1] * 2), (2, grid.BLOCK_SIZE // 16))
    weight = weight * np.float32(2.0 ** (grid.bits - 4))
    for sign in (1, -1):
        q = grid.quantize(sign * weight)
        np.testing.assert_array_equal(grid.dequantize(q), sign * weight)
        assert q.scales is not None
        assert np.all(q.scales == -sign)


@RANGED
def test_weights_on_the_grid_are_kept_whatever_the_zero_point(grid: AffineCodec):
    random, top = np.random.default_rng(8), 2**grid.bits - 1
    zero = np.linspace(0, top, 9).astype(int)[:, None]
    codes = random.integers(0, top + 1, (9, 2 * grid.BLOCK_SIZE))
    codes[:, :: grid.BLOCK_SIZE], codes[:, 1 :: grid.BLOCK_SIZE] = 0, top
    weight = (0.25 * (codes - zero)).astype(np.float32)
    q = grid.quantize(weight)
    np.testing.assert_array_equal(grid.dequantize(q), weight)
    np.testing.assert_array_equal(q.zero_points, np.tile(zero, 2))


@EVERY
def test_without_importance_large_weights_count_more_than_small_ones(grid: AffineCodec):
    weight = realistic()
    alike = np.abs(weight - grid.dequantize(grid.quantize(weight, np.ones(weight.shape[1], np.float32))))
    error = np.abs(weight - grid.dequantize(grid.quantize(weight)))
    large = np.abs(weight) > 3 * np.sqrt((weight**2).mean(axis=1, keepdims=True))
    assert (error[large] ** 2).sum() < (alike[large] ** 2).sum()


@EVERY
def test_importance_moves_error_to_columns_that_matter_less(grid: AffineCodec):
    weight = realistic()
    importance = np.ones(weight.shape[1], np.float32)
    importance[::2] = 100
    plain_error = weight - grid.dequantize(grid.quantize(weight, np.ones_like(importance)))
    error = weight - grid.dequantize(grid.quantize(weight, importance))
    assert (error[:, ::2] ** 2).sum() < (plain_error[:, ::2] ** 2).sum()
    scaled = grid.quantize(weight, importance * np.float32(2.0**-20))
    assert_same(scaled, grid.quantize(weight, importance))


@EVERY
@WEIGHTED
def test_rows_do_not_know_each_other_and_runs_repeat(grid: AffineCodec, weighted: bool):
    weight = realistic(53, COLUMNS)
    importance = importance_of(COLUMNS) if weighted else None
    whole = grid.pack(grid.quantize(weight, importance))
    parts = [grid.pack(grid.quantize(weight[a:b], importance)) for a, b in ((0, 1), (1, 20), (20, 53))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    apart = np.repeat(weight, 2, axis=0)[::2]
    np.testing.assert_array_equal(grid.pack(grid.quantize(apart, importance)), whole)


@EVERY
def test_rounding_alone_takes_the_nearest_code_of_given_scales(grid: AffineCodec):
    q = grid.quantize(realistic(8, COLUMNS))
    assert q.scales is not None
    zeros = q.zero_points
    if zeros is None:
        zeros = np.full(q.scales.shape, 2 ** (grid.bits - 1), np.uint8)
    other = realistic(16, COLUMNS)[8:]  # as GPTQ changes weights after their scales were fitted
    codes = np.empty(other.shape, np.uint8)
    round_codes(other, q.scales, zeros, grid.BLOCK_SIZE, np.float32(2**grid.bits - 1), codes)
    values = q.scales[..., None] * (np.arange(2**grid.bits, dtype=np.float32) - zeros[..., None])
    distances = np.abs(other.reshape(*q.scales.shape, -1, 1) - values[:, :, None, :])
    taken = np.take_along_axis(distances, codes.reshape(*q.scales.shape, -1, 1).astype(int), axis=-1)[..., 0]
    assert np.all(taken <= distances.min(axis=-1) + 1e-6 * np.abs(q.scales)[..., None])


@EVERY
def test_blocks_can_be_fitted_and_columns_rounded_one_by_one(grid: AffineCodec):
    n, top = grid.BLOCK_SIZE, np.float32(2**grid.bits - 1)
    weight, importance = realistic(8, 3 * grid.BLOCK_SIZE), importance_of(3 * grid.BLOCK_SIZE)
    q = grid.quantize(weight, importance)
    part = np.ascontiguousarray(weight[:, n : 2 * n])
    scales, zeros = np.empty((8, 1), np.float32), np.empty((8, 1), np.uint8)
    weights = column_weights(importance, 3 * n)
    guesses = np.array(_TOPS[grid.bits] if grid.signed else _CLIPS[grid.bits], np.float32)
    fit(part, weights[n : 2 * n], n, top, grid.signed, guesses, scales, zeros)
    assert q.scales is not None
    np.testing.assert_array_equal(scales, q.scales[:, 1:2])
    for column in range(n):
        codes = np.empty((8, 1), np.uint8)
        round_codes(np.ascontiguousarray(part[:, column : column + 1]), scales, zeros, 1, top, codes)
        np.testing.assert_array_equal(codes[:, 0], q.codes[:, n + column])


@EVERY
def test_what_is_not_whole_blocks_is_refused(grid: AffineCodec):
    with pytest.raises(UnsupportedError, match=grid.NAME):
        grid.quantize(np.zeros((2, grid.BLOCK_SIZE + 8), np.float32))
    with pytest.raises(UnsupportedError, match=grid.NAME):
        grid.quantize(np.zeros(grid.BLOCK_SIZE, np.float32))
    with pytest.raises(UnsupportedError, match="importance"):
        grid.quantize(np.zeros((2, grid.BLOCK_SIZE), np.float32), np.ones(3, np.float32))
    packed = grid.pack(grid.quantize(realistic(2, 3 * grid.BLOCK_SIZE)))
    for wrong in (packed[:, :-1], np.pad(packed, ((0, 0), (0, 1))), packed[0], packed.view(np.int8)):
        with pytest.raises(UnsupportedError, match=grid.NAME):
            grid.unpack(wrong)


@EVERY
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e7])
def test_weights_that_no_grid_holds_are_refused(grid: AffineCodec, bad: float):
    weight = realistic(3, COLUMNS)
    weight[1, 200] = bad
    with pytest.raises(UnsupportedError, match="finite"):
        grid.quantize(weight)
