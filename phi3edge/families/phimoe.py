"""Phi-3.5-MoE: `PhiMoEForCausalLM`, or `PhimoeForCausalLM` as transformers 5 writes it: 16 experts, two for each token.

Every key of config.json is used here, or checked to have the value that phi3edge computes with, or known not to change
the function. Linears of attention and the head have biases, norms are LayerNorms, and the rotary embedding is LongRoPE
with the scale of cosine and sine written out (short_mscale, long_mscale), which no formula gives.

Sources: Microsoft's modeling_phimoe.py and configuration_phimoe.py beside the checkpoint, its config.json, and
transformers' models/phimoe.
"""

import math
from typing import Any

from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.families._fields import (
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
from phi3edge.types import JSON, Experts, ModelSpec, Rope, TensorSpec

ARCHITECTURES = ("PhiMoEForCausalLM", "PhimoeForCausalLM")
NO_EFFECT = {
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "eos_token_id",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "input_jitter_noise",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "transformers_version",
    "use_cache",
}
"""Keys that inference does not read: dropouts, noise and loss of training, bookkeeping."""

FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (True,),
    "lm_head_bias": (True,),
    "hidden_act": ("silu",),
    "num_experts_per_tok": (2,),
    "tie_word_embeddings": (False, None),
    "layer_types": (None,),
    "quantization_config": (None,),
}
"""Keys that change the function, with the values that phi3edge computes with."""

USED = {
    "dtype",
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "router_jitter_noise",
    "sliding_window",
    "torch_dtype",
    "vocab_size",
}
ROPE_KEYS = {
    "type",
    "rope_type",
    "rope_theta",
    "original_max_position_embeddings",
    "short_factor",
    "long_factor",
    "short_mscale",
    "long_mscale",
}
MOST_EXPERTS = 1000


def parse(config: JSON, generation_config: JSON | None, name: str) -> ModelSpec:
    """Read a Phi-3.5-MoE configuration.

    Args:
        config: config.json.
        generation_config: generation_config.json, or None if the checkpoint has none.
        name: the model's name, for people.

    Raises:
        UnsupportedError: a key or value that would change the function in a way that phi3edge does not compute.
        CheckpointError: a missing key, or a value of the wrong kind or out of range.
    """
    architectures = config.get("architectures") or [ARCHITECTURES[0]]
    if architectures not in [[known] for known in ARCHITECTURES]:
        raise UnsupportedError(
            f"config.json: architectures is {short(architectures)}; this family reads {' or '.join(ARCHITECTURES)}"
        )
    refuse_unknown(config, "phimoe", USED | NO_EFFECT, FIXED)
    for key in ("attention_bias", "lm_head_bias"):  # the configuration's own default is another
        if key not in config:
            raise UnsupportedError(
                f"config.json: {key} is missing, which means false; family phimoe computes true only"
            )
    hidden, heads, kv_heads, head_dim = head_shape(config)
    context, vocab = positive(config, "max_position_embeddings"), positive(config, "vocab_size")
    layers, intermediate = layer_count(config), positive(config, "intermediate_size")
    experts = Experts(positive(config, "num_local_experts"), 2, number(config, "router_jitter_noise", 0.01))
    if not experts.used <= experts.count <= MOST_EXPERTS:
        raise UnsupportedError(
            f"config.json: num_local_experts is {experts.count}; supported: {experts.used} to {MOST_EXPERTS}"
        )
    rope, original = _rope(config, head_dim)
    generation = generation_config or {}
    return ModelSpec(
        family="phimoe",
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
        rope=rope,
        norm_eps=number(config, "rms_norm_eps", 1e-5),
        activation="silu",
        tied=False,
        bos_token_id=token_id("bos_token_id", config.get("bos_token_id"), vocab),
        eos_token_ids=eos_ids(config.get("eos_token_id"), generation.get("eos_token_id"), vocab),
        pad_token_id=token_id("pad_token_id", config.get("pad_token_id"), vocab),
        dtype=float_dtype(config),
        tensors=tuple(_tensors(layers, hidden, intermediate, kv_heads * head_dim, vocab, experts.count)),
        norm="layer",
        experts=experts,
    )


