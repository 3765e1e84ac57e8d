"""Backward through a block of Phi-3.5-MoE, one expert at a time: how the text's probability depends on each linear.

A mixture's output is a sum of weight * expert(x), so each expert's inputs, outputs and gradients can be had by
themselves: its three weights are in memory, and nothing of the others. The weights of the sum depend on the router's
scores only where a third expert's score is near; elsewhere they are 1. Which experts are chosen has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from phi3edge.forward import Readable
from phi3edge.mixture import MixtureDecoder
from phi3edge.types import ModelSpec

Watch = Callable[[str, int | None, Tensor, Tensor, Tensor, Tensor], None]
"""watch(role, expert, weight, x, g, sequences): of one linear its weight (rows, columns), its inputs (tokens, columns),
the gradient by its outputs (tokens, rows), and the number of the sequence that each token is of."""


class Backward:
    """Blocks of a checkpoint, whose weights are read as they are used."""

    def __init__(self, checkpoint: Readable, spec: ModelSpec, decoder: MixtureDecoder) -> None:
        """Nothing is read yet.

        Args:
            checkpoint: an opened one, or what a file for llama.cpp holds of it.
            spec: its model, a mixture of experts.
            decoder: computes as whatever runs these weights.
        """
        self._checkpoint, self._spec, self._decoder = checkpoint, spec, decoder
        self._names = {(t.role, t.layer, t.expert): t.name for t in spec.tensors}

    def block(self, h: Tensor, layer: int, gradient: Tensor, watch: Watch) -> Tensor:
        """The gradient by what goes into a block.

        Args:
            h: what goes in, float32 (sequences, tokens, hidden).
            layer: index of the block.
            gradient: by what comes out, of the same shape.
            watch: sees each linear; of the experts those that a token chose.
        """
        weights = self._attention(layer)
        with torch.no_grad():
            between = torch.cat([self._attend(x[None], weights, {}) for x in h])
        gradient = self._mixture(between, layer, gradient, watch)
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        before = []
        for x, after in zip(h, gradient, strict=True):
            x = x[None].detach().requires_grad_()
            traced: dict[str, tuple[Tensor, Tensor]] = {}
            self._attend(x, weights, traced).backward(after[None])
            for role, (read, out) in traced.items():
                assert out.grad is not None
                seen.setdefault(role, []).append((read.detach()[0], out.grad[0]))
            before.append(x.grad)
        sequences = torch.arange(len(h)).repeat_interleave(h.shape[1])
        for role in list(seen):
            reads, outs = zip(*seen.pop(role), strict=True)
            watch(role, None, weights[role], torch.cat(reads), torch.cat(outs), sequences)
        return torch.cat(before)

    def _attention(self, layer: int) -> dict[str, Tensor]:
        """A block's weights by role, without its experts'."""
        return {role: self._read(role, n) for role, n, expert in self._names if n == layer and expert is None}

    def _attend(self, h: Tensor, weights: dict[str, Tensor], traced: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The first half of a block; linears' inputs and outputs are kept, and the outputs get gradients."""
        decoder = self._decoder

        def apply(role: str, x: Tensor) -> Tensor:
            y = decoder.apply(role, x, weights)
            if y.requires_grad:
                y.retain_grad()
                traced[role] = x, y
            return y

        x = decoder.normed("attn_norm", h, weights)
        qkv = torch.cat([apply(role, x) for role in ("attn_q", "attn_k", "attn_v")], -1)
        return h + apply("attn_output", decoder.attend(qkv))

    def _mixture(self, h: Tensor, layer: int, gradient: Tensor, watch: Watch) -> Tensor:
        """The gradient by what goes into the second half of a block."""
        h = h.requires_grad_()
        norms = {role: self._read(role, layer) for role in ("ffn_norm", "ffn_norm_bias")}
        x = self._decoder.normed("ffn_norm", h, norms).flatten(0, 1)
        shares, chosen = self._decoder.route(linear(x, self._read("router", layer)))
        after, by_x, by_shares = gradient.flatten(0, 1), torch.zeros_like(x), torch.zeros_like(shares)
        for expert in chosen.unique().tolist():
            token, rank = torch.where(chosen == expert)
            read = x.detach()[token].requires_grad_()
            gate_weight, up_weight = self._read("ffn_gate", layer, expert), self._read("ffn_up", layer, expert)
            gate, up = linear(read, gate_weight), linear(read, up_weight)
            mixed, down_weight = silu(gate) * up, self._read("ffn_down", layer, expert)
            out = linear(mixed, down_weight)
            for y in (gate, up, out):
                y.retain_grad()
            out.backward(after[token] * shares.detach()[token, rank, None])
            by_shares[token, rank] = (out.detach() * after[token]).sum(-1)
            assert read.grad is not None
            by_x.index_add_(0, token, read.grad)
            for role, weight, into, y in (
                ("ffn_gate", gate_weight, read, gate),
                ("ffn_up", up_weight, read, up),
                ("ffn_down", down_weight, mixed, out),
            ):
                assert y.grad is not None
                watch(role, expert, weight, into.detach(), y.grad, token // h.shape[1])
        torch.autograd.backward([x, shares], [by_x, by_shares])
        assert h.grad is not None
        return gradient + h.grad

    def _read(self, role: str, layer: int | None, expert: int | None = None) -> Tensor:
        return torch.from_numpy(self._checkpoint.read(self._names[role, layer, expert]))
