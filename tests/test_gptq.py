"""Error feedback against plain rounding, on every grid."""

import numpy as np
import pytest

from phi3edge.codecs import codec, codec_names, is_float
from phi3edge.errors import UnsupportedError
from phi3edge.methods import gptq, rtn
from phi3edge.types import Statistics

COLUMNS, ROWS, TOKENS = 512, 24, 2048
QUANTIZERS = [name for name in codec_names() if not is_float(name)]


def correlated(seed: int = 0) -> tuple[np.ndarray, Statistics]:
    """A weight, and statistics of inputs that share a few directions, some of them much stronger than others."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((TOKENS, 64)) @ rng.standard_normal((64, COLUMNS))
    inputs += 2 * rng.standard_normal((TOKENS, COLUMNS))
    inputs *= rng.uniform(0.3, 3, COLUMNS)
    moments = (inputs.T @ inputs / TOKENS).astype(np.float32)
    weight = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    return weight, Statistics(TOKENS, moments.diagonal().copy(), np.abs(inputs).mean(0), moments)


def output_error(weight: np.ndarray, rounded: np.ndarray, statistics: Statistics) -> float:
    """Mean square of the output's error over that of the output."""
    lost = weight - rounded
    assert statistics.moments is not None
    return float(((lost @ statistics.moments) * lost).sum() / ((weight @ statistics.moments) * weight).sum())


@pytest.mark.parametrize("name", QUANTIZERS)
def test_feedback_loses_less_of_the_output_than_weighted_rounding(name: str) -> None:
    weight, statistics = correlated()
    grid = codec(name)
    errors = [
        output_error(weight, grid.dequantize(method.quantize(weight, grid, statistics)), statistics)
        for method in (gptq, rtn)
    ]
    assert errors[0] < 0.75 * errors[1]


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "uint4_b32", "iq4_nl"])
def test_the_result_packs_and_decodes_as_it_is(name: str) -> None:
    weight, statistics = correlated(1)
    grid = codec(name)
    q = gptq.quantize(weight, grid, statistics)
    again = grid.unpack(grid.pack(q))
    np.testing.assert_array_equal(grid.dequantize(again), grid.dequantize(q))


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "uint4_b64", "iq4_nl"])
def test_inputs_that_share_nothing_leave_weighted_rounding(name: str) -> None:
    weight, statistics = correlated(2)
    grid = codec(name)
    alone = np.diag(statistics.squares + 0)
    got = gptq.quantize(weight, grid, Statistics(TOKENS, statistics.squares, None, alone))
    weights = statistics.squares + np.float32(gptq.DAMPING) * statistics.squares.mean(dtype=np.float64)
    expected = grid.quantize(weight, weights.astype(np.float32))
    # the same search with weights that differ in their last bits: a few codes may tip over
    assert np.mean(grid.dequantize(got) != grid.dequantize(expected)) < 0.02


def test_a_column_that_never_fires_is_rounded_all_the_same() -> None:
    weight, statistics = correlated(3)
    assert statistics.moments is not None
    moments = statistics.moments.copy()
    moments[:, 40], moments[40] = 0, 0
    grid = codec("q4_0")
    q = gptq.quantize(weight, grid, Statistics(TOKENS, moments.diagonal().copy(), None, moments))
    rounded = grid.dequantize(q)
    assert np.isfinite(rounded).all()
    assert np.abs(rounded[:, 40] - weight[:, 40]).max() < np.abs(weight).max() / 4


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_moments_that_say_nothing_are_refused(value: float) -> None:
    weight, statistics = correlated(4)
    bad = np.full((COLUMNS, COLUMNS), value, np.float32)
    with pytest.raises(UnsupportedError, match="second moments"):
        gptq.quantize(weight, codec("q4_0"), Statistics(TOKENS, statistics.squares, None, bad))
    with pytest.raises(UnsupportedError, match="needs the second moments"):
        gptq.quantize(weight, codec("q4_0"), Statistics(TOKENS, statistics.squares))


def test_columns_are_taken_by_energy_in_whole_blocks() -> None:
    import torch

    energy = torch.tensor([1.0, 2, 9, 8, 5, 5, 0, 3])
    assert gptq.column_order(energy, 4).tolist() == [2, 3, 1, 0, 4, 5, 7, 6]
