"""Phi-3-small in float32, as its checkpoint means it: no code of the repository, no flash-attn and no triton.

transformers has no such model, so this is what it would be: called as its models are, for logits and a KV cache.
Attention works on some hundred queries at a time, so that memory grows with the length, and not with its square.

Source: the description in Microsoft's modeling_phi3_small.py, positional_embedding.py and
triton_flash_blocksparse_attn.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from phi3edge import machine
from phi3edge.checkpoint import open_checkpoint
from phi3edge.families import parse_config
from phi3edge.forward import Decoder, Readable, Weights, load_block, load_outer
from phi3edge.types import BlockSparse, ModelSpec

QUERIES = 256
"""Whose attention is computed at once."""

KeysValues = tuple[Tensor, Tensor]
"""Keys after their rotation, and values: float32 (sequences, KV heads, tokens, head size)."""


@dataclass
class Cache:
    """Keys and values of the tokens that a model has seen, for one or more sequences of one length.

    Attributes:
        ids: the tokens, int64 (sequences, tokens): where LongRoPE's factors change, all keys are computed anew.
        is_long: whether the keys are rotated by the factors for more than the original context.
        layers: keys and values by layer; none where nothing was seen.
    """

    ids: Tensor
    is_long: bool = False
    layers: list[KeysValues] = field(default_factory=list)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens, or drop the last ones if it is negative, as transformers' caches do."""
        self.ids = self.ids[:, :length]
        self.layers = [(k[:, :, :length], v[:, :, :length]) for k, v in self.layers]


@dataclass(frozen=True, slots=True)
class Output:
    """What a call gives: logits, float32 (sequences, rows, vocabulary), and the cache, if it was asked for."""

    logits: Tensor
    past_key_values: Cache | None


