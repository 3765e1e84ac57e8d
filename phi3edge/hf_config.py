"""A checkpoint's configuration for transformers, where its own words are not what transformers 5 reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from phi3edge.types import JSON

IMAGES = ("embd_layer", "img_processor")
"""Keys of Phi-3-vision's config.json that say how images become rows of the embedding."""


def text_config(config: JSON) -> JSON:
    """config.json of a model's text decoder: Phi-3-vision's as the Phi-3 that it is, any other as it is."""
    if config.get("model_type") != "phi3_v":
        return config
    kept = {key: value for key, value in config.items() if key not in IMAGES}
    return kept | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}


def readable_config(checkpoint: Path) -> Any:
    """The configuration in today's words, for the `config` of transformers' from_pretrained; None if its own will do.

    LongRoPE was called "su" in the first checkpoints, which said its original context once, outside the parameters.
    Of Phi-3-vision it is that of the text decoder.
    """
    path = checkpoint / "config.json"
    given = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = text_config(given)
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("type") == "su":
        moved = {key: config[key] for key in ("original_max_position_embeddings", "rope_theta") if key in config}
        config = config | {"rope_scaling": {**scaling, "type": "longrope", "rope_type": "longrope", **moved}}
    if config is given:
        return None
    import transformers

    dropped = ("auto_map", "_attn_implementation")  # the latter names a package that computes the same
    return transformers.AutoConfig.for_model(**{key: config[key] for key in config if key not in dropped})
