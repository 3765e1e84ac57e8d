"""Phi-3-small: `Phi3SmallForCausalLM`, 8k and 128k: block-sparse attention, gegelu, muP scales, LayerNorms and biases.

As in family phi3, every key of config.json is used, or has one value that phi3edge computes with, or changes nothing.

Rows of the fused linears are interleaved. `query_key_value` has, for each KV head, the queries that share it, its key
and its value; `up_proj` has gate and up in turn, row by row, which named ranges of rows cannot say.

Sources: Microsoft's modeling_phi3_small.py and configuration_phi3_small.py of the two checkpoints, and their
config.json; mlx-lm's phi3small.py computes the same.
"""

import math
from typing import Any

from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.families._fields import (
    LONGROPE,
    attention_factor,
    boolean,
    eos_ids,
    factors,
    float_dtype,
    head_shape,
    is_int,
    layer_count,
    number,
    positive,
    refuse_unknown,
    short,
    token_id,
)
from phi3edge.types import JSON, BlockSparse, ModelSpec, Part, Rope, TensorSpec

ARCHITECTURE = "Phi3SmallForCausalLM"
NO_EFFECT = {
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attention_dropout_prob",
    "auto_map",
    "blocksparse_triton_kernel_block_size",  # how a kernel cuts its work
    "bos_token_id",
    "embedding_dropout_prob",
    "eos_token_id",
    "ffn_dropout_prob",
    "gegelu_pad_to_256",  # pads a width that is computed; here it is given
    "initializer_range",
    "model_type",
    "pad_sequence_to_multiple_of_64",
    "pad_token_id",
    "quantization_config",
    "transformers_version",
    "use_cache",
}
"""Keys that inference does not read (dropouts, kernels, bookkeeping), or that are read elsewhere (ids, grids)."""

FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),  # what the original configurations say; the biases are there all the same
    "ff_dim_multiplier": (None,),
    "hidden_act": ("gegelu",),
    "reorder_and_upcast_attn": (False, None),
    "rope_position_scale": (1.0, None),
}
"""Keys that change the function, with the values that phi3edge computes with."""

USED = {
    "blocksparse_block_size",
    "blocksparse_homo_head_pattern",
    "blocksparse_num_local_blocks",
    "blocksparse_vert_stride",
    "dense_attention_every_n_layers",
    "dtype",
    "dummy_token_indices",
    "ff_intermediate_size",
    "gegelu_limit",
    "hidden_size",
    "layer_norm_epsilon",
    "max_position_embeddings",
    "mup_attn_multiplier",
    "mup_embedding_multiplier",
    "mup_use_scaling",
    "mup_width_multiplier",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "rope_embedding_base",
    "rope_scaling",
    "tie_word_embeddings",
    "torch_dtype",
    "vocab_size",
}
ORIGINAL = "original_max_position_embeddings"
LONGROPE_KEYS = {
    "type",
    "rope_type",
    "short_factor",
    "long_factor",
    "short_mscale",
    "long_mscale",
    ORIGINAL,
}
REQUIRED = (
    "blocksparse_homo_head_pattern",
    "gegelu_limit",
    "layer_norm_epsilon",
    "mup_attn_multiplier",
    "mup_embedding_multiplier",
    "mup_use_scaling",
    "mup_width_multiplier",
    "rope_embedding_base",
)
"""Keys that may be null, but whose absence would stand for a number in Microsoft's code."""

VOCABULARY = 100352
DUMMY_IDS = (100256, 100258, 100259, 100260, 100264, 100265, *range(100267, VOCABULARY))
"""Ids of the original vocabulary that stand for nothing; the original configuration takes them from its tokenizer."""


