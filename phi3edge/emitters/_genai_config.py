"""genai_config.json: what onnxruntime-genai needs to know about a decoder. Its keys: src/config.cpp there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from phi3edge.errors import CheckpointError
from phi3edge.hf_config import text_config
from phi3edge.types import JSON, ModelSpec

SAMPLING: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}
"""Search settings that a checkpoint's generation_config.json may choose, and the runtime's defaults."""

PROVIDER_OPTIONS: dict[str, list[JSON]] = {
    "cpu": [],
    "cuda": [{"cuda": {"enable_cuda_graph": "0"}}],
    "dml": [{"dml": {"enable_graph_capture": "1"}}],
    "webgpu": [{"webgpu": {"enableGraphCapture": "0", "validationMode": "basic"}}],
}
"""As the runtime's own builder writes them."""


def genai_config(
    spec: ModelSpec, inputs: Sequence[str], provider: str, context: int, model: str, generation_config: JSON
) -> JSON:
    """The content of genai_config.json.

    Every id that ends a generation is listed. `max_length` is the context that the target was planned for: the runtime
    allocates the whole KV cache at once, and for the model's own length it would be gigabytes. No thread count: that
    belongs to the device that runs it. No sliding window: the graph's attention looks back as far as it should, and a
    bounded cache for windows breaks Phi-3's prompts beyond it.

    Args:
        spec: the model.
        inputs: names of the graph's inputs.
        provider: "cpu", "cuda", "dml" or "webgpu".
        context: tokens that the KV cache holds.
        model: name of the ONNX file.
        generation_config: the checkpoint's, for its sampling settings.

    Raises:
        CheckpointError: a sampling setting of another kind than the runtime reads.
    """
    named = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": PROVIDER_OPTIONS[provider]},
        "filename": model,
        "head_size": spec.head_dim,
        "hidden_size": spec.hidden_size,
        "inputs": {
            **named,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
    }
    ids = {
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(spec.eos_token_ids),
        "pad_token_id": spec.pad_token_id if spec.pad_token_id is not None else next(iter(spec.eos_token_ids), None),
    }
    return {
        "model": {
            **{key: value for key, value in ids.items() if value is not None},
            "context_length": spec.context_length,
            "decoder": decoder,
            "type": spec.family,
            "vocab_size": spec.vocab_size,
        },
        "search": {
            **{key: _setting(generation_config, key, default) for key, default in SAMPLING.items()},
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
        },
    }


def _setting(generation_config: JSON, key: str, default: Any) -> Any:
    """A sampling setting, of the kind of its default; the runtime refuses a whole folder for another kind."""
    value = generation_config.get(key)
    if value is None:
        return default
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if type(value) not in kinds or not abs(value) < 3.4e38:
        raise CheckpointError(
            f"generation_config.json: {key} is {value!r:.60}; expected a value such as {json.dumps(default)}",
            f"correct or remove {key} there",
        )
    return value


def hub_config(spec: ModelSpec, config: JSON) -> JSON:
    """config.json as loaders of Hugging Face's kind read it: the checkpoint's, without remote code and quantization.

    optimum-onnx 0.1 gives its first KV cache as many heads as the queries have, but for model types that it knows to
    have fewer, and phi3 is not among them. The graph of a phi3 with grouped heads is that of a llama, which is.
    """
    dropped = ("auto_map", "quantization_config")
    kept = {key: value for key, value in text_config(config).items() if key not in dropped}
    grouped = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return kept | grouped if spec.family == "phi3" and spec.kv_heads < spec.heads else kept
