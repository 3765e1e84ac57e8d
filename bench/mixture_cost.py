"""Time, peak memory and bytes of an export in Phi-3.5-MoE's shapes, by the command as a user runs it.

    python bench/mixture_cost.py WORK [--layers 1] [--experts 16] [--methods rtn gptq] [--format gguf] [--sequences 8]

WORK gets a random bf16 checkpoint, kept for the next run (2.6 GB a layer with 16 experts, and 0.5 GB), and what is
exported and rounded, which is deleted. Each step is a process of its own; memory is the largest resident size of any
process in it, and should grow neither with --layers nor with --experts. A sequence has 512 tokens. One JSON line for
each step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from _random_checkpoint import PIECES, write_mixture
from decode import kept
from export_cost import step

from phi3edge.machine import cpu_name, usable_cores

RECIPES = {"gguf": "q4_0", "onnx": "int4"}


def main() -> None:
    """Make the checkpoint, run the command once for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--methods", nargs="*", default=["rtn", "gptq"])
    parser.add_argument("--format", choices=list(RECIPES), default="gguf")
    parser.add_argument("--sequences", type=int, default=8)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint = kept(
        args.work / f"phi-3.5-moe-shapes-{args.layers}-{args.experts}",
        partial(write_mixture, layers=args.layers, experts=args.experts),
    )
    machine = {"machine": cpu_name(), "cores": usable_cores(), "layers": args.layers, "experts": args.experts}
    print(json.dumps(machine), flush=True)
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        os.environ["PHI3EDGE_CACHE"] = scratch
        text, out = Path(scratch) / "text.txt", Path(scratch) / "out"
        numbers = np.random.default_rng(0).integers(300, PIECES, 640 * args.sequences)
        text.write_text(" ".join(f"w{n}" for n in numbers))
        for method in args.methods:
            command = [sys.executable, "-m", "phi3edge", "export", checkpoint, "--target", "cpu"]
            command += ["--format", args.format, "--recipe", RECIPES[args.format], "--method", method]
            if method != "rtn":
                command += ["--calibration", text, "--sequences", str(args.sequences)]
            step(f"{args.format} {method}", [*command, "--out", out, "--no-validate", "--force"], out)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
