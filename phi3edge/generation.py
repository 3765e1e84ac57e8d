"""Text that a model writes itself: many rows at once, one token a step, sampled with a seed.

Every row is full: when a text ends, another one begins in the same row, and sees nothing of the one before. The tokens
of a beginning are forced instead of sampled, so that all rows are at the same position all the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from phi3edge.errors import UsageError
from phi3edge.forward import Decoder, Weights
from phi3edge.phi3small import decoder_of, sparse_in, visible
from phi3edge.progress import Stages, silent
from phi3edge.types import ModelSpec

if TYPE_CHECKING:
    from phi3edge.checkpoint import Checkpoint

TEMPERATURE, TOP_P = 1.0, 0.99
CANDIDATES = 512
"""Top-p is looked for among so many most likely tokens: sorting a whole vocabulary takes longer than the model."""

CPU_MEMORY = 5 * 10**9
"""Bytes that weights and KV cache may take on a CPU: what leaves a model of 4 billion weights within 6 GB."""

Beginnings = Iterator[list[int]]
"""Token ids that a text begins with, text after text; never ends."""


def generate(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    beginnings: Sequence[Beginnings],
    tokens: int,
    seed: int,
    memory: int | None = None,
    device: str | torch.device = "cpu",
    stages: Stages = silent,
) -> np.ndarray:
    """Rows of text that the model writes.

    The same arguments give the same rows on the same machine and software.

    Args:
        checkpoint: where the weights are.
        spec: the model.
        beginnings: of each row, what its texts begin with.
        tokens: length of a row.
        seed: of the sampling; each row has its own random numbers, however many are written at once.
        memory: bytes that weights and the KV cache may take; None: CPU_MEMORY, or most of what a GPU has free. If all
            weights take more than three quarters of it, they are read again for every step, one block at a time; as
            many rows are written at once as then fit.
        device: where to compute.
        stages: shows progress.

    Returns:
        Token ids, int64, shape (len(beginnings), tokens).

    Raises:
        UsageError: rows beyond the original context of a model with LongRoPE, where all keys would be rotated anew.
    """
    decoder, dtype = decoder_of(spec, device), fast_dtype(device)
    if decoder.is_long(tokens):
        raise UsageError(
            f"rows of {tokens} tokens; {spec.name} writes them within its original context of "
            f"{spec.original_context_length}"
        )
    if memory is None:
        memory = torch.cuda.mem_get_info(device)[0] * 3 // 4 if decoder.device.type == "cuda" else CPU_MEMORY
    sizes = fit(spec, len(beginnings), tokens, dtype.itemsize, memory)
    read = partial(load, checkpoint, spec, dtype=dtype, device=decoder.device)
    outer = read(None)
    kept = [read(n) for n in range(spec.layers)] if sizes.keep else None
    uniform = np.random.default_rng(seed).random((len(beginnings), tokens), np.float32)
    ids = np.empty(uniform.shape, np.int64)
    with torch.inference_mode(), stages("write calibration text", tokens * len(beginnings)) as advance:
        for start in range(0, len(beginnings), sizes.rows):
            wave = slice(start, min(start + sizes.rows, len(beginnings)))
            writer = _Writer(ids[wave], beginnings[wave], spec.eos_token_ids)
            cache = Cache(decoder, len(writer.ids), tokens, dtype)
            writer.add(0, np.zeros(len(writer.ids), np.int64))  # all are forced
            for position in range(tokens - 1):
                begins = torch.from_numpy(writer.begins).to(device)
                h = embedding(torch.from_numpy(writer.ids[:, position]).to(device), outer["embedding"]).float()
                h = decoder.embed(h)
                for layer in range(spec.layers):
                    h = step(cache, h, layer, kept[layer] if kept else read(layer), position, begins)
                logits = decoder.logits(decoder.normed("output_norm", h, outer), outer)
                chosen = choose(logits, torch.from_numpy(uniform[wave, position]).to(device))
                writer.add(position + 1, chosen.cpu().numpy())
                advance(len(writer.ids))
            advance(len(writer.ids))
    return ids


class _Writer:
    """Rows as they grow: which token comes next, and where the text that it belongs to begins."""

    def __init__(self, ids: np.ndarray, beginnings: Sequence[Beginnings], eos: tuple[int, ...]) -> None:
        self.ids, self.begins = ids, np.zeros(len(ids), np.int64)
        self._beginnings, self._eos = beginnings, eos
        self._forced: list[list[int]] = [[] for _ in ids]
        self._ended = [True] * len(ids)

    def add(self, position: int, sampled: np.ndarray) -> None:
        """Put a token into every row: what is left of its beginning, else the sampled one."""
        for row, beginning in enumerate(self._beginnings):
            if self._ended[row]:
                self._forced[row], self.begins[row] = list(next(beginning)), position
            forced = self._forced[row]
            self._ended[row] = not forced and int(sampled[row]) in self._eos
            self.ids[row, position] = forced.pop(0) if forced else sampled[row]


@dataclass(frozen=True, slots=True)
class Fit:
    """What fits into memory: all weights or one block at a time, and so many rows at once."""

    keep: bool
    rows: int


def fit(spec: ModelSpec, rows: int, tokens: int, itemsize: int, memory: int) -> Fit:
    """Divide memory between weights and the KV cache.

    Args:
        spec: the model.
        rows: how many are wanted.
        tokens: length of a row.
        itemsize: bytes of a weight, and of a number of the cache.
        memory: bytes.
    """
    outer = sum(t.size for t in spec.tensors if t.layer is None)
    block = sum(t.size for t in spec.tensors if t.layer == 0)
    everything = itemsize * (outer + spec.layers * block)
    keep = everything <= memory * 3 // 4
    weights = (
        everything if keep else itemsize * (outer + 2 * block)
    )  # a block is read while the last one still is there
    row = itemsize * spec.layers * 2 * spec.kv_heads * spec.head_dim * tokens
    at_once = max(1, (memory - weights) // row)
    waves = -(-rows // at_once)
    return Fit(keep, -(-rows // waves))


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16, what models are published in, where hardware computes in it or converts it at speed; else float32."""
    wide = torch.device(device).type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if wide else torch.float32


