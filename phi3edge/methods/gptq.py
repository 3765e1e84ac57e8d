"""GPTQ: columns are rounded in turn, and those still to come make up for each column's error.

The weight W is rounded to Q so that E |(W - Q) x|^2 is small, with E x x^T = H. With U the upper Cholesky factor of
H^-1, rounding column j leaves the error (w_j - q_j) / U_jj, and subtracting its product with U_jk from every later
column k is the best that those can do about it (Frantar et al., arXiv 2210.17323, algorithm 1). Blocks of the codec
follow one another: a block's scales are fitted to its columns as they are when their turn comes.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phi3edge.codecs._grid import grid, with_levels
from phi3edge.errors import UnsupportedError
from phi3edge.types import Quantized, Statistics

DAMPING = 0.03
"""Added to H's diagonal, as a share of its mean: what other text would add to the statistics."""


def quantize(
    weight: np.ndarray, codec: ModuleType, statistics: Statistics | None = None, device: str = "cpu"
) -> Quantized:
    """Round a weight with error feedback.

    The codec's blocks are taken in the order of their inputs' energy, largest first, and so are the columns within a
    block: early errors have more columns left that make up for them. A block's scales are fitted with each column's
    error weighted by 1 / U_jj^2, which is what it costs after the later columns did what they can.

    Args:
        weight: float32, shape (rows, columns).
        codec: a module of phi3edge.codecs.
        statistics: of the linear's input, with its moments.
        device: where the feedback is computed; scales are fitted on the CPU.

    Raises:
        UnsupportedError: no moments, or moments that are not finite.
    """
    if statistics is None or statistics.moments is None:
        raise UnsupportedError("gptq needs the second moments of each linear's input", "calibrate, or use --method rtn")
    moments = torch.from_numpy(statistics.moments).to(device)
    order = column_order(moments.diagonal(), codec.BLOCK_SIZE)
    upper = inverse_factor(moments[order][:, order], DAMPING)
    rest = torch.from_numpy(weight).to(device).T[order]  # (columns, rows): what is left to round, as it stands
    blocks = []
    for start in range(0, len(rest), codec.BLOCK_SIZE):
        block = slice(start, start + codec.BLOCK_SIZE)
        within = order[block] - order[block].min()
        in_place = within.argsort()
        costs = upper.diagonal()[block][in_place].pow(-2).cpu().numpy()
        fitted = codec.quantize(rest[block][in_place].T.contiguous().cpu().numpy(), costs)
        chosen, errors = _round_block(rest[block].clone(), fitted, within, upper[block, block])
        rest[block.stop :].addmm_(upper[block, block.stop :].T, errors, alpha=-1)
        blocks.append(with_levels(fitted, chosen[in_place].T.cpu().numpy()))
    first_columns = order[:: codec.BLOCK_SIZE].div(codec.BLOCK_SIZE, rounding_mode="floor")
    return _side_by_side([blocks[i] for i in first_columns.argsort().tolist()])


def column_order(energy: Tensor, block_size: int) -> Tensor:
    """Blocks of columns by their energy, largest first, and the columns within each likewise; int64 (columns,)."""
    blocks = energy.view(-1, block_size)
    within = blocks.argsort(dim=1, descending=True, stable=True)
    order = blocks.sum(1).argsort(dim=0, descending=True, stable=True)
    return (order[:, None] * block_size + within[order]).flatten()


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with U^T U = (H + damping * mean(diag H) I)^-1; float32 (columns, columns).

    Computed in float64. A column that never fires has a damped diagonal all the same: it is rounded to nearest.

    Raises:
        UnsupportedError: H is not finite, or 0.
    """
    damped = moments.double()
    mean = damped.diagonal().mean()
    if not bool(torch.isfinite(mean)) or mean <= 0:
        raise UnsupportedError(
            f"calibration gave second moments with mean {float(mean):.3g}", "calibrate on other text"
        )
    damped.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    del damped
    return torch.linalg.cholesky(inverse, upper=True).float()


def _round_block(block: Tensor, fitted: Quantized, within: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """One codec block of columns, in the order that `within` gives their places in it.

    Returns:
        The chosen levels' indices and the errors over U_jj, both (columns, rows) in that order.
    """
    found = grid(fitted)
    size = len(block) // found.step.shape[1]
    step, offset = (torch.from_numpy(part).to(block.device).T.contiguous() for part in (found.step, found.offset))
    levels = torch.from_numpy(found.levels).to(block.device)
    middles = (levels[1:] + levels[:-1]) / 2
    inverse = torch.where(step == 0, 0, 1 / step)
    chosen, errors = torch.empty_like(block, dtype=torch.int16), torch.empty_like(block)
    for j, place in enumerate(within.tolist()):
        n = place // size
        chosen[j] = torch.bucketize((block[j] - offset[n]) * inverse[n], middles)
        rounded = step[n] * levels[chosen[j].long()] + offset[n]
        errors[j] = (block[j] - rounded) / upper[j, j]
        block[j + 1 :].addr_(upper[j, j + 1 :], errors[j], alpha=-1)
    return chosen, errors


def _side_by_side(blocks: list[Quantized]) -> Quantized:
    """Blocks of columns as one weight."""

    def joined(name: str) -> Any:
        parts = [getattr(block, name) for block in blocks]
        return None if parts[0] is None else np.concatenate(parts, axis=1)

    fields = ("codes", "scales", "mins", "super_scales", "super_mins", "zero_points")
    return Quantized(blocks[0].codec, **{name: joined(name) for name in fields})
