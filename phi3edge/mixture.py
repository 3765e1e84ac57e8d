"""Phi-3.5-MoE in torch, in float32: the reference for a family that transformers computes wrongly beyond 4,096 tokens.

A block, with LayerNorms and biases:

    x = norm(h);  q, k, v = linears(x);  h = h + attn_output(attend(q, k, v))
    x = norm(h);  h = h + sum over the two chosen experts of weight * down(silu(gate(x)) * up(x))

SparseMixer at inference: the best expert is chosen, and its weight is the softmax over those experts whose score s is
near the best one, (best - s) / max(|s|, best) <= 2 * jitter; then the same again without it. So a weight is 1 unless
another expert is within 2 %, and the two weights do not add up to 1.

Source: Microsoft's modeling_phimoe.py beside the checkpoint. transformers 5 (models/phimoe/modeling_phimoe.py) computes
the same up to the original context; its rotary embedding forgets the long factors beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, silu

from phi3edge import machine
from phi3edge.checkpoint import open_checkpoint
from phi3edge.families import parse_config
from phi3edge.forward import Decoder, Readable, Weights
from phi3edge.types import Experts, ModelSpec

Observe = Callable[[str, int | None, Tensor], None]
"""observe(role, expert, x) sees what linears read, shape (..., columns): for "attn_q", whose input k and v share,
"attn_output", "ffn_gate", whose input up shares, and "ffn_down"; the last two of each expert that a token chose."""


def _unseen(role: str, expert: int | None, x: Tensor) -> None:
    """Observes nothing."""


def sparse_mixer(scores: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """The two experts of each token and their weights.

    Args:
        scores: of the router, shape (tokens, experts).
        experts: says the jitter.

    Returns:
        Weights, and indices of the experts, both of shape (tokens, 2), the better one first.
    """
    left, weights, chosen = scores, [], []
    for _ in range(experts.used):
        best, index = left.max(-1, keepdim=True)
        far = (best - scores) / torch.maximum(scores.abs(), best) > 2 * experts.jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(-1, index))
        chosen.append(index)
        left = left.scatter(-1, index, -torch.inf)
    return torch.cat(weights, -1), torch.cat(chosen, -1)


class MixtureDecoder(Decoder):
    """What is computed between the linears of a mixture of experts with LayerNorms."""

    NORM = "layer"

    def normed(self, role: str, h: Tensor, weights: Weights) -> Tensor:
        """A norm, with its bias."""
        return self.layer_norm(h, weights[role], weights[f"{role}_bias"])

    def layer_norm(self, h: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        """LayerNorm over the last axis."""
        return layer_norm(h, gain.shape, gain, bias, self.spec.norm_eps)

    def apply(self, role: str, x: Tensor, weights: Weights) -> Tensor:
        """A linear with its bias; "attn_qkv" are three, one after the other."""
        if role == "attn_qkv":
            return torch.cat([self.apply(part, x, weights) for part in ("attn_q", "attn_k", "attn_v")], -1)
        return super().apply(role, x, weights)

    def route(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of each token's experts and which they are, from the router's scores; see `sparse_mixer`."""
        assert self.spec.experts is not None
        return sparse_mixer(scores, self.spec.experts)