def parse(config: JSON, generation_config: JSON | None, name: str) -> ModelSpec:
    """Read a Phi-3-small configuration.

    Args:
        config: config.json.
        generation_config: generation_config.json, or None if the checkpoint has none.
        name: the model's name, for people.

    Raises:
        UnsupportedError: a key or value that would change the function in a way that phi3edge does not compute.
        CheckpointError: a missing key, or a value of the wrong kind or out of range.
    """
    architectures = config.get("architectures") or [ARCHITECTURE]
    if architectures != [ARCHITECTURE]:
        raise UnsupportedError(f"config.json: architectures is {architectures}; this family reads ['{ARCHITECTURE}']")
    refuse_unknown(config, "phi3small", USED | NO_EFFECT, FIXED)
    if missing := [key for key in REQUIRED if key not in config]:
        raise CheckpointError(f"config.json: {missing[0]} is missing")
    if config.get("quantization_config") is not None:
        raise UnsupportedError("config.json: quantization_config: family phi3small reads weights that are floats")

    hidden, heads, kv_heads, head_dim = head_shape(config)
    if head_dim % 2:
        raise CheckpointError(f"config.json: {heads} heads share hidden_size {hidden}; expected an even share each")
    context = positive(config, "max_position_embeddings")
    scaling = _scaling(config)
    original = positive({**scaling, **config}, ORIGINAL, default=context)
    layers, intermediate = layer_count(config), positive(config, "ff_intermediate_size")
    vocab, tied = positive(config, "vocab_size"), boolean(config, "tie_word_embeddings", True)
    generation = generation_config or {}
    scaled = boolean(config, "mup_use_scaling", True)
    return ModelSpec(
        family="phi3small",
        name=name,
        layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        context_length=context,
        original_context_length=original,
        sliding_window=None,
        rope=_rope(config, scaling, head_dim, context, original),
        norm_eps=number(config, "layer_norm_epsilon", 1e-5),
        activation="gegelu",
        tied=tied,
        bos_token_id=token_id("bos_token_id", config.get("bos_token_id"), vocab),
        eos_token_ids=eos_ids(config.get("eos_token_id"), generation.get("eos_token_id"), vocab),
        pad_token_id=token_id("pad_token_id", config.get("pad_token_id"), vocab),
        dtype=float_dtype(config),
        tensors=tuple(_tensors(layers, hidden, intermediate, head_dim, heads // kv_heads, kv_heads, vocab, tied)),
        activation_limit=number(config, "gegelu_limit", math.inf) if config.get("gegelu_limit") is not None else None,
        norm="layer",
        block_sparse=_block_sparse(config, heads),
        attention_scale=number(config, "mup_attn_multiplier", 1.0) / head_dim if scaled else None,
        embedding_scale=number(config, "mup_embedding_multiplier", 1.0),  # null: no multiplier
        logit_scale=1 / number(config, "mup_width_multiplier", 1.0),
        masked_ids=_masked_ids(config, vocab),
    )


def _block_sparse(config: JSON, heads: int) -> BlockSparse:
    stride = positive(config, "blocksparse_vert_stride")
    shared = boolean(config, "blocksparse_homo_head_pattern", False)
    return BlockSparse(
        block=positive(config, "blocksparse_block_size"),
        local=positive(config, "blocksparse_num_local_blocks"),
        stride=stride,
        shift=0 if shared else max(1, stride // heads),
        dense_every=positive(config, "dense_attention_every_n_layers"),
    )


def _masked_ids(config: JSON, vocab: int) -> tuple[int, ...]:
    """The original configuration does not list them; a vocabulary of another size must, or nothing is known of it."""
    ids = config.get("dummy_token_indices")
    if ids is None and vocab == VOCABULARY:
        return DUMMY_IDS
    if not isinstance(ids, list) or not all(is_int(n) and 0 <= n < vocab for n in ids):
        raise CheckpointError(
            f"config.json: dummy_token_indices is {short(ids)}; expected a list of ids from 0 to {vocab - 1}, which"
            f" only a vocab_size of {VOCABULARY} can do without"
        )
    return tuple(sorted(set(ids)))


def _scaling(config: JSON) -> JSON:
    scaling = config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"config.json: rope_scaling is {short(scaling)}; expected an object")
    return scaling


def _rope(config: JSON, scaling: JSON, head_dim: int, context: int, original: int) -> Rope:
    """The rotary embedding, plain or LongRoPE.

    LongRoPE's factor on cosine and sine is short_mscale or long_mscale; where there is none, the formula's.
    """
    theta = number(config, "rope_embedding_base", 1e6)
    if not scaling:
        return Rope(theta, head_dim)
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind not in LONGROPE:
        raise UnsupportedError(
            f"config.json: rope_scaling is of type {short(kind)}; family phi3small computes {', '.join(LONGROPE)}"
        )
    if unknown := sorted(set(scaling) - LONGROPE_KEYS):
        raise UnsupportedError(f"config.json: unknown key {unknown[0]!r} in rope_scaling")
    if original < 2 or scaling.get(ORIGINAL) not in (None, original):
        raise CheckpointError(f"config.json: {ORIGINAL} is {original}, but {scaling.get(ORIGINAL)} in rope_scaling")
    factor = attention_factor(context, original)
    return Rope(
        theta,
        head_dim,
        short_factors=factors(scaling, "short_factor", head_dim),
        long_factors=factors(scaling, "long_factor", head_dim),
        attention_factor=number(scaling, "short_mscale", factor),
        long_attention_factor=number(scaling, "long_mscale", factor),
    )


def _tensors(
    layers: int, hidden: int, intermediate: int, head_dim: int, group: int, kv_heads: int, vocab: int, tied: bool
) -> list[TensorSpec]:
    """Every tensor in execution order; linears are (outputs, inputs). `group` queries share a KV head."""
    rows, parts = (group + 2) * head_dim, []
    for n in range(kv_heads):
        start, key, value = n * rows, n * rows + group * head_dim, n * rows + (group + 1) * head_dim
        parts += [Part(f"q{n}", start, key), Part(f"k{n}", key, value), Part(f"v{n}", value, start + rows)]
    tensors = [TensorSpec("model.embed_tokens.weight", "embedding", None, (vocab, hidden))]

    def add(name: str, role: str, layer: int | None, shape: tuple[int, ...], parts: tuple[Part, ...] = ()) -> None:
        tensors.append(TensorSpec(f"{name}.weight", role, layer, shape, parts))
        tensors.append(TensorSpec(f"{name}.bias", f"{role}_bias", layer, shape[:1]))

    for n in range(layers):
        block = f"model.layers.{n}"
        add(f"{block}.input_layernorm", "attn_norm", n, (hidden,))
        add(f"{block}.self_attn.query_key_value", "attn_qkv", n, (kv_heads * rows, hidden), tuple(parts))
        add(f"{block}.self_attn.dense", "attn_output", n, (hidden, hidden))
        add(f"{block}.post_attention_layernorm", "ffn_norm", n, (hidden,))
        add(f"{block}.mlp.up_proj", "ffn_gate_up", n, (2 * intermediate, hidden))
        add(f"{block}.mlp.down_proj", "ffn_down", n, (hidden, intermediate))
    add("model.final_layernorm", "output_norm", None, (hidden,))
    if not tied:
        tensors.append(TensorSpec("lm_head.weight", "head", None, (vocab, hidden)))
    return tensors
