"""A checkpoint's configuration for transformers, where its own words are older than what transformers 5 reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def readable_config(checkpoint: Path) -> Any:
    """The configuration in today's words, for the `config` of transformers' from_pretrained; None if its own will do.

    LongRoPE was called "su" in the first checkpoints, which said its original context once, outside the parameters.
    """
    path = checkpoint / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict) or scaling.get("type") != "su":
        return None
    import transformers

    moved = {key: config[key] for key in ("original_max_position_embeddings", "rope_theta") if key in config}
    renamed = {**scaling, "type": "longrope", "rope_type": "longrope", **moved}
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    return transformers.AutoConfig.for_model(**kept | {"rope_scaling": renamed})