class LlamaCppDecoder(MixtureDecoder):
    """The same as llama.cpp computes it, from the weights that phi3edge.centring makes for it."""

    def layer_norm(self, h: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        """RMSNorm over the last axis, with a bias."""
        return self.norm(h, gain) + bias

    def route(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The best experts, weighed by a softmax over their scores alone."""
        assert self.spec.experts is not None
        best, chosen = scores.topk(self.spec.experts.used)
        return best.softmax(-1), chosen


@dataclass(slots=True)
class Past:
    """Tokens that a model has seen. It keeps no keys: all are computed again, and rotated for the whole length."""

    ids: Tensor

    def crop(self, length: int) -> None:
        """Keep so many tokens; a negative number forgets as many at the end."""
        self.ids = self.ids[:, :length]


@dataclass(slots=True)
class Output:
    """What a call gives.

    Attributes:
        logits: shape (sequences, positions asked for, vocabulary).
        past_key_values: to go on from.
        shared: whether a weight of a token's experts is not 1 in some layer, since another expert's score is near, of
            all tokens, those of a past included; bool, shape (sequences, tokens).
    """

    logits: Tensor
    past_key_values: Past
    shared: Tensor


@dataclass
class Mixture:
    """A checkpoint as a model that is called like one of transformers.

    Attributes:
        checkpoint: an opened one, or another in its place; weights are read from it as they are used.
        spec: its model.
        keep: read each weight once only, and keep it.
        decoder: computes what is between the linears; None for what the checkpoint means.
    """

    checkpoint: Readable
    spec: ModelSpec
    keep: bool = True
    decoder: MixtureDecoder | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._decoder = self.decoder or MixtureDecoder(self.spec)
        self._names = {(t.role, t.layer, t.expert): t.name for t in self.spec.tensors}

    @property
    def config(self) -> SimpleNamespace:
        """What of the configuration those read who call models of transformers."""
        return SimpleNamespace(
            vocab_size=self.spec.vocab_size,
            max_position_embeddings=self.spec.context_length,
            original_max_position_embeddings=self.spec.original_context_length,
            sliding_window=self.spec.sliding_window,
        )

    def __call__(
        self,
        ids: Tensor,
        past_key_values: Past | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> Output:
        """Logits of whole sequences, or of those that a past is gone on with.

        Args:
            ids: token ids, int64, shape (sequences, tokens).
            past_key_values: what an earlier call returned; its tokens come first.
            use_cache: as transformers has it; the past is returned either way.
            logits_to_keep: so many last positions (0: all of `ids`), or the positions by their numbers.
        """
        new = ids.shape[1]
        if past_key_values is not None:
            ids = torch.cat([past_key_values.ids, ids], 1)
        first = ids.shape[1] - new
        h, shared = self.embed(ids), torch.zeros_like(ids, dtype=torch.bool)
        for layer in range(self.spec.layers):
            h, weights = self.block(h, layer)
            shared |= (weights < 1).any(-1).view_as(ids)
        rows = h[:, first:][:, -logits_to_keep:] if isinstance(logits_to_keep, int) else h[:, first + logits_to_keep]
        return Output(self._linear(self.last_norm(rows), "head"), Past(ids), shared)

    def last_norm(self, h: Tensor) -> Tensor:
        """What the head reads."""
        return self._decoder.layer_norm(h, self._get("output_norm"), self._get("output_norm_bias"))

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states before the first block."""
        return self._get("embedding")[ids]

    def block(self, h: Tensor, layer: int, observe: Observe = _unseen) -> tuple[Tensor, Tensor]:
        """Hidden states, and the weights of each token's experts, shape (tokens, 2)."""
        decoder = self._decoder
        x = decoder.layer_norm(h, self._get("attn_norm", layer), self._get("attn_norm_bias", layer))
        observe("attn_q", None, x)
        qkv = torch.cat([self._linear(x, role, layer) for role in ("attn_q", "attn_k", "attn_v")], -1)
        observe("attn_output", None, x := decoder.attend(qkv))
        h = h + self._linear(x, "attn_output", layer)
        x = decoder.layer_norm(h, self._get("ffn_norm", layer), self._get("ffn_norm_bias", layer))
        mixed, weights = self._experts(x.flatten(0, 1), layer, observe)
        return h + mixed.view_as(h), weights

    def _experts(self, x: Tensor, layer: int, observe: Observe) -> tuple[Tensor, Tensor]:
        """The mixture's output, shape (tokens, hidden), and weights; of an expert that nobody chose nothing is read."""
        weights, chosen = self._decoder.route(linear(x, self._get("router", layer)))
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, rank = torch.where(chosen == expert)
            observe("ffn_gate", expert, read := x[token])
            gate, up = (linear(read, self._get(role, layer, expert)) for role in ("ffn_gate", "ffn_up"))
            observe("ffn_down", expert, read := silu(gate) * up)
            mixed = linear(read, self._get("ffn_down", layer, expert))
            out.index_add_(0, token, mixed * weights[token, rank, None])
        return out, weights

    def _linear(self, x: Tensor, role: str, layer: int | None = None) -> Tensor:
        return linear(x, self._get(role, layer), self._get(f"{role}_bias", layer))

    def _get(self, role: str, layer: int | None = None, expert: int | None = None) -> Tensor:
        name = self._names[role, layer, expert]
        if name in self._kept:
            return self._kept[name]
        weight = torch.from_numpy(self.checkpoint.read(name))
        if self.keep:
            self._kept[name] = weight
        return weight


def load_mixture(path: Path) -> Mixture:
    """The model of a checkpoint's folder. Weights stay in memory if all of them fit well; it is slower if they do not.

    Raises:
        CheckpointError, UnsupportedError: see phi3edge.checkpoint and the family's file.
    """
    checkpoint = open_checkpoint(path)
    spec = parse_config(checkpoint.config, checkpoint.generation_config, checkpoint.name)
    checkpoint.check(spec)
    return Mixture(checkpoint, spec, keep=machine.holds(4 * spec.parameters))
