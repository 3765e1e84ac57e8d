"""Time and peak memory of calibrated rounding in Phi-3-mini's shapes, from a few blocks of random weights.

    python bench/calibration_cost.py WORK [--layers 2] [--sequences 64] [--codec q4_0] [--device cpu]

WORK gets a random checkpoint of that many layers (0.23 GB each, and 0.39 GB). One JSON line: seconds a block, those of
all 32 if every block takes as long, tokens a second through both copies of the model, and the peak memory of the
process, which holds one block whatever the depth. What the model's own text takes to write is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from _random_checkpoint import write_checkpoint
from decode import kept

from phi3edge.calibrate import round_model
from phi3edge.calibration import CalibrationText
from phi3edge.checkpoint import open_checkpoint
from phi3edge.codecs import row_bytes
from phi3edge.families import parse_config
from phi3edge.forward import LINEARS
from phi3edge.machine import cpu_name, usable_cores
from phi3edge.rewrite import Rewritten
from phi3edge.types import QuantPlan, TensorPlan

MINI_LAYERS = 32


def main() -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--codec", default="q4_0")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    folder = kept(
        args.work / f"phi-3-mini-shapes-{args.layers}", lambda path: write_checkpoint(path, layers=args.layers)
    )
    with open_checkpoint(folder) as checkpoint, tempfile.TemporaryDirectory(dir=args.work) as cache:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "phi-3-mini")
        ids = np.random.default_rng(0).integers(0, spec.vocab_size, (args.sequences, 512))
        tensors = []
        for t in spec.tensors:
            codec, method = (args.codec, "gptq") if t.role in LINEARS else ("f32", "cast")
            tensors.append(TensorPlan(t, codec, method, row_bytes(codec, t.shape[-1]) * (t.size // t.shape[-1])))
        plan = QuantPlan(spec, "bench", tuple(tensors))
        text = CalibrationText(ids, "random tokens")
        os.environ["PHI3EDGE_CACHE"] = cache
        start = time.perf_counter()
        round_model(Rewritten(checkpoint, spec), plan, text, args.device)
        seconds = (time.perf_counter() - start) / args.layers
    row = {
        "machine": cpu_name(),
        "cores": usable_cores(),
        "device": args.device,
        "tokens": ids.size,
        "codec": args.codec,
        "seconds_per_block": round(seconds, 1),
        "minutes_for_32_blocks": round(seconds * MINI_LAYERS / 60, 1),
        "tokens_per_s_and_block": round(ids.size / seconds, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
