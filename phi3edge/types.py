"""What crosses the stages of an export. Plain, frozen data; nothing heavy is imported here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ROLES = (
    "embedding",
    "attn_norm",
    "attn_norm_bias",
    "attn_qkv",
    "attn_q",
    "attn_q_bias",
    "attn_k",
    "attn_k_bias",
    "attn_v",
    "attn_v_bias",
    "attn_qkv_bias",
    "attn_output",
    "attn_output_bias",
    "ffn_norm",
    "ffn_norm_bias",
    "router",
    "ffn_gate_up",
    "ffn_gate",
    "ffn_up",
    "ffn_gate_up_bias",
    "ffn_down",
    "ffn_down_bias",
    "output_norm",
    "output_norm_bias",
    "head",
    "head_bias",
)
"""What a tensor of a decoder is for. Recipes speak of roles, never of tensor names."""

FUSED = {
    "attn_q": "attn_qkv",
    "attn_k": "attn_qkv",
    "attn_v": "attn_qkv",
    "ffn_gate": "ffn_gate_up",
    "ffn_up": "ffn_gate_up",
}
"""The role that a linear is a part of in models that store it fused: a recipe that names that one means it too."""


def stays_float(role: str) -> bool:
    """Whether a role is never rounded: norms and biases, which are small, and the router, whose scores are compared."""
    return role.endswith(("norm", "_bias")) or role == "router"


@dataclass(frozen=True, slots=True)
class Part:
    """A named range of rows of a fused tensor: q, k, v of attn_qkv; gate, up of ffn_gate_up."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that a checkpoint of a family must hold.

    Attributes:
        name: its name in the checkpoint.
        role: one of ROLES.
        layer: index of the decoder block, or None outside the blocks.
        shape: (rows, columns) = (outputs, inputs) of a linear, (vocabulary, hidden) of an embedding, (n,) of a norm.
        parts: the named row ranges of a fused tensor, in order; empty if it is not fused.
        grid: the affine codec that the checkpoint already has it on; None for floats.
        expert: which of a layer's experts it belongs to, or None. A checkpoint holds one tensor for each, so here each
            is one too, read, rounded and packed by itself; those of one role and layer follow each other in order, and
            a format that stacks them writes their bytes one after the other.
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    grid: str | None = None
    expert: int | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        size = 1
        for n in self.shape:
            size *= n
        return size


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding of the `dim` leading channels of each head, base `theta`.

    With LongRoPE (arXiv 2402.13753) the wavelength of each pair of channels is stretched by a factor, one list for
    sequences up to the original context and one for longer ones, and both cosine and sine are scaled.

    Attributes:
        short_factors: dim / 2 of them; None for a plain rotary embedding.
        long_factors: the same for sequences longer than the original context.
        attention_factor: what cosine and sine are multiplied by.
        long_attention_factor: the same for longer sequences, where that is another number.
    """

    theta: float
    dim: int
    short_factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None
    attention_factor: float = 1.0
    long_attention_factor: float | None = None

    @property
    def by_length(self) -> bool:
        """Whether longer sequences are rotated by other factors."""
        return self.short_factors is not None


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts in place of the feed-forward network, routed by SparseMixer (arXiv 2409.12136).

    Attributes:
        count: experts of a layer.
        used: of them, for each token.
        jitter: an expert counts beside a chosen one if its score is less than 2 * jitter below, relatively.
    """

    count: int
    used: int
    jitter: float


@dataclass(frozen=True, slots=True)
class BlockSparse:
    """Which keys a query sees in block-sparse attention, by blocks of `block` positions.

    Causal, and of the blocks before its own a query sees the nearest `local` (its own is one of them) and every
    `stride`-th: those where (block + shift * head + 1) is a multiple of `stride`.

    Attributes:
        shift: by how many blocks the stripes of one head are before those of the next; 0 if all heads see the same.
        dense_every: every so many layers, the last of each group sees everything.
    """

    block: int
    local: int
    stride: int
    shift: int
    dense_every: int

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer, numbered from 0, is block-sparse."""
        return (layer + 1) % self.dense_every != 0

    @property
    def patterns(self) -> int:
        """How many different ones there are; heads take them in turn."""
        return self.stride // math.gcd(self.shift, self.stride)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as its config.json describes it: every number that its function depends on, and every tensor.

    Attributes:
        family: name of the family file (phi3edge/families/).
        name: for people; the checkpoint's folder or hub name without the organization.
        sliding_window: number of positions (the query's own included) that attention looks back at, or None.
        bos_token_id: None where the config names none.
        eos_token_ids: every id that ends a generation: config.json's and generation_config.json's, in that order.
        dtype: dtype of the weights in the checkpoint ("bfloat16", "float16", "float32").
        tied: the head is the embedding; then `tensors` has no "head".
        norm: "rms", or "layer" for LayerNorms, which subtract the mean and have biases.
        activation: "silu" (SwiGLU), or "gegelu": a * sigmoid(1.702 a) * (b + 1), a and b in turn in the rows.
        activation_limit: gegelu's a is at most so large, and b at most that far from 0; None for no limit.
        block_sparse: the pattern of the layers that do not see everything, or None.
        attention_scale: what query times key is multiplied by; None for 1 / sqrt(head_dim).
        embedding_scale: what embeddings are multiplied by.
        logit_scale: what logits are multiplied by.
        masked_ids: tokens that are never predicted: their logits are the least float.
        experts: of each layer; None for one feed-forward network. `intermediate_size` is then that of one expert.
        images: what the names of the checkpoint's tensors for images begin with; they are no part of this model. None
            for a model of text alone.
    """

    family: str
    name: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    original_context_length: int
    sliding_window: int | None
    rope: Rope
    norm_eps: float
    activation: str
    tied: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str
    tensors: tuple[TensorSpec, ...] = field(repr=False)
    norm: str = "rms"
    activation_limit: float | None = None
    block_sparse: BlockSparse | None = None
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    masked_ids: tuple[int, ...] = ()
    experts: Experts | None = None
    images: str | None = None

    @property
    def parameters(self) -> int:
        """Number of weights, as stored."""
        return sum(t.size for t in self.tensors)


