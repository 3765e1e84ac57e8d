"""Phi-3.5-MoE's weights as llama.cpp's `phimoe` needs them to compute the model: other numbers, the same function.

llama.cpp (src/models/phi3.cpp) has RMSNorm where the model has LayerNorm, and weighs the two chosen experts by a
softmax that is normalised to a sum of 1, where the model has SparseMixer. A file can make up for both:

- All that is added to the residual stream has its mean over the hidden channels taken away: the embedding's rows,
  attn_output and its bias, every expert's ffn_down. The stream's mean is then 0, and an RMSNorm is a LayerNorm. No
  LayerNorm sees a difference, since each takes the mean away itself.
- The router is multiplied by 2**-ROUTER_SHIFT, which changes no choice but makes both weights one half, and ffn_down by
  2, which makes them 1: SparseMixer's weights wherever no other expert is within 2 % of a chosen one. What is left of
  the scores' difference d changes a weight by about d * 2**-(ROUTER_SHIFT + 1).

Where another expert is that near, SparseMixer divides by steps that no softmax makes: those tokens stay different.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from phi3edge.types import ModelSpec, Quantized

if TYPE_CHECKING:
    from phi3edge.checkpoint import Checkpoint
    from phi3edge.mixture import MixtureDecoder

ROUTER_SHIFT = 11
"""Least KL on a small random model, 300 sequences of 30 tokens. With less the weights are further from 1 (8: 6e-7 nats,
11: 1e-8); with more, choices between near scores go wrong in more sequences (11: 1, 14: 10), since llama.cpp compares
probabilities, which then differ in the last bits of float32 only."""

FACTORS = {"router": 2.0**-ROUTER_SHIFT, "ffn_down": 2.0}
"""Role to what its weights are multiplied by: powers of two, which cost no bit."""


class Centred:
    """A checkpoint's weights for llama.cpp, read as from the checkpoint itself."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec) -> None:
        """Nothing is read yet.

        Args:
            checkpoint: an opened one.
            spec: its model: a mixture of experts with LayerNorms.
        """
        self._checkpoint = checkpoint
        self._roles = {t.name: t.role for t in spec.tensors}
        self._means = {
            t.name: _Means(checkpoint, t.name) for t in spec.tensors if t.role in ("attn_output", "ffn_down")
        }

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self._checkpoint.path

    @property
    def basis(self) -> str:
        """Names all that the weights depend on besides the checkpoint."""
        return f"centred-1-{ROUTER_SHIFT}"

    def codes(self, name: str, start: int, stop: int) -> Quantized:
        """Integers of the checkpoint: the family has none."""
        return self._checkpoint.codes(name, start, stop)

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, float32, in its own shape."""
        shape = self._checkpoint.info(name)[1]
        return self.rows(name, 0, shape[0] if len(shape) == 2 else 1).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor, float32 (rows, columns). May be called from several threads at once."""
        rows, role = self._checkpoint.rows(name, start, stop), self._roles[name]
        if role in ("embedding", "attn_output_bias"):  # the hidden channels are the columns
            rows -= rows.mean(1, dtype=np.float64, keepdims=True).astype(np.float32)
        elif name in self._means:  # they are the rows, of which only some are here
            rows -= self._means[name].get()
        if role in FACTORS:
            rows *= np.float32(FACTORS[role])
        return rows


def mixture_decoder(weights: object, spec: ModelSpec, device: str = "cpu") -> MixtureDecoder:
    """What computes a mixture between its linears: centred weights as llama.cpp does, others as the model means it."""
    from phi3edge.mixture import LlamaCppDecoder, MixtureDecoder

    return (LlamaCppDecoder if isinstance(weights, Centred) else MixtureDecoder)(spec, device)


class _Means:
    """The mean of each column of a tensor, computed when it is first asked for, in pieces that take little memory."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self._checkpoint, self._name = checkpoint, name
        self._lock = threading.Lock()
        self._found: np.ndarray | None = None

    def get(self) -> np.ndarray:
        with self._lock:
            if self._found is None:
                self._found = self._checkpoint.column_means(self._name)
            return self._found
