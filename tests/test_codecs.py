import subprocess
import sys
from types import ModuleType

import gguf
import numpy as np
import pytest
from _ggml import quantize_chunk

from phi3edge.codecs import codec, is_float
from phi3edge.errors import Phi3EdgeError
from phi3edge.registry import names
from phi3edge.types import Quantized

CODECS = names("codecs")
GRIDS = tuple(name for name in CODECS if not is_float(name))
PLAIN = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
WEIGHTED = (None, "importance")


def realistic(rows: int = 96, columns: int = 1024) -> np.ndarray:
    """Heavy-tailed rows of different size with a few outlier channels, as linears of a language model have them."""
    random = np.random.default_rng(3)
    weight = random.standard_t(5, (rows, columns)) * 0.02 * np.exp(0.4 * random.standard_normal((rows, 1)))
    weight[:, ::97] *= 6
    return weight.astype(np.float32)


def importance_of(columns: int = 1024) -> np.ndarray:
    """Mean squared activations: spread over orders of magnitude."""
    return np.exp(1.5 * np.random.default_rng(4).standard_normal(columns)).astype(np.float32)


def edge_cases() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    normal = random.standard_normal((4, 512)).astype(np.float32)
    outlier = normal * np.float32(1e-3)
    outlier[:, ::32] = 5
    half = np.zeros((4, 512), np.float32)
    half[:, 7::32] = -0.37
    return {
        "zeros": np.zeros((4, 512), np.float32),
        "constant": np.full((4, 512), 0.123, np.float32),
        "negative constant": np.full((4, 512), -0.123, np.float32),
        "negative only": -np.abs(normal) - np.float32(0.1),
        "positive only": np.abs(normal) + np.float32(0.1),
        "one weight per block": half,
        "one outlier per block": outlier,
        "tiny": normal * np.float32(1e-6),
        "below float16": normal * np.float32(1e-12),
        "below float32's normals": normal * np.float32(1e-40),
        "huge": normal * np.float32(1e4),
        "integers and ties": random.integers(-8, 9, (4, 512)).astype(np.float32),
        "halves": random.choice(np.float32([0.5, -0.5, 1.5, -1.5, 63.5, -63.5, 127, -127]), (4, 512)),
    }


def decode(module: ModuleType, packed: np.ndarray) -> np.ndarray:
    """gguf-py's reading of packed bytes."""
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(module.GGML_TYPE))


def squared_error(weight: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None) -> float:
    error = (weight.astype(np.float64) - decoded) ** 2
    return float((error if importance is None else error * importance).sum())


def assert_same(a: Quantized, b: Quantized) -> None:
    assert a.codec == b.codec
    for field in ("codes", "scales", "mins", "super_scales", "super_mins"):
        one, other = getattr(a, field), getattr(b, field)
        assert (one is None) == (other is None), field
        if one is not None:
            assert one.dtype == other.dtype, field
            np.testing.assert_array_equal(one, other, err_msg=field)


def test_the_codecs_that_recipes_need_are_there():
    wanted = "f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q3_k q4_k q5_k q6_k iq4_nl iq4_xs"
    assert set(wanted.split()) <= set(CODECS)


def test_constants_are_importable_without_numpy_and_numba():
    code = (
        "import sys; sys.modules.update(numpy=None, numba=None)\n"
        "from phi3edge.codecs import row_bytes\n"
        "from phi3edge.registry import names\n"
        "assert all(row_bytes(name, 768) > 0 for name in names('codecs'))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", CODECS)
def test_constants_are_those_of_gguf(name: str):
    module = codec(name)
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert name == module.NAME
    assert kind == module.GGML_TYPE
    assert gguf.GGML_QUANT_SIZES[kind] == (module.BLOCK_SIZE, module.BLOCK_BYTES)