def load(
    checkpoint: Checkpoint, spec: ModelSpec, layer: int | None, dtype: torch.dtype, device: torch.device
) -> Weights:
    """Weights of a block, or of what is outside the blocks, by role: matrices in `dtype`, norms and biases in float32.

    A tied model's head is its embedding.
    """
    found = {}
    for tensor in spec.tensors:
        if tensor.layer == layer:
            matrix = len(tensor.shape) == 2
            # bfloat16 as it is stored, without the way by float32
            if matrix and dtype is torch.bfloat16 and tensor.grid is None and checkpoint.info(tensor.name)[0] == "BF16":
                weight = torch.from_numpy(checkpoint.raw(tensor.name, 0, tensor.shape[0])).view(torch.bfloat16)
            else:
                weight = torch.from_numpy(checkpoint.read(tensor.name))
                weight = weight.to(dtype) if matrix else weight
            found[tensor.role] = weight.to(device)
    return {"head": found["embedding"], **found} if layer is None and spec.tied else found


class Cache:
    """Keys and values of all positions so far, for rows that are all at the same position."""

    def __init__(self, decoder: Decoder, rows: int, tokens: int, dtype: torch.dtype) -> None:
        """Room for `rows` times `tokens` positions in every block; `dtype` trades precision for memory."""
        spec = decoder.spec
        shape = (spec.layers, 2, rows, spec.kv_heads, tokens, spec.head_dim)
        self.decoder = decoder
        self.kept = torch.empty(shape, dtype=dtype, device=decoder.device)

    def attend(self, qkv: Tensor, layer: int, position: int, begins: Tensor) -> Tensor:
        """Attention of one new position of each row, which is added to the cache.

        Args:
            qkv: shape (rows, (heads + 2 * KV heads) * head size).
            layer: index of the block.
            position: of the new tokens.
            begins: the first position that each row looks back at, int64, shape (rows,).

        Returns:
            Shape (rows, heads * head size).
        """
        spec, kept = self.decoder.spec, self.kept[layer]
        rows = qkv.shape[0]
        q, k, v = self.decoder.split(qkv[:, None])
        kept[0, :, :, position] = self.decoder.rotate(k, position)[:, :, 0]
        kept[1, :, :, position] = v[:, :, 0]
        # the queries that share a KV head stand where a sequence's positions usually do
        q = self.decoder.rotate(q, position).reshape(rows, spec.kv_heads, -1, spec.head_dim).to(kept.dtype)
        first = begins if spec.sliding_window is None else begins.clamp(min=position + 1 - spec.sliding_window)
        positions = torch.arange(position + 1, device=qkv.device)
        seen = positions >= first[:, None, None, None]
        if sparse := sparse_in(spec, layer):  # whose blocks begin where a text does
            places = positions - begins[:, None]
            pattern = visible(sparse, spec.heads, places[:, -1:], places)
            seen = seen & pattern.view(rows, spec.kv_heads, -1, position + 1)
        keys, values = kept[:, :, :, : position + 1]
        mixed = scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=spec.attention_scale)
        return mixed.to(qkv.dtype).reshape(rows, -1)


def step(cache: Cache, h: Tensor, layer: int, weights: Weights, position: int, begins: Tensor) -> Tensor:
    """One decoder block at one position of each row: hidden states in and out, float32, shape (rows, hidden).

    The linears compute in the dtype of their weights.
    """
    decoder = cache.decoder
    qkv = decoder.apply("attn_qkv", decoder.normed("attn_norm", h, weights), weights)
    h = h + decoder.apply("attn_output", cache.attend(qkv, layer, position, begins), weights)
    gate_up = decoder.apply("ffn_gate_up", decoder.normed("ffn_norm", h, weights), weights)
    return h + decoder.apply("ffn_down", decoder.gate(gate_up), weights)


def choose(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample a token for each row: temperature, then the most likely tokens that hold TOP_P of the probability.

    Args:
        logits: shape (rows, vocabulary).
        uniform: random numbers in [0, 1), float32, shape (rows,).

    Returns:
        Token ids, int64, shape (rows,).
    """
    probabilities, ids = torch.softmax(logits / TEMPERATURE, -1).topk(min(CANDIDATES, logits.shape[-1]))
    before = probabilities.cumsum(-1) - probabilities
    upto = (probabilities * (before < TOP_P)).cumsum(-1)
    chosen = torch.searchsorted(upto, uniform[:, None] * upto[:, -1:])
    return ids.gather(-1, chosen.clamp(max=ids.shape[-1] - 1))[:, 0]
