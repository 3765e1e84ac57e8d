"""A grid describes every codec's blocks: levels, steps and offsets give the weights that the codec itself decodes."""

import numpy as np
import pytest

from phi3edge.codecs import codec, codec_names, is_float
from phi3edge.codecs._grid import grid, with_levels

QUANTIZERS = [name for name in codec_names() if not is_float(name)]
COLUMNS = 512


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    rng = np.random.default_rng(7)
    return (rng.standard_normal((6, COLUMNS)) * rng.uniform(0.5, 2, (6, 1)) + 0.1).astype(np.float32)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_levels_steps_and_offsets_give_the_weights_that_the_codec_decodes(name: str, weight: np.ndarray) -> None:
    q = codec(name).quantize(weight)
    found = grid(q)
    n = COLUMNS // found.step.shape[1]
    chosen = q.codes.astype(np.int64) - found.first
    assert chosen.min() >= 0
    assert chosen.max() < len(found.levels)
    decoded = np.repeat(found.step, n, 1) * found.levels[chosen] + np.repeat(found.offset, n, 1)
    np.testing.assert_allclose(decoded, codec(name).dequantize(q), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_any_choice_of_levels_survives_the_files_bytes(name: str, weight: np.ndarray) -> None:
    q = codec(name).quantize(weight)
    found = grid(q)
    chosen = np.random.default_rng(1).integers(0, len(found.levels), q.codes.shape)
    other = with_levels(q, chosen)
    n = COLUMNS // found.step.shape[1]
    expected = np.repeat(found.step, n, 1) * found.levels[chosen] + np.repeat(found.offset, n, 1)
    decoded = codec(name).dequantize(codec(name).unpack(codec(name).pack(other)))
    np.testing.assert_allclose(decoded, expected, rtol=1e-6, atol=1e-5)
    assert other.codes.dtype == q.codes.dtype
