"""Positions at which runtimes stop being the model: where it sees less than everything, and where LongRoPE changes.

Phi-3-mini-4k looks back 2,047 positions, which some runtimes forget; Phi-3-small's sparse layers leave out blocks from
1,024 tokens on; the 128k models rotate by other factors as soon as a sequence is longer than 4,096 tokens (8,192 for
small), which some runtimes decide by the context that they were opened with.
"""

from __future__ import annotations

from dataclasses import dataclass

from phi3edge.types import ModelSpec

BAND = 16
"""Positions scored on each side of a boundary, and at the end."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The beginning of a text, of `tokens` tokens, and the bands of its positions that are scored."""

    tokens: int
    bands: tuple[range, ...]


def reach(spec: ModelSpec, context: int, heeds_window: bool) -> int:
    """Tokens of the longest sequence to score for an artifact that is for `context` tokens.

    That is its context; where it ends with a window that its runtime ignores, as much again, within the model's own:
    what it would be if it were opened with more.
    """
    window = spec.sliding_window
    if heeds_window or window is None or not window <= context <= window + BAND:
        return context
    return max(context, min(2 * window, spec.context_length))


def probes(spec: ModelSpec, context: int) -> list[Probe]:
    """Sequences to score within `context` tokens: bands on both sides of each boundary, and the last positions.

    With LongRoPE a sequence that ends where the factors change comes first: it is rotated by the short ones throughout.
    Empty for a model without boundaries, or a context that reaches none.
    """
    rope = spec.original_context_length if spec.rope.by_length else None
    sparse = spec.block_sparse.block * spec.block_sparse.local if spec.block_sparse else None
    limits = (spec.sliding_window, sparse, rope)
    boundaries = sorted({n for n in limits if n is not None and n + BAND < context})
    if not boundaries:
        return []
    bands = [range(n + shift, n + shift + BAND) for n in boundaries for shift in (-BAND, 0)]
    end = range(context - 1 - BAND, context - 1)
    if end[0] > bands[-1][-1]:
        bands.append(end)
    if rope is None or rope not in boundaries:
        return [Probe(context, tuple(bands))]
    return [
        Probe(rope, tuple(band for band in bands if band[-1] < rope)),
        Probe(context, tuple(band for band in bands if band[0] >= rope)),
    ]


def allocations(spec: ModelSpec, context: int) -> list[int]:
    """Sizes of the KV cache to open the runtime with: up to where LongRoPE changes its factors, and all of it."""
    rope = spec.original_context_length
    return [rope, context] if spec.rope.by_length and rope < context else [context]
