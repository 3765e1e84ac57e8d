"""The demo without a grid: its 4-bit original gets uniform noise of up to half a step before it is rewritten.

The demo's weights descend from Q4_1's grid, which random channel scales hide; a method that undoes such scales finds
part of the grid again, and seems better than it is. Here there is none to find, and there are no scales to undo.
"""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np

from phi3edge import demo
from phi3edge.cache import cache_dir

Q4_1, BLOCK_BYTES, BLOCK_SIZE = 3, 20, 32


def write_dithered_demo(folder: Path, seed: int = 0) -> None:
    """A checkpoint in a new folder, in the demo's shapes: another model, and a little worse than the demo."""
    random, plain = np.random.default_rng(seed), demo.DEQUANTIZE[Q4_1]

    def dithered(data: np.ndarray) -> np.ndarray:
        step = data.reshape(-1, BLOCK_BYTES)[:, :2].copy().view("<f2").astype(np.float32)
        noise = random.uniform(-0.5, 0.5, (len(step), BLOCK_SIZE)).astype(np.float32)
        return plain(data) + step * noise

    folder.mkdir(parents=True)
    with patch.dict(demo.DEQUANTIZE, {Q4_1: dithered}), patch.object(demo, "SPREAD", 0.0):
        demo.write_checkpoint(demo.original_gguf(cache_dir()), folder)