@pytest.mark.parametrize("weighted", WEIGHTED)
@pytest.mark.parametrize("name", CODECS)
def test_another_decoder_reads_what_we_pack(name: str, weighted: str | None):
    module, weight = codec(name), realistic()
    q = module.quantize(weight, importance_of() if weighted else None)
    packed = module.pack(q)
    assert packed.dtype == np.uint8
    assert packed.shape == (96, 1024 // module.BLOCK_SIZE * module.BLOCK_BYTES)
    assert_same(module.unpack(packed), q)
    ours, theirs = module.dequantize(q), decode(module, packed)
    assert ours.dtype == np.float32
    # Within one rounding of a float32.
    assert np.all(ours >= np.nextafter(theirs, np.float32(-np.inf)))
    assert np.all(ours <= np.nextafter(theirs, np.float32(np.inf)))


@pytest.mark.parametrize("name", CODECS)
def test_what_ggml_packs_we_unpack_and_pack_again(name: str):
    module, weight = codec(name), realistic(8)
    packed = quantize_chunk(module, weight)
    q = module.unpack(packed)
    np.testing.assert_array_equal(module.pack(q), packed)
    np.testing.assert_allclose(module.dequantize(q), decode(module, packed), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", ["realistic", *edge_cases()])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_rounding_is_bit_identical(name: str, case: str):
    module, weight = codec(name), realistic() if case == "realistic" else edge_cases()[case]
    with np.errstate(all="ignore"):
        reference = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(module.pack(module.quantize(weight)), reference)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_rounding_is_bit_identical_at_any_size(name: str):
    random = np.random.default_rng(6)
    size = 10.0 ** random.uniform(-44, 5, (2048, 1))
    weight = (random.standard_t(3, (2048, 64)) * size).astype(np.float32)
    with np.errstate(all="ignore"):
        reference = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(codec(name).pack(codec(name).quantize(weight)), reference)


def test_bf16_is_gguf_pys_and_keeps_what_was_bf16():
    module = codec("bf16")
    random = np.random.default_rng(7)
    weight = random.integers(0, 2**32, (64, 1024), dtype=np.uint32).view(np.float32)  # NaN and infinity among them
    packed = module.pack(module.quantize(weight))
    np.testing.assert_array_equal(packed, gguf.quants.quantize(weight, gguf.GGMLQuantizationType.BF16))
    np.testing.assert_array_equal(np.isnan(module.dequantize(module.unpack(packed))), np.isnan(weight))
    exact = realistic().view(np.uint32) & np.uint32(0xFFFF0000)
    np.testing.assert_array_equal(module.dequantize(module.quantize(exact.view(np.float32))).view(np.uint32), exact)


def test_f16_rounds_as_numpy_does_and_refuses_what_it_cannot_hold():
    module, weight = codec("f16"), realistic()
    np.testing.assert_array_equal(module.dequantize(module.quantize(weight)), weight.astype(np.float16))
    weight[3, 5] = 7e4
    with pytest.raises(Phi3EdgeError, match="70000"):
        module.quantize(weight)


def test_f32_is_exact():
    module, weight = codec("f32"), realistic()
    np.testing.assert_array_equal(module.dequantize(module.unpack(module.pack(module.quantize(weight)))), weight)


@pytest.mark.parametrize("weighted", WEIGHTED)
@pytest.mark.parametrize("name", GRIDS)
def test_squared_error_is_at_most_ggmls(name: str, weighted: str | None):
    module, weight = codec(name), realistic()
    importance = importance_of() if weighted else None
    ours = squared_error(weight, decode(module, module.pack(module.quantize(weight, importance))), importance)
    theirs = squared_error(weight, decode(module, quantize_chunk(module, weight, importance)), importance)
    assert 0 < ours <= theirs


@pytest.mark.parametrize("case", edge_cases())
@pytest.mark.parametrize("name", GRIDS)
def test_edge_cases_are_finite_and_not_worse_than_ggmls(name: str, case: str):
    module, weight = codec(name), edge_cases()[case]
    for importance in (None, importance_of(512)):
        decoded = decode(module, module.pack(module.quantize(weight, importance)))
        assert np.isfinite(decoded).all()
        theirs = decode(module, quantize_chunk(module, weight, importance))
        ours_error, error = squared_error(weight, decoded, importance), squared_error(weight, theirs, importance)
        # Where codes are exact, what is left is the luck of rounding scales and minima, to 6 bits in K-quants.
        assert ours_error <= error + 2.0**-12 * squared_error(weight, 0 * weight, importance)
        if case == "zeros":
            assert not decoded.any()


@pytest.mark.parametrize("name", GRIDS)
def test_importance_moves_error_to_columns_that_matter_less(name: str):
    module, weight = codec(name), realistic()
    importance = np.ones(1024, np.float32)
    importance[::2] = 100
    plain = module.dequantize(module.quantize(weight, np.ones(1024, np.float32)))
    weighted = module.dequantize(module.quantize(weight, importance))
    assert squared_error(weight[:, ::2], weighted[:, ::2], None) < squared_error(weight[:, ::2], plain[:, ::2], None)


@pytest.mark.parametrize("name", GRIDS)
def test_only_the_ratios_of_importance_count_and_zeros_are_harmless(name: str):
    module, weight = codec(name), realistic(16)
    importance = importance_of()
    importance[:512] = 0
    decoded = module.dequantize(module.quantize(weight, importance))
    unseen = weight[:, :512]
    assert squared_error(unseen, decoded[:, :512], None) < 0.5 * squared_error(unseen, 0 * unseen, None)
    scaled = module.dequantize(module.quantize(weight, importance * np.float32(2.0**-20)))
    np.testing.assert_array_equal(scaled, decoded)


@pytest.mark.parametrize("weighted", WEIGHTED)
@pytest.mark.parametrize("name", CODECS)
def test_rows_do_not_know_each_other_and_runs_repeat(name: str, weighted: str | None):
    module, weight = codec(name), realistic(53)
    importance = importance_of() if weighted else None
    whole = module.pack(module.quantize(weight, importance))
    parts = [module.pack(module.quantize(weight[a:b], importance)) for a, b in ((0, 1), (1, 20), (20, 53))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(module.pack(module.quantize(weight, importance)), whole)


@pytest.mark.parametrize("name", CODECS)
def test_strided_rows_are_read_as_they_are(name: str):
    module, weight = codec(name), realistic(16)
    apart = np.repeat(weight, 2, axis=0)[::2]
    np.testing.assert_array_equal(module.pack(module.quantize(apart)), module.pack(module.quantize(weight)))


@pytest.mark.parametrize("name", GRIDS)
def test_what_is_not_whole_blocks_is_refused(name: str):
    module = codec(name)
    with pytest.raises(Phi3EdgeError, match=name):
        module.quantize(np.zeros((2, module.BLOCK_SIZE + 16), np.float32))
    with pytest.raises(Phi3EdgeError, match=name):
        module.unpack(np.zeros((2, module.BLOCK_BYTES + 1), np.uint8))
    with pytest.raises(Phi3EdgeError, match="importance"):
        module.quantize(np.zeros((2, module.BLOCK_SIZE), np.float32), np.ones(3, np.float32))
