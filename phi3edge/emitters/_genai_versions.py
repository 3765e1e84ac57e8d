"""Least versions of the runtimes for what a folder holds.

Each was found by running small folders in released versions on the CPU, prompts and token by token, and comparing the
logits with transformers: a version that is too old often loads a folder and computes something else.
"""

from __future__ import annotations

from phi3edge.codecs import codec, is_float
from phi3edge.types import QuantPlan, TensorPlan

GENAI = (0, 9)
"""onnxruntime-genai 0.8 answers prompts that are longer than the sliding window wrongly."""

ONNXRUNTIME = (1, 23)
"""onnxruntime 1.22 knows fewer inputs of GroupQueryAttention than the builder connects."""

WINDOW = (1, 24)
"""1.23 attends to other positions than it should beyond a sliding window."""

INT8_CACHE = (1, 27)
"""1.24 knows no scales of the KV cache; 1.25 and 1.26 fail on the first prompt."""

ODD_ROWS = (1, 27)
"""Versions before it gather rows of an odd number of blocks with 4-bit zero points wrongly (1.23 to 1.26 run)."""

BLOCK_SPARSE = (1, 31)
"""The only version that block-sparse attention was run in."""


def requires(plan: QuantPlan, kv_cache: str) -> dict[str, str]:
    """Least version by the runtime's name, for the manifest.

    Args:
        plan: what the folder holds.
        kv_cache: "f32", "f16" or "int8".
    """
    window = plan.model.sliding_window
    needed = [
        ONNXRUNTIME,
        *([WINDOW] if window is not None and window < plan.model.context_length else []),
        *([INT8_CACHE] if kv_cache == "int8" else []),
        *([BLOCK_SPARSE] if plan.model.block_sparse else []),
        *([ODD_ROWS] if any(_gathers_odd_rows(t) for t in plan.tensors) else []),
    ]
    least = {"onnxruntime-genai": GENAI, "onnxruntime": max(needed)}
    return {name: f">={'.'.join(map(str, version))}" for name, version in least.items()}


def _gathers_odd_rows(planned: TensorPlan) -> bool:
    if planned.tensor.role != "embedding" or is_float(planned.codec):
        return False
    grid = codec(planned.codec)
    return grid.bits == 4 and not grid.signed and planned.tensor.shape[-1] // grid.BLOCK_SIZE % 2 == 1
