"""Channel scales of a decoder block's linears, folded into what comes before: every output stays what it was.

    attn_norm's gain -> attn_qkv;  v's rows -> attn_output;  ffn_norm's gain -> ffn_gate_up;  up's rows -> ffn_down

The left side is divided by them, the columns of the right side are multiplied. v's channels are few where query heads
share a head of keys and values: then several columns of attn_output have one scale. Biases are divided with their rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from phi3edge.accumulate import Accumulator
from phi3edge.codecs import codec
from phi3edge.errors import UnsupportedError
from phi3edge.forward import LINEARS, Decoder, Weights
from phi3edge.methods import SCALED
from phi3edge.methods.awq import Scales, search
from phi3edge.types import ModelSpec, TensorPlan

BEFORE = {
    "attn_qkv": ("attn_norm", None),
    "attn_output": ("attn_qkv", "v"),
    "ffn_gate_up": ("ffn_norm", None),
    "ffn_down": ("ffn_gate_up", "up"),
}
"""Linear to the role that writes what it reads, and the part of that if it is fused with others."""

Planned = Mapping[str, TensorPlan]
"""Role to plan, of one block."""


def find_scales(
    decoder: Decoder,
    planned: Planned,
    weights: Weights,
    hidden: Iterable[Tensor],
    keep_values: bool,
    layer: int = 0,
) -> dict[str, Scales]:
    """Search the scales of every linear of a block whose method scales, on what its float weights compute.

    Args:
        decoder: the model.
        planned: of every tensor of the block.
        weights: likewise.
        hidden: the states before the block in batches of sequences, shape (sequences, tokens, hidden).
        keep_values: True where something else was measured on the values as they are (an 8-bit KV cache).
        layer: index of the block.

    Raises:
        UnsupportedError: inputs that are not finite; names the tensor.
    """
    fixed = {"attn_output"} if keep_values else set()
    if decoder.spec.activation_limit is not None or decoder.spec.activation != "silu":
        fixed.add("ffn_down")  # up is not what its rows give: it is held within limits, or 1 is added to it
    roles = [role for role in LINEARS if _may_scale(planned, role) and role not in fixed]
    sums = {role: Accumulator(weights[role].shape[1], moments=True, device=decoder.device) for role in roles}
    for h in hidden:
        decoder.block(h, weights, lambda role, x: sums[role].add(x) if role in sums else None, layer)
    found = {}
    for role in roles:
        found[role] = find_scale(decoder.spec, planned[role], weights[role], sums.pop(role), role)
    return found


def find_scale(spec: ModelSpec, planned: TensorPlan, weight: Tensor, sums: Accumulator, role: str) -> Scales:
    """Search the scales of one linear, or of some rows of several that read the same.

    Args:
        spec: the model.
        planned: how the linear, or the first of them, is rounded.
        weight: shape (rows, columns).
        sums: over what it reads, with moments.
        role: the linear's; its columns read the channels that `channels` says.

    Raises:
        UnsupportedError: inputs that are not finite; names the tensor.
    """
    channel = channels(spec, role, weight.shape[1])
    try:
        return search(weight.cpu().numpy(), codec(planned.codec), sums.statistics(), channel, str(weight.device))
    except UnsupportedError as error:
        raise UnsupportedError(f"tensor {planned.tensor.name!r}: {error.message}", error.hint) from error


def _may_scale(planned: Planned, role: str) -> bool:
    return planned[role].method in SCALED and planned[BEFORE[role][0]].method != "imported"


def channels(spec: ModelSpec, role: str, columns: int) -> np.ndarray:
    """The channel that each column of a linear reads, int64 (columns,)."""
    if role != "attn_output":
        return np.arange(columns)
    of_heads = np.arange(spec.kv_heads * spec.head_dim).reshape(spec.kv_heads, -1)
    return of_heads.repeat(spec.heads // spec.kv_heads, axis=0).ravel()


def fold(spec: ModelSpec, planned: Planned, weights: Weights, scales: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The block's weights with the scales in them.

    Args:
        spec: the model.
        planned: of every tensor of the block.
        weights: likewise; they are left as they are.
        scales: role of a linear to float32 (channels,).
    """
    folded = dict(weights)
    for role, values in scales.items():
        scale = torch.from_numpy(values).to(weights[role].device)
        folded[role] = folded[role] * scale[channels(spec, role, weights[role].shape[1])]
        before, part = BEFORE[role]
        rows = _rows(planned[before], part)
        for written in {before, f"{before}_bias"} & set(folded):
            divided = folded[written].clone()
            divided[rows] /= scale.view(-1, *[1] * (divided.ndim - 1))
            folded[written] = divided
    return folded


def _rows(planned: TensorPlan, part: str | None) -> Tensor:
    """Rows of a part; where a fused linear is interleaved, those of v0, v1 ... are v's."""
    if part is None:
        return torch.arange(planned.tensor.shape[0])
    found = [p for p in planned.tensor.parts if p.name.rstrip("0123456789") == part]
    return torch.cat([torch.arange(p.start, p.stop) for p in found])
