"""Phi-3: `Phi3ForCausalLM`: mini, medium, 3.5-mini, phi-4 and phi-4-mini, plain rotary embedding or LongRoPE.

Every key of config.json is either used here, or checked to have the one value that phi3edge computes with, or known
not to change the function. Anything else is refused: a key that is silently ignored is a model that is silently wrong.

Sources: transformers' models/phi3/configuration_phi3.py and modeling_phi3.py, and the checkpoints' own config.json.
"""

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
    layer_count,
    number,
    positive,
    refuse_unknown,
    rope_parameters,
    short,
    token_id,
    window,
)
from phi3edge.types import JSON, ModelSpec, Part, Rope, TensorSpec

ARCHITECTURE = "Phi3ForCausalLM"
NO_EFFECT = {
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "embd_pdrop",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "quantization_config",
    "resid_pdrop",
    "return_dict",
    "transformers_version",
    "use_cache",
    "_source",
    "unsloth_fixed",
    "unsloth_version",
}
"""Keys that inference does not read (dropouts, training, bookkeeping), or that are read elsewhere (ids, grids)."""

FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "lm_head_bias": (False, None),
    "hidden_act": ("silu",),
    "full_attn_mod": (1, None),
    "interpolate_factor": (1, None),
    "layer_types": (None,),
}
"""Keys that change the function, with the values that phi3edge computes with."""

USED = {
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
    "vocab_size",
    "head_dim",
}
ROPE_KEYS = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
LONGROPE_KEYS = {"short_factor", "long_factor", "attention_factor"}


def parse(config: JSON, generation_config: JSON | None, name: str) -> ModelSpec:
    """Read a Phi-3 configuration.

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
    refuse_unknown(config, "phi3", USED | NO_EFFECT, FIXED)

    hidden, heads, kv_heads, head_dim = head_shape(config)
    context = positive(config, "max_position_embeddings")
    original = positive(config, "original_max_position_embeddings", default=context)
    tied, vocab = boolean(config, "tie_word_embeddings", False), positive(config, "vocab_size")
    layers, intermediate = layer_count(config), positive(config, "intermediate_size")
    generation = generation_config or {}
    return ModelSpec(
        family="phi3",
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
        sliding_window=window(config),
        rope=_rope(config, head_dim, context, original),
        norm_eps=number(config, "rms_norm_eps", 1e-5),
        activation="silu",
        tied=tied,
        bos_token_id=token_id("bos_token_id", config.get("bos_token_id"), vocab),
        eos_token_ids=eos_ids(config.get("eos_token_id"), generation.get("eos_token_id"), vocab),
        pad_token_id=token_id("pad_token_id", config.get("pad_token_id"), vocab),
        dtype=float_dtype(config),
        tensors=tuple(_tensors(layers, hidden, intermediate, heads * head_dim, kv_heads * head_dim, vocab, tied)),
    )


def _tensors(layers: int, hidden: int, intermediate: int, q: int, kv: int, vocab: int, tied: bool) -> list[TensorSpec]:
    """Every tensor in execution order; linears are (outputs, inputs)."""
    qkv_parts = (Part("q", 0, q), Part("k", q, q + kv), Part("v", q + kv, q + 2 * kv))
    gate_up_parts = (Part("gate", 0, intermediate), Part("up", intermediate, 2 * intermediate))
    tensors = [TensorSpec("model.embed_tokens.weight", "embedding", None, (vocab, hidden))]
    for n in range(layers):
        block = f"model.layers.{n}"
        tensors += [
            TensorSpec(f"{block}.input_layernorm.weight", "attn_norm", n, (hidden,)),
            TensorSpec(f"{block}.self_attn.qkv_proj.weight", "attn_qkv", n, (q + 2 * kv, hidden), qkv_parts),
            TensorSpec(f"{block}.self_attn.o_proj.weight", "attn_output", n, (hidden, q)),
            TensorSpec(f"{block}.post_attention_layernorm.weight", "ffn_norm", n, (hidden,)),
            TensorSpec(f"{block}.mlp.gate_up_proj.weight", "ffn_gate_up", n, (2 * intermediate, hidden), gate_up_parts),
            TensorSpec(f"{block}.mlp.down_proj.weight", "ffn_down", n, (hidden, intermediate)),
        ]
    tensors.append(TensorSpec("model.norm.weight", "output_norm", None, (hidden,)))
    if not tied:
        tensors.append(TensorSpec("lm_head.weight", "head", None, (vocab, hidden)))
    return tensors


def _rope(config: JSON, head_dim: int, context: int, original: int) -> Rope:
    """The rotary embedding, from the original style (rope_theta, rope_scaling) or transformers 5's."""
    merged, where = rope_parameters(config)
    kind = merged.get("rope_type") or merged.get("type") or "default"
    if kind not in ("default", *LONGROPE):
        known = ", ".join(("default", *LONGROPE))
        raise UnsupportedError(f"config.json: {where} is of type {short(kind)}; family phi3 computes {known}")
    if unknown := sorted(set(merged) - ROPE_KEYS - (LONGROPE_KEYS if kind in LONGROPE else set())):
        raise UnsupportedError(f"config.json: unknown key {unknown[0]!r} in {where}")
    theta = number(merged, "rope_theta", number(config, "rope_theta", 10000.0))
    if "rope_theta" in config and config["rope_theta"] != theta:
        raise CheckpointError(f"config.json: rope_theta is {config['rope_theta']}, but rope_parameters says {theta}")
    share = number(merged, "partial_rotary_factor", number(config, "partial_rotary_factor", 1.0))
    dim = int(head_dim * share)
    if share > 1 or dim % 2 or dim == 0:
        raise CheckpointError(
            f"config.json: {share:g} of a head's {head_dim} channels are rotated; expected an even number of them"
        )
    inner = merged.get("original_max_position_embeddings")
    if inner not in (None, original):
        raise CheckpointError(f"config.json: original_max_position_embeddings is {original}, but {inner} in {where}")
    if kind not in LONGROPE:
        return Rope(theta, dim)
    factor = attention_factor(context, original)
    given = merged.get("attention_factor")
    return Rope(
        theta,
        dim,
        short_factors=factors(merged, "short_factor", dim),
        long_factors=factors(merged, "long_factor", dim),
        attention_factor=factor if given is None else number(merged, "attention_factor", factor),
    )