def _tensors(layers: int, hidden: int, intermediate: int, kv: int, vocab: int, experts: int) -> list[TensorSpec]:
    """Every tensor in execution order; linears are (outputs, inputs)."""
    tensors = [TensorSpec("model.embed_tokens.weight", "embedding", None, (vocab, hidden))]
    for n in range(layers):
        block = f"model.layers.{n}"
        tensors += _with_bias(f"{block}.input_layernorm", "attn_norm", n, (hidden,))
        for role, name, rows in (("attn_q", "q", hidden), ("attn_k", "k", kv), ("attn_v", "v", kv)):
            tensors += _with_bias(f"{block}.self_attn.{name}_proj", role, n, (rows, hidden))
        tensors += _with_bias(f"{block}.self_attn.o_proj", "attn_output", n, (hidden, hidden))
        tensors += _with_bias(f"{block}.post_attention_layernorm", "ffn_norm", n, (hidden,))
        mixture = f"{block}.block_sparse_moe"
        tensors.append(TensorSpec(f"{mixture}.gate.weight", "router", n, (experts, hidden)))
        for role, name, shape in (
            ("ffn_gate", "w1", (intermediate, hidden)),
            ("ffn_up", "w3", (intermediate, hidden)),
            ("ffn_down", "w2", (hidden, intermediate)),
        ):
            tensors += [
                TensorSpec(f"{mixture}.experts.{e}.{name}.weight", role, n, shape, expert=e) for e in range(experts)
            ]
    tensors += _with_bias("model.norm", "output_norm", None, (hidden,))
    return tensors + _with_bias("lm_head", "head", None, (vocab, hidden))


def _with_bias(name: str, role: str, layer: int | None, shape: tuple[int, ...]) -> list[TensorSpec]:
    weight = TensorSpec(f"{name}.weight", role, layer, shape)
    return [weight, TensorSpec(f"{name}.bias", f"{role}_bias", layer, shape[:1])]


def _rope(config: JSON, head_dim: int) -> tuple[Rope, int]:
    """LongRoPE and its original context, from rope_scaling (Microsoft's) or rope_parameters (transformers 5's)."""
    merged, where = rope_parameters(config)
    kind = merged.get("rope_type") or merged.get("type")
    if kind != "longrope":
        raise UnsupportedError(f"config.json: {where} is of type {short(kind)}; family phimoe computes longrope")
    if unknown := sorted(set(merged) - ROPE_KEYS):
        raise UnsupportedError(f"config.json: unknown key {unknown[0]!r} in {where}")
    if "rope_theta" not in config and "rope_theta" not in merged:
        raise CheckpointError("config.json: rope_theta is missing")
    theta = number(merged, "rope_theta", number(config, "rope_theta", math.nan))
    if config.get("rope_theta") not in (None, theta):
        raise CheckpointError(f"config.json: rope_theta is {config['rope_theta']}, but rope_parameters says {theta}")
    originals = {
        positive(place, "original_max_position_embeddings")
        for place in (config, merged)
        if place.get("original_max_position_embeddings") is not None
    }
    if len(originals) != 1:
        raise CheckpointError(
            f"config.json: original_max_position_embeddings is {sorted(originals) or 'missing'}; expected one value"
        )
    scales = [number(merged, key, math.nan) for key in ("short_mscale", "long_mscale")]
    if any(map(math.isnan, scales)):
        raise CheckpointError(f"config.json: short_mscale or long_mscale is missing in {where}")
    if scales[0] != scales[1]:
        raise UnsupportedError(
            f"config.json: short_mscale is {scales[0]}, long_mscale {scales[1]}; family phimoe computes equal ones only"
        )
    rope = Rope(
        theta,
        head_dim,
        short_factors=factors(merged, "short_factor", head_dim),
        long_factors=factors(merged, "long_factor", head_dim),
        attention_factor=scales[0],
    )
    return rope, originals.pop()
