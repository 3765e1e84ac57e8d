"""The decoder's ONNX graph, as onnxruntime-genai's own model builder makes it: it knows each provider's quirks.

The builder runs on a model of transformers on torch's meta device: no weight exists, and every weight of the graph is a
name, a shape and a promise. All that touches the builder's internals is in this file.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from phi3edge.emitters._genai_mixture import Mixture
from phi3edge.errors import MissingExtraError, UnsupportedError
from phi3edge.providers import load_provider
from phi3edge.types import ModelSpec

if TYPE_CHECKING:
    import onnx_ir as ir

SUPPORTED = (0, 18)
"""Version of onnxruntime-genai whose builder this file drives."""

LATER_CLASSES = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
"""Classes of transformers 5 that the builder imports."""

WEIGHTS = {
    "embedding": r"model\.embed_tokens\.weight",
    "attn_norm": r"model\.layers\.(?P<layer>\d+)\.input_layernorm\.weight",
    "attn_qkv": r"model\.layers\.(?P<layer>\d+)\.attn\.(?P<part>qkv|q|k|v)_proj\.MatMul\.weight",
    "attn_output": r"model\.layers\.(?P<layer>\d+)\.attn\.o_proj\.MatMul\.weight",
    "ffn_norm": r"model\.layers\.(?P<layer>\d+)\.post_attention_layernorm\.weight",
    "ffn_gate_up": r"model\.layers\.(?P<layer>\d+)\.mlp\.(?P<part>gate_up|gate|up)_proj\.MatMul\.weight",
    "ffn_down": r"model\.layers\.(?P<layer>\d+)\.(mlp\.down_proj|moe\.experts\.(?P<expert>\d+)\.down)\.MatMul\.weight",
    "output_norm": r"model\.layers\.\d+\.final_norm_layernorm\.weight",
    "head": r"lm_head\.MatMul\.weight",
    "attn_norm_bias": r"model\.layers\.(?P<layer>\d+)\.input_layernorm\.bias",
    "attn_q_bias": r"model\.layers\.(?P<layer>\d+)\.attn\.q_proj\.Add\.bias",
    "attn_k_bias": r"model\.layers\.(?P<layer>\d+)\.attn\.k_proj\.Add\.bias",
    "attn_v_bias": r"model\.layers\.(?P<layer>\d+)\.attn\.v_proj\.Add\.bias",
    "attn_output_bias": r"model\.layers\.(?P<layer>\d+)\.attn\.o_proj\.Add\.bias",
    "ffn_norm_bias": r"model\.layers\.(?P<layer>\d+)\.post_attention_layernorm\.bias",
    "router": r"model\.layers\.(?P<layer>\d+)\.moe\.router\.MatMul\.weight",
    "ffn_gate": r"model\.layers\.(?P<layer>\d+)\.moe\.experts\.(?P<expert>\d+)\.gate\.MatMul\.weight",
    "ffn_up": r"model\.layers\.(?P<layer>\d+)\.moe\.experts\.(?P<expert>\d+)\.up\.MatMul\.weight",
    "output_norm_bias": r"model\.layers\.\d+\.final_norm_layernorm\.bias",
    "head_bias": r"lm_head\.Add\.bias",
}
"""The builder's names of the weights of each role."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that the graph asks for.

    Attributes:
        value: the graph's value; nothing stands behind it yet.
        part: name of the part of a fused tensor that it is, or "" for the whole tensor.
        expert: that it belongs to, or None.
    """

    value: ir.Value
    role: str
    layer: int | None
    part: str
    expert: int | None = None


def build_graph(spec: ModelSpec, provider: str, io_dtype: str) -> tuple[ir.Model, list[Weight]]:
    """The graph of a model for one execution provider, in full precision, and the weights that it lacks.

    Args:
        spec: the model.
        provider: "cpu", "cuda", "dml" or "webgpu".
        io_dtype: "float32" or "float16": of activations, logits and KV cache.

    Raises:
        MissingExtraError: a package is not installed.
        UnsupportedError: another version of onnxruntime-genai, or one whose builder does not make what it should.
    """
    require_builder()
    try:
        import onnx_ir as ir
        import torch
        import transformers

        with _later_classes(transformers):
            from onnxruntime_genai.models.builders.phi import Phi3MiniLongRoPEModel, Phi3MiniModel
    except ImportError:
        raise MissingExtraError("writing ONNX Runtime GenAI folders", "onnx") from None
    config = _config(spec, transformers)

    base: Any = Phi3MiniLongRoPEModel if spec.rope.by_length else Phi3MiniModel

    class Builder(base):
        """The builder on a model without weights."""

        def load_weights(self, input_path: str) -> Any:
            with torch.device("meta"):
                if spec.experts is None:
                    return transformers.AutoModelForCausalLM.from_config(config)
                model = transformers.PhimoeForCausalLM(_mixture_config(spec, transformers))
            for layer in model.model.layers:
                for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                    linear.bias = torch.nn.Parameter(torch.ones(linear.bias.shape))  # the builder leaves out zeros
            return model

        def make_mlp(self, layer_id: int, mlp: Any, root_input: str) -> None:
            if spec.experts is None:
                super().make_mlp(layer_id, mlp, root_input)
                return
            picks_rows = load_provider(provider).picks_rows
            mixture = Mixture(self, layer_id, spec.experts, spec.hidden_size, spec.intermediate_size, picks_rows)
            self.layernorm_attrs["skip_input"] = mixture.make(mlp, root_input)

    dtype = ir.DataType.FLOAT if io_dtype == "float32" else ir.DataType.FLOAT16
    options = {"windowed_kv_cache": False, "fuse_mlp_gate_up": True, "disable_qkv_fusion": spec.experts is not None}
    with contextlib.redirect_stdout(io.StringIO()), _linears_left_empty(torch):
        builder = Builder(config, dtype, dtype, provider, "", options)
        if spec.experts:
            builder.layernorm_attrs["simple"] = False
        builder.make_model("")
    model = builder.model
    model.graph.sort()
    separate = any(t.role == "attn_q" for t in spec.tensors)
    weights = [_weight(value, separate) for value in model.graph.initializers.values() if _is_promise(value)]
    _set_window(model, spec)
    _set_head_size(model, spec)
    return model, weights


def require_builder() -> None:
    """Raise unless the builder is installed, in a version that this file drives.

    Raises:
        MissingExtraError: onnxruntime-genai is not installed.
        UnsupportedError: another version.
    """
    try:
        found = version("onnxruntime-genai")
    except PackageNotFoundError:
        raise MissingExtraError("writing ONNX Runtime GenAI folders", "onnx") from None
    if tuple(int(n) for n in found.split(".")[:2]) != SUPPORTED:
        wanted = ".".join(map(str, SUPPORTED))
        raise UnsupportedError(
            f"the graph is made by onnxruntime-genai {wanted}'s builder; {found} is installed",
            f"pip install 'onnxruntime-genai=={wanted}.*'",
        )


@contextlib.contextmanager
def _later_classes(transformers: Any) -> Iterator[None]:
    """Lets the builder be imported beside transformers 4, which lacks classes that it names for other families."""
    missing = [name for name in LATER_CLASSES if not hasattr(transformers, name)]
    for name in missing:
        setattr(transformers, name, None)
    try:
        yield
    finally:
        for name in missing:
            delattr(transformers, name)


@contextlib.contextmanager
def _linears_left_empty(torch: Any) -> Iterator[None]:
    """Spares the random numbers of linears that the builder makes only to put parts of fused weights in their place."""
    fill = torch.nn.Linear.reset_parameters
    torch.nn.Linear.reset_parameters = lambda _: None
    try:
        yield
    finally:
        torch.nn.Linear.reset_parameters = fill


def _config(spec: ModelSpec, transformers: Any) -> Any:
    """What transformers configures the model with, from our strict reading of it."""
    config = transformers.Phi3Config(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.context_length,
        original_max_position_embeddings=spec.original_context_length,
        rms_norm_eps=spec.norm_eps,
        hidden_act=spec.activation,
        tie_word_embeddings=spec.tied,
        sliding_window=spec.sliding_window,
        bos_token_id=spec.bos_token_id,
        eos_token_id=list(spec.eos_token_ids) or None,
        pad_token_id=spec.pad_token_id,
    )
    config.rope_theta = spec.rope.theta  # transformers 4; 5 keeps it in rope_parameters
    config.partial_rotary_factor = spec.rope.dim / spec.head_dim
    config.rope_parameters = _rope_parameters(spec)
    if getattr(config, "rope_scaling", config.rope_parameters) is None:  # transformers 4; the builder reads both
        config.rope_scaling = config.rope_parameters
    config.architectures = ["Phi3ForCausalLM"]
    config._name_or_path = ""
    return config


def _mixture_config(spec: ModelSpec, transformers: Any) -> Any:
    """What a model with the modules of a mixture is made from; all else the builder reads in `_config`."""
    assert spec.experts is not None
    return transformers.PhimoeConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        num_local_experts=spec.experts.count,
        max_position_embeddings=spec.context_length,
        attention_bias=True,
        lm_head_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope.theta},
    )


def _rope_parameters(spec: ModelSpec) -> dict[str, Any]:
    """The rotary embedding as the builder reads it; its own attention factor would be that of a plain formula."""
    rope = spec.rope
    shared = {"rope_theta": rope.theta, "partial_rotary_factor": rope.dim / spec.head_dim}
    if rope.short_factors is None or rope.long_factors is None:
        return {"rope_type": "default", **shared}
    return {
        "rope_type": "longrope",
        "type": "longrope",
        **shared,
        "original_max_position_embeddings": spec.original_context_length,
        "short_factor": list(rope.short_factors),
        "long_factor": list(rope.long_factors),
        "short_mscale": rope.attention_factor,
        "long_mscale": rope.attention_factor,
    }


def _is_promise(value: ir.Value) -> bool:
    """Whether a weight has no data: the builder's lazy tensors; its tables of rotary angles are real."""
    import onnx_ir as ir

    return isinstance(value.const_value, ir.LazyTensor)


