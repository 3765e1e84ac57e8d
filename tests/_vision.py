"""Small random Phi-3-vision checkpoints in the layout, configuration style and tokenizer of the original ones."""

import json
from pathlib import Path
from typing import Any

import torch
from _models import DTYPES, Shape, phi3_config, phi3_tensors, write_weights
from _tokenizers import write_sentencepiece

SHAPE = Shape(kv_heads=2, vocab=768)
ORIGINAL, CONTEXT, PAIRS = 256, 1024, 32
IMAGE = 706
STRIPPING = ("</s>", "<|assistant|>", "<|placeholder1|>", "<|image|>")
"""Tokens that swallow the white space after them; <|system|>, <|user|> and <|end|> do not, other than Phi-3-mini's."""


def vision_config(shape: Shape = SHAPE, **changes: Any) -> dict[str, Any]:
    """config.json in the original style; every value that changes the function would show if it were ignored."""
    config = phi3_config(
        shape,
        architectures=["Phi3VForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_phi3_v.Phi3VForCausalLM"},
        embd_layer={
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        eos_token_id=2,
        img_processor={
            "image_dim_out": 1024,
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": 144,
        },
        max_position_embeddings=CONTEXT,
        model_type="phi3_v",
        original_max_position_embeddings=ORIGINAL,
        pad_token_id=700,
        rms_norm_eps=1e-2,
        rope_scaling={
            "type": "su",
            "short_factor": [1 + 0.05 * n for n in range(PAIRS)],
            "long_factor": [1.5 + 0.5 * n for n in range(PAIRS)],
        },
        rope_theta=5000.0,
        sliding_window=CONTEXT,
        _attn_implementation="flash_attention_2",
    )
    return config | changes


def image_tensors(shape: Shape = SHAPE) -> dict[str, torch.Tensor]:
    """What is under model.vision_embed_tokens: separators, the projection, a bit of the image encoder."""
    clip = "img_processor.vision_model"
    sizes = {
        "glb_GN": (1, 1, 16),
        "sub_GN": (1, 1, 1, 16),
        "img_projection.0.weight": (shape.hidden, 16),
        "img_projection.0.bias": (shape.hidden,),
        f"{clip}.embeddings.class_embedding": (8,),
        f"{clip}.embeddings.patch_embedding.weight": (8, 3, 2, 2),
        f"{clip}.pre_layrnorm.weight": (8,),
        f"{clip}.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
    }
    return {
        f"model.vision_embed_tokens.{name}": torch.full(size, 7.0, dtype=DTYPES[shape.dtype])
        for name, size in sizes.items()
    }


def write_tokenizer(folder: Path) -> None:
    """Phi-3-vision's flags and its token for images, on a small vocabulary."""
    write_sentencepiece(folder)
    fast = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    image = {**fast["added_tokens"][-1], "id": IMAGE, "content": "<|image|>"}
    fast["added_tokens"] = [
        entry | {"rstrip": entry["content"] in STRIPPING} for entry in [*fast["added_tokens"], image]
    ]
    config["added_tokens_decoder"] = {
        str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in fast["added_tokens"]
    }
    config["chat_template"] = (
        "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '<|assistant|>\n' -}}"
        "{% endif %}"
    )
    (folder / "tokenizer.json").write_text(json.dumps(fast, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_vision(folder: Path, shape: Shape = SHAPE, shards: int = 1, seed: int = 0, **changes: Any) -> Path:
    """A complete checkpoint in a new folder: weights, config (`changes` replace its keys), tokenizer."""
    folder.mkdir(parents=True)
    write_weights(folder, phi3_tensors(shape, seed) | image_tensors(shape), shards)
    (folder / "config.json").write_text(json.dumps(vision_config(shape, **changes), indent=2))
    generation = {"bos_token_id": 1, "eos_token_id": [2, 700, 704], "pad_token_id": 700}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_tokenizer(folder)
    return folder
