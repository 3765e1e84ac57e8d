"""Cosines and sines of rotary embeddings, as the float reference and a graph's tables both have them, to the last bit.

At the 100,000th position one bit of a frequency is a hundredth of a radian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi3edge.types import Rope


def rotation(rope: Rope, is_long: bool, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Scaled cosines and sines of the positions start to stop, float32 (positions, rotated channels)."""
    factors = rope.long_factors if is_long else rope.short_factors
    scale = rope.attention_factor
    if is_long and rope.long_attention_factor is not None:
        scale = rope.long_attention_factor
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    frequencies = 1 / (rope.theta**exponents * (torch.tensor(factors) if factors else 1))
    turns = torch.outer(torch.arange(start, stop, dtype=torch.float32), frequencies).repeat(1, 2)
    return turns.cos() * scale, turns.sin() * scale
