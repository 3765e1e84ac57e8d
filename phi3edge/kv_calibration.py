"""Scales for an 8-bit KV cache, from the keys and values that the float32 reference computes on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from phi3edge.progress import Stages, silent
from phi3edge.reference import load_model, load_tokenizer, loading
from phi3edge.text import Text, cut, default_text
from phi3edge.types import KVScales

if TYPE_CHECKING:
    import torch

CHUNKS, CHUNK_TOKENS = 16, 256
LARGEST_CODE = 127
HEADROOM = 1.25
"""Room for what other text exceeds the calibration's largest magnitude by. KL of the demo, full precision but for the
cache, on 10 chunks of wikitext-2 after calibration on documentation: 0.0028 with 1, 0.0011 with 1.25, 0.0013 with 1.5,
0.0024 with 2."""


def calibrate_kv(checkpoint: Path, text: Text | None = None, stages: Stages = silent) -> KVScales:
    """Runs the reference over the last 4,096 tokens of a text and takes every channel's largest magnitude.

    The last ones, since validation scores the first.

    Keys are taken as they lie in the cache: after the rotary embedding. What is larger than HEADROOM times the largest
    is clipped.

    Args:
        checkpoint: folder in Hugging Face layout.
        text: None for the documentation inside Python.
        stages: shows progress.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        CheckpointError: transformers cannot load the checkpoint or its tokenizer.
        UsageError: the text is too short, or the weights do not fit into the free memory, and stand in the files as
            integers.
    """
    text = text or default_text()
    last = load_tokenizer(checkpoint)(text.text)["input_ids"][-CHUNKS * CHUNK_TOKENS :]
    ids = cut(last, CHUNKS, CHUNK_TOKENS, CHUNK_TOKENS, text.name)
    with stages(loading(checkpoint), None):
        model = load_model(checkpoint)
    import torch

    largest: list[tuple[np.ndarray, np.ndarray]] = []
    with torch.inference_mode(), stages("KV calibration", CHUNKS) as advance:
        for tokens in ids:
            cache = model.model(torch.from_numpy(tokens)[None], use_cache=True).past_key_values
            found = [(_channels(layer.keys), _channels(layer.values)) for layer in cache.layers]
            largest = [
                (np.maximum(k, a), np.maximum(v, b)) for (k, v), (a, b) in zip(largest or found, found, strict=True)
            ]
            advance(1)
    keys, values = (np.stack(side) * (HEADROOM / LARGEST_CODE) for side in zip(*largest, strict=True))
    tiny = np.finfo(np.float32).tiny  # for a channel that is always 0
    return KVScales(np.maximum(keys, tiny), np.maximum(values, tiny))


def _channels(cached: torch.Tensor) -> np.ndarray:
    """Largest magnitude by channel, (KV heads, head size), of keys or values (1, KV heads, tokens, head size)."""
    return cached[0].abs().amax(1).numpy()
