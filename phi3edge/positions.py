"""Positions at which runtimes stop being the model: behind a sliding window, and where LongRoPE changes its factors.

Phi-3-mini-4k looks back 2,047 positions, which some runtimes forget; the 128k models rotate by other factors as soon as
a sequence is longer than 4,096 tokens, which some runtimes decide by the context that they were opened with.
"""

from __future__ import annotations

from phi3edge.types import ModelSpec

BAND = 16
"""Positions scored on each side of a boundary, and at the end."""


def boundaries(spec: ModelSpec) -> list[int]:
    """Numbers of tokens beyond which the model's function changes, sorted."""
    rope = spec.original_context_length if spec.original_context_length < spec.context_length else None
    return sorted({n for n in (spec.sliding_window, rope) if n is not None})


def bands(spec: ModelSpec, context: int) -> list[range]:
    """Positions to score in a sequence of `context` tokens: on both sides of each boundary within, and the last ones.

    Empty for a model without boundaries, or a context that reaches none.
    """
    within = [n for n in boundaries(spec) if n + BAND < context]
    if not within:
        return []
    found = [range(n + shift, n + shift + BAND) for n in within for shift in (-BAND, 0)]
    end = range(context - 1 - BAND, context - 1)
    return found if end[0] < found[-1][-1] else [*found, end]


def allocations(spec: ModelSpec, context: int) -> list[int]:
    """Sizes of the KV cache to open the runtime with: up to where LongRoPE changes its factors, and all of it."""
    rope = spec.original_context_length
    return [rope, context] if rope < min(spec.context_length, context) else [context]
