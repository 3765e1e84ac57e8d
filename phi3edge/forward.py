"""The float model in torch, one decoder block at a time: what calibration watches and what rounding is held against.

A block is four linears with something simple between them, so that a caller may stop at each and put another weight
in its place:

    x = norm(h, attn_norm);  attn_qkv;     x = attend(.);  attn_output;  h = h + .
    x = norm(h, ffn_norm);   ffn_gate_up;  x = gate(.);    ffn_down;     h = h + .

Source: the Phi-3 modeling code of Microsoft's checkpoints; transformers computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from phi3edge.errors import UnsupportedError
from phi3edge.rotation import rotation
from phi3edge.types import ModelSpec

if TYPE_CHECKING:
    from phi3edge.centring import Centred
    from phi3edge.checkpoint import Checkpoint
    from phi3edge.rewrite import Rewritten

LINEARS = ("attn_qkv", "attn_output", "ffn_gate_up", "ffn_down")
"""The linears of a block, in the order in which they compute."""

Basis: TypeAlias = "Checkpoint | Rewritten | Centred"
"""Where weights are read: as they are, or as other numbers that compute the same."""

Weights = Mapping[str, Tensor]
"""Role to weight, float32, of one block."""


class Readable(Protocol):
    """Weights by their names in the checkpoint, float32."""

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, in its own shape."""


Observe = Callable[[str, Tensor], None]
"""observe(role, x) sees the input of each linear, shape (sequences, tokens, columns)."""


