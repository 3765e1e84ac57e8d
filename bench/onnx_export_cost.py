"""Time, memory and bytes of an ONNX export in a model's shapes, beside onnxruntime-genai's builder, in one run.

    python bench/onnx_export_cost.py WORK [--model mini] [--recipes int4] [--layers N] [--without-builder]

WORK gets a random bf16 checkpoint, kept for the next run, and the artifacts, which are deleted. The builder holds the
whole model, several times: 24 GB for mini, so take fewer of them on a smaller machine. Each step is a process of
its own; memory is the largest resident size of any process in it. One JSON line a step, then the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from _random_checkpoint import MODELS
from export_cost import random_checkpoint, step

from phi3edge.machine import cpu_name


def main() -> None:
    """Make the checkpoint, run both sides, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--recipes", nargs="*", default=["int4"])
    parser.add_argument("--model", choices=MODELS, default="mini")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--without-builder", action="store_true")
    args = parser.parse_args()
    checkpoint = random_checkpoint(args.work, args.model, args.layers)
    print(json.dumps({"machine": cpu_name(), "cores": os.cpu_count(), "checkpoint": checkpoint.name}), flush=True)
    rows = {}
    for recipe in args.recipes:
        out = args.work / "ours"
        command = [sys.executable, "-m", "phi3edge", "export", checkpoint, "--target", "cpu", "--format", "onnx"]
        command += ["--recipe", recipe, "--out", out, "--force", "--no-validate"]
        rows[recipe] = step(f"phi3edge {recipe}", command, out)
        shutil.rmtree(out)
    if args.without_builder:
        return
    out = args.work / "builder"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", out, "-p", "int4"]
    command += ["-e", "cpu", "-c", args.work / "cache", "--extra_options", "int4_accuracy_level=4"]
    theirs = step("builder int4", command, out)
    shutil.rmtree(out)
    for recipe, ours in rows.items():
        ratios = {
            f"{what}_over_builder": round(ours[key] / theirs[key], 3)
            for what, key in (("time", "seconds"), ("memory", "peak_bytes"), ("bytes", "bytes"))
        }
        print(json.dumps({"recipe": recipe, **ratios}), flush=True)


if __name__ == "__main__":
    main()