class SmallDecoder(Decoder):
    """What is computed between the linears, and their biases."""

    NORM = "layer"

    def embed(self, rows: Tensor) -> Tensor:
        """Rows of the embedding, scaled."""
        return rows * self.spec.embedding_scale

    def normed(self, role: str, h: Tensor, weights: Weights) -> Tensor:
        """LayerNorm over the last axis."""
        return layer_norm(h, h.shape[-1:], weights[role], weights[f"{role}_bias"], self.spec.norm_eps)

    def logits(self, x: Tensor, outer: Weights) -> Tensor:
        """What the head makes of x, scaled; those of tokens that are never predicted are the least float."""
        logits = super().logits(x, outer) * self.spec.logit_scale
        logits[..., list(self.spec.masked_ids)] = torch.finfo(logits.dtype).min
        return logits

    def gate(self, gate_up: Tensor) -> Tensor:
        """gegelu: from the interleaved gate and up to the input of ffn_down."""
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        if (limit := self.spec.activation_limit) is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)

    def split(self, qkv: Tensor) -> list[Tensor]:
        """Queries, keys and values by head, from rows that are interleaved by KV head."""
        spec = self.spec
        group = spec.heads // spec.kv_heads
        parts = qkv.view(*qkv.shape[:2], spec.kv_heads, group + 2, spec.head_dim)
        q, k, v = parts[..., :group, :].flatten(2, 3), parts[..., group, :], parts[..., group + 1, :]
        return [part.transpose(1, 2) for part in (q, k, v)]

    def attend(self, qkv: Tensor, layer: int = 0) -> Tensor:
        """Attention of whole sequences; rows of `qkv` are interleaved by KV head."""
        return self.attend_with(qkv, layer, None)[0]

    def attend_with(self, qkv: Tensor, layer: int, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """Attention of tokens that come after others, and the keys and values of all of them."""
        spec = self.spec
        tokens = qkv.shape[1]
        group, start = spec.heads // spec.kv_heads, past[0].shape[2] if past else 0
        q, k, v = self.split(qkv)
        q, k = self.rotate(q, start), self.rotate(k, start)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
        sparse = sparse_in(spec, layer)
        positions = torch.arange(start + tokens, device=q.device)
        mixed = torch.empty_like(q)
        for first in range(0, tokens, QUERIES):
            last = min(first + QUERIES, tokens)
            mixed[:, :, first:last] = scaled_dot_product_attention(
                q[:, :, first:last],
                keys[:, :, : start + last],
                values[:, :, : start + last],
                attn_mask=visible(
                    sparse, spec.heads, positions[start + first : start + last], positions[: start + last]
                ),
                scale=spec.attention_scale,
            )
        return mixed.transpose(1, 2).flatten(2), (k, v)


def decoder_of(spec: ModelSpec, device: str | torch.device = "cpu") -> Decoder:
    """What is computed between the linears of a model, of this family or of phi3."""
    return (SmallDecoder if spec.family == "phi3small" else Decoder)(spec, device)


class Phi3Small:
    """A Phi-3-small model; see the module's docstring.

    Attributes:
        config: sizes under transformers' names.
    """

    def __init__(self, checkpoint: Readable, spec: ModelSpec, keep: bool = True) -> None:
        """Read weights.

        Args:
            checkpoint: an opened one, or another in its place.
            spec: its model.
            keep: read the blocks once only, and keep them; else each is read again whenever it is used.
        """
        self.config = SimpleNamespace(
            vocab_size=spec.vocab_size,
            max_position_embeddings=spec.context_length,
            original_max_position_embeddings=spec.original_context_length,
        )
        self._checkpoint, self._spec, self._decoder = checkpoint, spec, SmallDecoder(spec)
        self._outer = {t.role: load_outer(checkpoint, spec, t.role) for t in spec.tensors if t.layer is None}
        if spec.tied:
            self._outer["head"] = self._outer["embedding"]
        self._blocks = [load_block(checkpoint, spec, layer) for layer in range(spec.layers)] if keep else None

    def eval(self) -> Phi3Small:
        """The model itself: it has no dropout to switch off."""
        return self

    def __call__(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> Output:
        """Logits of the tokens that follow.

        Args:
            input_ids: int64 (sequences, tokens).
            past_key_values: of the tokens before them; it is changed.
            use_cache: whether to give back a cache.
            logits_to_keep: so many of the last tokens, all for 0, or the places of those that are wanted.
        """
        decoder, new = self._decoder, input_ids.shape[1]
        cache = past_key_values or Cache(input_ids[:, :0])
        ids = torch.cat([cache.ids, input_ids], 1)
        is_long = decoder.is_long(ids.shape[1])
        seen = cache.layers if is_long == cache.is_long else []
        if not seen:  # all keys are rotated anew
            input_ids = ids
        h, held = decoder.embed(self._outer["embedding"][input_ids]), []
        for layer in range(self._spec.layers):
            weights = self._blocks[layer] if self._blocks else load_block(self._checkpoint, self._spec, layer)
            past = seen[layer] if seen else None
            qkv = decoder.apply("attn_qkv", decoder.normed("attn_norm", h, weights), weights)
            mixed, kept = decoder.attend_with(qkv, layer, past)
            h = h + decoder.apply("attn_output", mixed, weights)
            gate_up = decoder.apply("ffn_gate_up", decoder.normed("ffn_norm", h, weights), weights)
            h = h + decoder.apply("ffn_down", decoder.gate(gate_up), weights)
            if use_cache:
                held.append(kept)
        if use_cache:
            cache.ids, cache.is_long, cache.layers = ids, is_long, held
        h = h[:, -new:]
        h = h[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else h[:, logits_to_keep]
        logits = decoder.logits(decoder.normed("output_norm", h, self._outer), self._outer)
        return Output(logits, cache if use_cache else None)


def sparse_in(spec: ModelSpec, layer: int) -> BlockSparse | None:
    """The pattern of a layer, or None where it sees everything."""
    return spec.block_sparse if spec.block_sparse and spec.block_sparse.is_sparse(layer) else None


def visible(sparse: BlockSparse | None, heads: int, queries: Tensor, keys: Tensor) -> Tensor:
    """Which keys queries see, by their positions in a sequence.

    Args:
        sparse: the pattern, or None for all keys up to a query.
        heads: of queries.
        queries: positions, int64 (..., queries).
        keys: likewise, (..., keys).

    Returns:
        bool (..., heads, or 1 for all; queries; keys).
    """
    queries, keys = queries[..., None, :, None], keys[..., None, None, :]
    causal = keys <= queries
    if sparse is None:
        return causal
    blocks = keys // sparse.block
    near = queries // sparse.block - blocks < sparse.local
    shifts = torch.arange(heads, device=keys.device)[:, None, None] * sparse.shift
    return causal & (near | ((blocks + shifts + 1) % sparse.stride == 0))


def load_phi3small(folder: Path) -> Phi3Small:
    """The checkpoint in a folder. Its blocks stay in memory if all of them fit well; it is slower if they do not.

    Raises:
        CheckpointError, UnsupportedError: it is damaged, or computes something else.
    """
    checkpoint = open_checkpoint(folder)
    spec = parse_config(checkpoint.config, checkpoint.generation_config, checkpoint.name)
    checkpoint.check(spec)
    keep = machine.holds(4 * spec.parameters)
    model = Phi3Small(checkpoint, spec, keep)
    if keep:
        checkpoint.close()
    return model