class Decoder:
    """What is computed between the linears of a model."""

    NORM = "rms"

    def __init__(self, spec: ModelSpec, device: str | torch.device = "cpu") -> None:
        """Nothing is computed yet.

        Args:
            spec: the model.
            device: where everything is computed.

        Raises:
            UnsupportedError: a family with other blocks than these.
        """
        if spec.norm != self.NORM:
            raise UnsupportedError(f"blocks of four linears are not computed for family {spec.family}")
        self.spec = spec
        self.device = torch.device(device)
        self._tables: tuple[tuple[int, int], Tensor, Tensor] | None = None

    def embed(self, rows: Tensor) -> Tensor:
        """Hidden states before the first block, from rows of the embedding."""
        return rows

    def normed(self, role: str, h: Tensor, weights: Weights) -> Tensor:
        """Hidden states through a norm of a block."""
        return self.norm(h, weights[role])

    def apply(self, role: str, x: Tensor, weights: Weights) -> Tensor:
        """A linear with its bias, if it has one: in the dtype of its weight, float32 in and out."""
        weight, bias = weights[role], weights.get(f"{role}_bias")
        return linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype)).float()

    def logits(self, x: Tensor, outer: Weights) -> Tensor:
        """What the head makes of x, shape (..., hidden), after the last norm; `outer` as `load_outside` gives it."""
        return self.apply("head", x, outer)

    def norm(self, h: Tensor, gain: Tensor) -> Tensor:
        """RMSNorm over the last axis."""
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.spec.norm_eps) * gain

    def attend(self, qkv: Tensor, layer: int = 0) -> Tensor:
        """Causal attention of whole sequences: from the fused queries, keys and values to the input of attn_output.

        Args:
            qkv: shape (sequences, tokens, (heads + 2 * KV heads) * head size), positions from 0.
            layer: index of the block, for a family whose blocks look at different positions.

        Returns:
            Shape (sequences, tokens, heads * head size).
        """
        spec = self.spec
        sequences, tokens, _ = qkv.shape
        q, k, v = self.split(qkv)
        q, k = self.rotate(q), self.rotate(k)
        k, v = (x.repeat_interleave(spec.heads // spec.kv_heads, 1) for x in (k, v))
        mixed = scaled_dot_product_attention(q, k, v, **self._mask(tokens))
        return mixed.transpose(1, 2).reshape(sequences, tokens, -1)

    def split(self, qkv: Tensor) -> list[Tensor]:
        """Queries, keys and values, each of shape (sequences, heads, tokens, head size)."""
        spec = self.spec
        parts = qkv.split([n * spec.head_dim for n in (spec.heads, spec.kv_heads, spec.kv_heads)], -1)
        return [part.view(*qkv.shape[:2], -1, spec.head_dim).transpose(1, 2) for part in parts]

    def is_long(self, tokens: int) -> bool:
        """Whether a sequence is rotated by LongRoPE's long factors."""
        return self.spec.rope.by_length and tokens > self.spec.original_context_length

    def rotate(self, x: Tensor, start: int = 0) -> Tensor:
        """Rotary embedding of the leading channels.

        Args:
            x: shape (sequences, heads, tokens, head size).
            start: position of the first token. With LongRoPE the last one decides about the factors, so what is rotated
                piece by piece may not cross the original context.
        """
        dim = self.spec.rope.dim
        cos, sin = self._angles(start, x.shape[2])
        turned, rest = x[..., :dim], x[..., dim:]
        first, second = turned.chunk(2, -1)
        swapped = torch.cat([-second, first], -1)
        return torch.cat([turned * cos + swapped * sin, rest], -1)

    def _angles(self, start: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Scaled cosines and sines of some positions, shape (tokens, rotated channels); the last ones are kept."""
        key = (start, tokens)
        if self._tables is None or self._tables[0] != key:
            cos, sin = rotation(self.spec.rope, self.is_long(start + tokens), start, start + tokens)
            self._tables = (key, cos.to(self.device), sin.to(self.device))
        return self._tables[1], self._tables[2]

    def _mask(self, tokens: int) -> dict[str, bool | Tensor]:
        window = self.spec.sliding_window
        if window is None or tokens <= window:
            return {"is_causal": True}
        positions = torch.arange(tokens, device=self.device)
        back = positions[:, None] - positions
        return {"attn_mask": (back >= 0) & (back < window)}

    def gate(self, gate_up: Tensor) -> Tensor:
        """SwiGLU: from the fused gate and up to the input of ffn_down."""
        gate, up = gate_up.chunk(2, -1)
        return silu(gate) * up

    def block(self, h: Tensor, weights: Weights, observe: Observe = lambda role, x: None, layer: int = 0) -> Tensor:
        """A whole decoder block: hidden states in and out, shape (sequences, tokens, hidden). `layer`: see `attend`."""
        observe("attn_qkv", x := self.normed("attn_norm", h, weights))
        observe("attn_output", x := self.attend(self.apply("attn_qkv", x, weights), layer))
        h = h + self.apply("attn_output", x, weights)
        observe("ffn_gate_up", x := self.normed("ffn_norm", h, weights))
        observe("ffn_down", x := self.gate(self.apply("ffn_gate_up", x, weights)))
        return h + self.apply("ffn_down", x, weights)


def load_block(checkpoint: Readable, spec: ModelSpec, layer: int, device: str | torch.device = "cpu") -> Weights:
    """All weights of one decoder block, float32; without those of experts."""
    return {t.role: _read(checkpoint, t.name, device) for t in spec.tensors if t.layer == layer and t.expert is None}


def load_outer(checkpoint: Readable, spec: ModelSpec, role: str, device: str | torch.device = "cpu") -> Tensor:
    """A weight outside the blocks, float32: "embedding", "output_norm" or "head" (a tied one is the embedding)."""
    wanted = "embedding" if role == "head" and spec.tied else role
    [name] = [t.name for t in spec.tensors if t.role == wanted]
    return _read(checkpoint, name, device)


def load_outside(checkpoint: Readable, spec: ModelSpec, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """What comes after the blocks, float32 by role: the last norm, the head, and their biases where they have some."""
    roles = ("output_norm", "head", "output_norm_bias", "head_bias")
    there = {t.role for t in spec.tensors} | {"head"}
    return {role: load_outer(checkpoint, spec, role, device) for role in roles if role in there}


def _read(checkpoint: Readable, name: str, device: str | torch.device) -> Tensor:
    return torch.from_numpy(checkpoint.read(name)).to(device)
