"""Rounds a mixture of experts block by block, as phi3edge.calibrate does; one expert's weights in memory at a time.

q, k and v read the same, and so do an expert's gate and up: they share their moments. The router stays as it is.

An expert is calibrated on the tokens that the rounded model's router sends to it, for those it will get; each counts
by the square of its weight, which the expert's output is multiplied by (1 for nearly all). The aim is what the float
expert makes of the float model's states at the same tokens, wherever the float model's own router sends them. Where
they are fewer than TOKENS_PER_COLUMN for each column of a linear, other tokens of the layer, evenly spaced and with
weights of 1, make up for them: any may choose the expert one day, and moments of few tokens are noise.

Channels are scaled (awq) as phi3edge.scaling does it, and the block stays what it was:

    attn_norm -> q, k, v;  v's rows -> attn_output;  ffn_norm -> router, all experts' gate and up;  up's rows -> down

so gate and up of a layer have one vector of scales, searched on some rows of each and on all tokens.

For llama.cpp the weights to round are those of phi3edge.centring, and the rounded model is computed as llama.cpp does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from phi3edge.accumulate import Accumulator
from phi3edge.calibrate import BlockPath, LinearFigures, Moments, Run
from phi3edge.centring import FACTORS, Centred, mixture_decoder
from phi3edge.forward import Basis, Decoder, Weights, load_block
from phi3edge.methods import SCALED
from phi3edge.methods.awq import SAMPLED_ROWS
from phi3edge.mixture import MixtureDecoder
from phi3edge.scaling import channels, find_scale
from phi3edge.types import QuantPlan

QKV, GATE_UP = ("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up")

SAMPLED_NORMS = 16
"""Times SAMPLED_ROWS: rows of all gates and ups of a layer, evenly spaced, whose columns' norms are searched with."""

TOKENS_PER_COLUMN = 2
"""Of a small random model's experts with 256 and 512 columns, on other tokens of theirs: own tokens alone lose less
than the whole layer's from 1 to 4 a column on; own ones with others, together 2 a column, at most 3 % more than own
ones alone, and half of it or less where those are 16."""

Seen = tuple[slice, Tensor, Tensor]
"""Some tokens of a batch, numbered from its first, int64 (chosen,), and the weight of each, (chosen, 1)."""