@dataclass(frozen=True, slots=True)
class Option:
    """A codec that a tensor may be in: the bytes it takes, and the KL that it is predicted to cost, nats per token."""

    codec: str
    bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What happens to one tensor.

    Attributes:
        codec: name of the codec it is written in.
        method: how it is rounded: "rtn", "cast" for float codecs, or "imported": not at all.
        bytes: size of its packed data.
        wanted: the codec that the recipe named, where its declared fallback was taken instead; else None.
        predicted_kl: what the codec is predicted to cost, in nats per token, where a byte budget chose it; else None.
    """

    tensor: TensorSpec
    codec: str
    method: str
    bytes: int
    wanted: str | None = None
    predicted_kl: float | None = None


def total_kl(tensors: Iterable[TensorPlan]) -> float | None:
    """The sum of what is predicted for some tensors, in nats per token; None if nothing is."""
    known = [t.predicted_kl for t in tensors if t.predicted_kl is not None]
    return sum(known) if known else None


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """A codec and a method for every tensor, in the order in which they are written. Pure data."""

    model: ModelSpec
    recipe: str
    tensors: tuple[TensorPlan, ...] = field(repr=False)

    @property
    def weight_bytes(self) -> int:
        """Packed size of all tensors, without file headers."""
        return sum(t.bytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Packed bits over number of weights."""
        return 8 * self.weight_bytes / self.model.parameters

    @property
    def predicted_kl(self) -> float | None:
        """What rounding is predicted to cost, in nats per token, where a byte budget chose the codecs; else None."""
        return total_kl(self.tensors)


@dataclass(frozen=True, slots=True)
class Quantized:
    """Rows of a weight on a codec's grid, not packed yet: what a method rounds to and a codec packs.

    Which fields a codec uses, and how a weight is computed from them, is said in the codec's file. For blocks of n
    weights a row of `columns` weights has columns/n blocks.

    Attributes:
        codec: name of the codec.
        codes: integer codes, or the weights themselves for float codecs; shape (rows, columns).
        scales: one per block, shape (rows, blocks): the float scale (dtype float32, already rounded to what the
            format stores) or, in a super-block format, its integer code.
        mins: like `scales`, for formats with a minimum per block; else None.
        super_scales: float32, shape (rows, super-blocks), for super-block formats; else None.
        super_mins: like `super_scales`, for formats with a minimum; else None.
        zero_points: one per block, shape (rows, blocks): the code that stands for 0, for affine codecs that have one.
    """

    codec: str
    codes: np.ndarray
    scales: np.ndarray | None = None
    mins: np.ndarray | None = None
    super_scales: np.ndarray | None = None
    super_mins: np.ndarray | None = None
    zero_points: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """What one linear's inputs x were on the calibration text, as means over its tokens.

    Attributes:
        tokens: how many there were.
        squares: mean of x**2, float32, shape (columns,): what llama.cpp's importance matrix holds.
        absolute: mean of |x|, float32, shape (columns,); None where only squares are known.
        moments: mean of x x^T, float32, shape (columns, columns); None where only squares are known.
    """

    tokens: int
    squares: np.ndarray
    absolute: np.ndarray | None = None
    moments: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class KVScales:
    """Steps of an 8-bit KV cache: a key or value is code * scale, codes in [-128, 127].

    Attributes:
        keys: float32, shape (layers, KV heads, head size): of the keys after their rotary embedding.
        values: the same for the values.
    """

    keys: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint came from: a hub repository and commit, "demo", or a folder (then repository is None)."""

    repository: str | None
    revision: str | None
    licence: str | None = None


JSON = dict[str, Any]
