"""A quantized model of 0.4 MB with random weights and no vocabulary: enough to see whether a GGUF runtime computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from phi3edge.gguf_file import ValueType, write_header

VOCABULARY = 64
_HIDDEN, _HEADS, _CONTEXT = 256, 4, 128
_F32, _Q4_0 = 0, 2  # ggml's numbers


def write(path: Path) -> None:
    """Writes the model: one phi3 block, linears in Q4_0, the type that runtimes repack and accelerate most."""
    u32, f32, string = ValueType.UINT32, ValueType.FLOAT32, ValueType.STRING
    metadata = {
        "general.architecture": (string, "phi3"),
        "phi3.vocab_size": (u32, VOCABULARY),
        "phi3.context_length": (u32, _CONTEXT),
        "phi3.rope.scaling.original_context_length": (u32, _CONTEXT),
        "phi3.embedding_length": (u32, _HIDDEN),
        "phi3.feed_forward_length": (u32, _HIDDEN),
        "phi3.block_count": (u32, 1),
        "phi3.attention.head_count": (u32, _HEADS),
        "phi3.attention.layer_norm_rms_epsilon": (f32, 1e-5),
        "phi3.rope.dimension_count": (u32, _HIDDEN // _HEADS),
        "tokenizer.ggml.model": (string, "none"),
    }
    rows = {
        "token_embd": VOCABULARY,
        "output_norm": None,
        "output": VOCABULARY,
        "blk.0.attn_norm": None,
        "blk.0.attn_qkv": 3 * _HIDDEN,
        "blk.0.attn_output": _HIDDEN,
        "blk.0.ffn_norm": None,
        "blk.0.ffn_up": 2 * _HIDDEN,
        "blk.0.ffn_down": _HIDDEN,
    }
    types = [_F32 if count is None else _Q4_0 for count in rows.values()]
    shapes = [(_HIDDEN,) if count is None else (count, _HIDDEN) for count in rows.values()]
    data = [_ones() if count is None else _blocks(count) for count in rows.values()]
    names = [f"{name}.weight" for name in rows]
    with path.open("wb") as file:
        offsets = write_header(file, metadata, list(zip(names, types, shapes, map(len, data), strict=True)))
        for offset, content in zip(offsets, data, strict=True):
            file.seek(offset)
            file.write(content)


def _ones() -> bytes:
    return np.ones(_HIDDEN, np.float32).tobytes()


def _blocks(rows: int) -> bytes:
    """Q4_0 blocks: a float16 scale and 32 random 4-bit codes each."""
    blocks = np.empty(rows * _HIDDEN // 32, np.dtype([("scale", "<f2"), ("codes", "u1", 16)]))
    blocks["scale"] = 0.01
    blocks["codes"] = np.random.default_rng(rows).integers(0, 256, blocks["codes"].shape)
    return blocks.tobytes()