class MixturePath(BlockPath):
    """A way of the calibration text through one block: attention as elsewhere, then the experts one by one."""

    def normed(self, batch: slice) -> Tensor:
        """What the experts read, as the norm gives it now; after input("ffn_gate_up", batch)."""
        return self._decoder.normed("ffn_norm", self._read(self._after, batch), self._weights)

    def route(self, batch: slice) -> Tensor:
        """Keep what the experts read.

        Returns:
            The weight of each expert for each token, 0 if it is not chosen; shape (tokens, experts).
        """
        x = self._keep(self.normed(batch), batch).flatten(0, 1)
        assert isinstance(self._decoder, MixtureDecoder)
        weights, chosen = self._decoder.route(linear(x, self._weights["router"]))
        return weights.new_zeros(len(x), len(self._weights["router"])).scatter(1, chosen, weights)

    def read(self, batch: slice, tokens: Tensor) -> Tensor:
        """What the experts read of some tokens, (chosen, hidden)."""
        return self._taken("router", batch).flatten(0, 1)[tokens]

    def add(self, batch: slice, tokens: Tensor, values: Tensor) -> None:
        """Add what an expert gives for some tokens, (chosen, hidden)."""
        self._after.add(batch, tokens, values)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a layer's experts need.

    Attributes:
        true: the float model's way.
        real: the rounded model's.
        true_shares: what `MixturePath.route` gave of each batch.
        real_shares: likewise.
        scale: what gate's and up's columns are multiplied by, (hidden,), or None.
        scaled: what that left of the error in its search, or None.
    """

    number: int
    true: MixturePath
    real: MixturePath
    true_shares: list[Tensor]
    real_shares: list[Tensor]
    scale: Tensor | None
    scaled: float | None


class MixtureRun(Run):
    """One rounding of a mixture of experts: what is finished of it, and its files."""

    def __init__(self, checkpoint: Basis, plan: QuantPlan, *args: Any) -> None:
        """As of `Run`."""
        super().__init__(checkpoint, plan, *args)
        self._experts = {
            (t.tensor.role, t.tensor.layer, t.tensor.expert): t for t in plan.tensors if t.tensor.expert is not None
        }
        self._factors = FACTORS if isinstance(checkpoint, Centred) else dict.fromkeys(FACTORS, 1.0)

    def _of_each_model(self, device: str) -> dict[str, Decoder]:
        spec = self._plan.model
        return {"float": MixtureDecoder(spec, device), "rounded": mixture_decoder(self._checkpoint, spec, device)}

    def _round_block(self, layer: int) -> list[LinearFigures]:
        kept, scaled = self._scaled_block(layer)
        weights = {**kept, "router": kept["router"] / self._factors["router"]}
        rounded = {**kept, **(self._written(layer, kept) if scaled else {})}
        true, real = self._path("float", layer, weights), self._path("rounded", layer, rounded)
        figures = []
        for read, roles in (("attn_qkv", QKV), ("attn_output", ("attn_output",))):
            moments = Moments(weights[roles[0]].shape[1], self._device)
            for batch in self._batches:
                moments.add(true.input(read, batch), real.input(read, batch))
            for role in roles:
                rounded[role], found = self._round(self._planned[role, layer], weights[role], moments)
                figures += [replace(row, scaled=scaled.get(role)) for row in found]
        for path in (true, real):
            for batch in self._batches:
                path.input("ffn_gate_up", batch)
        scale, left = self._scaled_experts(layer, weights, rounded, real)
        for role in (*QKV, "attn_output"):  # they have done their part
            del weights[role], rounded[role]
        true_shares, real_shares = ([path.route(batch) for batch in self._batches] for path in (true, real))
        experts = _Layer(layer, true, real, true_shares, real_shares, scale, left)
        for expert in range(len(weights["router"])):
            figures += self._round_expert(experts, expert)
        self.expert_tokens.append(torch.cat(real_shares).count_nonzero(0).tolist())
        return figures

    def _round_expert(self, layer: _Layer, expert: int) -> list[LinearFigures]:
        planned = {role: self._experts[role, layer.number, expert] for role in (*GATE_UP, "ffn_down")}
        weights = {role: torch.from_numpy(self._checkpoint.read(t.tensor.name)) for role, t in planned.items()}
        scaled = dict.fromkeys(GATE_UP, layer.scaled)
        if layer.scale is not None:
            weights |= {role: weights[role] * layer.scale for role in GATE_UP}
        if planned["ffn_up"].method in SCALED and planned["ffn_down"].method in SCALED:
            sums = Accumulator(weights["ffn_down"].shape[1], moments=True)
            for batch, tokens, share in self._seen(layer, expert, weights["ffn_down"].shape[1]):
                sums.add(share * _inner(layer.real.read(batch, tokens), weights))
            found = find_scale(self._plan.model, planned["ffn_down"], weights["ffn_down"], sums, "ffn_down")
            del sums
            scaled["ffn_down"], scale = found.error, torch.from_numpy(found.values)
            weights |= {"ffn_up": weights["ffn_up"] / scale[:, None], "ffn_down": weights["ffn_down"] * scale}
        rounded, figures = dict(weights), []
        for roles in (GATE_UP, ("ffn_down",)):
            columns = weights[roles[0]].shape[1]
            moments = Moments(columns, self._device)
            for batch, tokens, share in self._seen(layer, expert, columns):
                x, y = layer.true.read(batch, tokens), layer.real.read(batch, tokens)
                if roles != GATE_UP:
                    x, y = _inner(x, weights), _inner(y, rounded)
                moments.add(share * x, share * y)
            for role in roles:
                rounded[role], rows = self._round(planned[role], weights[role], moments)
                figures += [replace(row, scaled=scaled.get(role)) for row in rows]
        del moments
        self._add(layer.true, layer.true_shares, expert, weights, self._factors["ffn_down"])
        self._add(layer.real, layer.real_shares, expert, rounded, 1)
        return figures

    def _seen(self, layer: _Layer, expert: int, columns: int) -> Iterator[Seen]:
        """What a linear of an expert is calibrated on, by batch; see the file's head."""
        shares = [part[:, expert] for part in layer.real_shares]
        own = sum(int(share.count_nonzero()) for share in shares)
        others = sum(map(len, shares)) - own
        wanted = min(max(TOKENS_PER_COLUMN * columns - own, 0), others)
        before = 0
        for batch, share in zip(self._batches, shares, strict=True):
            number = before + (share == 0).cumsum(0)  # of the others, from 1
            before = int(number[-1])
            drawn = number * wanted // max(others, 1) > (number - 1) * wanted // max(others, 1)
            share = torch.where(share == 0, drawn.float(), share)
            [tokens] = torch.where(share > 0)
            if len(tokens):
                yield batch, tokens, share[tokens, None]

    def _add(
        self, path: MixturePath, shares: list[Tensor], expert: int, weights: Mapping[str, Tensor], factor: float
    ) -> None:
        """Add what an expert gives; its down is `factor` times the model's."""
        for batch, part in zip(self._batches, shares, strict=True):
            [tokens] = torch.where(part[:, expert] > 0)
            if len(tokens):
                given = linear(_inner(path.read(batch, tokens), weights), weights["ffn_down"])
                path.add(batch, tokens, given * (part[tokens, expert, None] / factor))

    def _scaled_block(self, layer: int) -> tuple[Weights, dict[str, float]]:
        """A block's weights but its experts', with attention's scales, and what those left of the error by role."""
        spec, planned = self._plan.model, self._block(layer)
        weights = dict(load_block(self._checkpoint, spec, layer, self._device))
        if not all(planned[role].method in SCALED for role in QKV):
            return weights, {}
        decoder, heads = self._decoders["rounded"], planned["attn_output"].method in SCALED and not self._keep_values
        read = Accumulator(spec.hidden_size, moments=True)
        mixed = Accumulator(weights["attn_output"].shape[1], moments=True)
        states = self._states(f"hidden-{layer}-rounded", spec.hidden_size)
        for batch in self._batches:
            read.add(x := decoder.normed("attn_norm", states.read(batch), weights))
            if heads:
                mixed.add(decoder.attend(decoder.apply("attn_qkv", x, weights), layer))
        found = find_scale(spec, planned["attn_q"], torch.cat([weights[role] for role in QKV]), read, "attn_q")
        _fold(weights, "attn_norm", QKV, torch.from_numpy(found.values))
        scaled = dict.fromkeys(QKV, found.error)
        if heads:
            found = find_scale(spec, planned["attn_output"], weights["attn_output"], mixed, "attn_output")
            scale, width = torch.from_numpy(found.values), weights["attn_output"].shape[1]
            _fold(weights, "attn_v", ("attn_output",), scale, scale[channels(spec, "attn_output", width)])
            scaled["attn_output"] = found.error
        return weights, scaled

    def _scaled_experts(
        self, layer: int, weights: dict[str, Tensor], rounded: dict[str, Tensor], real: MixturePath
    ) -> tuple[Tensor | None, float | None]:
        """Fold the scales of all experts' gate and up into both models' norm and router; the scales, or None."""
        spec = self._plan.model
        planned = [t for (role, n, _), t in self._experts.items() if n == layer and role in GATE_UP]
        if not all(t.method in SCALED for t in planned):
            return None, None
        sums = Accumulator(spec.hidden_size, moments=True)
        for batch in self._batches:
            sums.add(real.normed(batch))
        step = max(1, len(planned) * spec.intermediate_size // (SAMPLED_NORMS * SAMPLED_ROWS))
        rows = torch.cat([torch.from_numpy(self._checkpoint.read(t.tensor.name)[::step].copy()) for t in planned])
        found = find_scale(spec, planned[0], rows, sums, "ffn_gate")
        scale = torch.from_numpy(found.values)
        for each in (weights, rounded):
            _fold(each, "ffn_norm", ("router",), scale)
        rounded |= self._written(layer, rounded)
        return scale, found.error

    def _path(self, name: str, layer: int, weights: Weights) -> MixturePath:
        spec = self._plan.model
        before = self._states(f"hidden-{layer}-{name}", spec.hidden_size)
        after = self._new(f"hidden-{layer + 1}-{name}", spec.hidden_size)
        inner = self._new(f"hidden-inner-{name}", max(spec.heads * spec.head_dim, spec.hidden_size))
        return MixturePath(self._decoders[name], layer, weights, before, after, inner)


def _inner(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """What an expert's down reads, from what its gate and up read: (tokens, intermediate)."""
    return silu(linear(x, weights["ffn_gate"])).mul_(linear(x, weights["ffn_up"]))


def _fold(
    weights: dict[str, Tensor], before: str, readers: Iterable[str], scale: Tensor, columns: Tensor | None = None
) -> None:
    """Divide what writes some channels by their scales, its bias too, and multiply the columns that read them."""
    for role in (before, f"{before}_bias"):
        weights[role] = weights[role] / scale.view(-1, *[1] * (weights[role].ndim - 1))
    for role in readers:
        weights[role] = weights[role] * (scale if columns is None else columns)
