"""Where long contexts are scored."""

from dataclasses import replace

import pytest
from _models import GROUPED, phi3_config

from phi3edge.families import parse_config
from phi3edge.positions import Probe, allocations, probes, reach
from phi3edge.types import BlockSparse


@pytest.fixture(scope="module")
def spec():
    return parse_config(phi3_config(GROUPED), None, "tiny")


def test_a_model_without_boundaries_has_no_probes(spec) -> None:
    assert probes(replace(spec, sliding_window=None), 4096) == []


def test_both_sides_of_a_sliding_window_and_the_end(spec) -> None:
    windowed = replace(spec, sliding_window=2047, context_length=4096, original_context_length=4096)
    assert probes(windowed, 4096) == [Probe(4096, (range(2031, 2047), range(2047, 2063), range(4079, 4095)))]
    assert probes(windowed, 2048) == []
    assert probes(windowed, 2070) == [Probe(2070, (range(2031, 2047), range(2047, 2063)))]
    assert allocations(windowed, 4096) == [4096]


def test_where_a_context_ends_with_a_window_that_the_runtime_ignores_more_is_scored(spec) -> None:
    windowed = replace(spec, sliding_window=2047, context_length=4096, original_context_length=4096)
    assert [reach(windowed, context, False) for context in (512, 2047, 2048, 3000)] == [512, 4094, 4094, 3000]
    assert [reach(windowed, context, True) for context in (512, 2047, 3000)] == [512, 2047, 3000]
    assert reach(replace(windowed, context_length=3000), 2047, False) == 3000
    assert reach(replace(windowed, sliding_window=None), 2047, False) == 2047


def test_both_sides_of_where_sparse_layers_leave_blocks_out(spec) -> None:
    sparse = replace(spec, sliding_window=None, block_sparse=BlockSparse(64, 16, 8, 1, 2))
    assert probes(sparse, 2048) == [Probe(2048, (range(1008, 1024), range(1024, 1040), range(2031, 2047)))]


def test_a_sequence_on_each_side_of_the_length_where_rotations_change(spec) -> None:
    rope = replace(spec.rope, short_factors=(1.0,), long_factors=(2.0,))
    long = replace(spec, sliding_window=262144, context_length=131072, original_context_length=4096, rope=rope)
    assert probes(long, 8192) == [
        Probe(4096, (range(4080, 4096),)),
        Probe(8192, (range(4096, 4112), range(8175, 8191))),
    ]
    assert allocations(long, 8192) == [4096, 8192]
    assert allocations(long, 4096) == [4096]
    assert probes(long, 4096) == []
