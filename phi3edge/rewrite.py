"""The same model in a basis that rounds better: every output stays what it was, up to float32's rounding.

Three freedoms of a decoder are used; none of them leaves a trace in the graph or in the shapes.

- The residual stream may be turned by any orthogonal R, once the norms' gains are in the linears that read them, for
  RMSNorm depends on its input's length alone (Ashkboos et al., SliceGPT, arXiv 2401.15024). A Hadamard-like R spreads
  what stands out in few channels over all of them, so that every block of weights is alike and error feedback has more
  to work with (Chee et al., QuIP, arXiv 2307.13304; Ashkboos et al., QuaRot, arXiv 2404.00456).
- The values of each KV head may be turned too, for attn_output is the next to read them.
- A channel between up and down, or between v and attn_output, may have any scale. The columns that read it get equal
  norms: a block's scale then fits all of them (Nagel et al., arXiv 1906.04721).
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from phi3edge.errors import UnsupportedError
from phi3edge.types import ModelSpec, Quantized, TensorSpec

if TYPE_CHECKING:
    from phi3edge.checkpoint import Checkpoint

SEED = 0


class Rewritten:
    """A checkpoint's weights in the new basis, read as from the checkpoint itself: `rows` and `read`."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, turn_values: bool = True) -> None:
        """Nothing is read yet.

        Args:
            checkpoint: an opened checkpoint of floats.
            spec: its model. A tied one keeps its residual basis, for its head cannot take in the last norm's gain.
            turn_values: False where something else was measured on the values as they are (an 8-bit KV cache).
        """
        self._checkpoint, self._spec, self._turn_values = checkpoint, spec, turn_values
        self._tensors = {t.name: t for t in spec.tensors}
        self._by_role = {(t.role, t.layer): t for t in spec.tensors}
        self._residual = None if spec.tied else rotation(spec.hidden_size, SEED)
        self._turn = rotation(spec.head_dim, SEED)
        self._rules = {
            "attn_qkv": self._attn_qkv,
            "attn_output": self._attn_output,
            "ffn_gate_up": self._ffn_gate_up,
            "ffn_down": self._ffn_down,
        }
        self._last: tuple[str, np.ndarray] = "", np.empty(0)
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """The checkpoint's folder."""
        return self._checkpoint.path

    @property
    def basis(self) -> str:
        """Names all that the rewriting depends on besides the checkpoint."""
        return f"1-{SEED}-{self._residual is not None}-{self._turn_values}"

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, float32, in its own shape."""
        tensor = self._tensors[name]
        return self.rows(name, 0, tensor.shape[0] if len(tensor.shape) == 2 else 1).reshape(tensor.shape)

    def codes(self, name: str, start: int, stop: int) -> Quantized:
        """Integers of the checkpoint, which stay on their grid only in its own basis: there are none here."""
        raise UnsupportedError(f"tensor {name!r} is on the checkpoint's own grid", "use --method rtn")

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor, float32 (rows, columns). May be called from several threads at once."""
        tensor = self._tensors[name]
        if tensor.role in ("embedding", "head"):
            return self._outer(tensor, torch.from_numpy(self._checkpoint.rows(name, start, stop))).numpy()
        with self._lock:  # whole tensors, since rows are mixed; the last one is kept for its next rows
            if self._last[0] != name:
                self._last = name, self._rewrite(tensor)
            return self._last[1].reshape(-1, tensor.shape[-1])[start:stop]

    def _outer(self, tensor: TensorSpec, rows: Tensor) -> Tensor:
        """Rows of the embedding or the head."""
        if self._residual is None:
            return rows
        if tensor.role == "head":
            rows = rows * self._original("output_norm", None)
        return rows @ self._residual

    def _rewrite(self, tensor: TensorSpec) -> np.ndarray:
        """A tensor of a block, or a norm."""
        role = tensor.role
        if role.endswith("norm"):
            folded = self._residual is not None
            return np.ones(tensor.shape, np.float32) if folded else self._checkpoint.read(tensor.name)
        weight = torch.from_numpy(self._checkpoint.read(tensor.name))
        return self._rules[role](weight, tensor).contiguous().numpy()

    def _attn_qkv(self, weight: Tensor, tensor: TensorSpec) -> Tensor:
        weight = self._reading_residual(weight, "attn_norm", tensor.layer)
        [v] = [slice(part.start, part.stop) for part in tensor.parts if part.name == "v"]
        scaled = weight[v].view(self._spec.kv_heads, self._spec.head_dim, -1)
        if self._turn_values:
            scaled = self._turn.T @ (scaled * self._value_norms(tensor.layer)[..., None])
        weight[v] = scaled.view(-1, weight.shape[1])
        return weight

    def _attn_output(self, weight: Tensor, tensor: TensorSpec) -> Tensor:
        if self._turn_values:
            heads = weight.view(len(weight), self._spec.kv_heads, -1, self._spec.head_dim)
            weight = (heads / self._value_norms(tensor.layer)[:, None] @ self._turn).flatten(1)
        return self._writing_residual(weight)

    def _ffn_gate_up(self, weight: Tensor, tensor: TensorSpec) -> Tensor:
        weight = self._reading_residual(weight, "ffn_norm", tensor.layer)
        [up] = [slice(part.start, part.stop) for part in tensor.parts if part.name == "up"]
        weight[up] *= _column_norms(self._original("ffn_down", tensor.layer))[:, None]
        return weight

    def _ffn_down(self, weight: Tensor, tensor: TensorSpec) -> Tensor:
        return self._writing_residual(weight / _column_norms(weight))

    def _reading_residual(self, weight: Tensor, norm: str, layer: int | None) -> Tensor:
        """A weight whose columns read the stream through a norm."""
        if self._residual is None:
            return weight
        return (weight * self._original(norm, layer)) @ self._residual

    def _writing_residual(self, weight: Tensor) -> Tensor:
        """A weight whose rows are added to the stream."""
        return weight if self._residual is None else self._residual.T @ weight

    def _value_norms(self, layer: int | None) -> Tensor:
        """Norms of the columns of attn_output by the channel of v that they read; (KV heads, head size)."""
        norms = _column_norms(self._original("attn_output", layer))
        return norms.view(self._spec.kv_heads, -1, self._spec.head_dim).square().mean(1).sqrt()

    def _original(self, role: str, layer: int | None) -> Tensor:
        return torch.from_numpy(self._checkpoint.read(self._by_role[role, layer].name))


def _column_norms(weight: Tensor) -> Tensor:
    """Root mean square of each column; 1 for one that is all 0."""
    norms = weight.square().mean(0).sqrt()
    return torch.where(norms == 0, 1, norms)


def rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix whose entries are all small, float32 (size, size).

    For size = odd * 2^k: a random orthogonal matrix of the odd size times (Kronecker) Hadamard's of the other, its
    columns with random signs.
    """
    random = np.random.RandomState(seed)  # its stream is the same in every version of numpy
    power = size & -size
    q, r = np.linalg.qr(random.standard_normal((size // power, size // power)))
    odd = q * np.sign(r.diagonal())
    signs = random.choice([-1.0, 1.0], size)
    return torch.from_numpy((np.kron(odd, _hadamard(power)) * signs).astype(np.float32))


def _hadamard(size: int) -> np.ndarray:
    """Sylvester's orthogonal matrix; size is a power of 2."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)