def _weight(value: ir.Value, separate: bool) -> Weight:
    """The weight that a value stands for; where a checkpoint has q, k and v `separate`, each is one of its own."""
    for role, pattern in WEIGHTS.items():
        match = re.fullmatch(pattern, value.name or "")
        if match:
            found = match.groupdict()
            part = found.get("part") or ""
            layer, expert = (int(found[key]) if found.get(key) else None for key in ("layer", "expert"))
            if role == "attn_qkv" and separate:
                return Weight(value, f"attn_{part}", layer, "")
            return Weight(value, role, layer, "" if part in ("qkv", "gate_up") else part, expert)
    raise UnsupportedError(f"the builder of onnxruntime-genai made a weight that is not known: {value.name}")


def _set_window(model: ir.Model, spec: ModelSpec) -> None:
    """Attention looks back as far as the checkpoint's; the builder leaves Phi-3's window out (-1: no window)."""
    import onnx_ir as ir

    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    if len(attentions) != spec.layers or any("local_window_size" not in node.attributes for node in attentions):
        raise UnsupportedError(
            f"onnxruntime-genai's builder made {len(attentions)} GroupQueryAttention nodes for {spec.layers} layers"
        )
    for node in attentions:
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", spec.sliding_window or -1)


def _set_head_size(model: ir.Model, spec: ModelSpec) -> None:
    """The KV cache's last dimension is a number: the builder leaves it open, for caches that pack several values."""
    import onnx_ir as ir

    for value in [*model.graph.inputs, *model.graph.outputs]:
        if (value.name or "").startswith(("past_key_values.", "present.")):
            value.shape = ir.Shape([*list(value.shape or ())[:-1], spec.head_dim])
