"""Time and memory of a GGUF export in a model's shapes, beside llama.cpp's convert and quantize, in one run.

    python bench/export_cost.py WORK --llama-cpp DIR [--model mini] [--recipes q4_0 q4_k_m] [--layers N] [--rounds 1]

WORK gets a random bf16 checkpoint (mini 7.6 GB, medium 27.9 GB), kept for the next run, and artifacts, deleted again.
DIR holds llama.cpp's source in `llama.cpp` and its tools in `bin`. Without --llama-cpp only phi3edge is measured.
Each step is a process of its own; memory is the largest resident size of any process in it. One JSON line a step;
the ratios stand between. Memory should not grow with --layers 64, and little with --model medium.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from _random_checkpoint import MODELS, shapes_name, write_checkpoint

from phi3edge.machine import cpu_name

QUANTIZE_NAMES = {
    "q4_0": "Q4_0",
    "q4_k_s": "Q4_K_S",
    "q4_k_m": "Q4_K_M",
    "q5_k_m": "Q5_K_M",
    "q6_k": "Q6_K",
    "q8_0": "Q8_0",
}
MEASURE = (
    "import resource, subprocess, sys\n"
    "done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)\n"
    "sys.exit(done.returncode)\n"
)


def step(name: str, command: list[str | Path], wrote: Path) -> dict[str, float]:
    """Run a command; print and return its seconds, peak memory and the bytes that it wrote."""
    os.sync()
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, command)], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-2000:]}")
    held = (".gguf", ".onnx", ".data")
    files = [wrote] if wrote.is_file() else [f for f in wrote.iterdir() if f.suffix in held or ".onnx.data" in f.name]
    row = {
        "step": name,
        "seconds": round(seconds, 2),
        "peak_bytes": int(done.stdout.split()[-1]),
        "bytes": sum(f.stat().st_size for f in files),
    }
    print(json.dumps(row), flush=True)
    return row


def random_checkpoint(work: Path, model: str, layers: int | None) -> Path:
    """A random checkpoint in a model's shapes, made unless an earlier run did."""
    checkpoint = work / shapes_name(model, layers)
    if not checkpoint.exists():
        partial = work / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        write_checkpoint(partial, layers, model=model)
        partial.rename(checkpoint)
    return checkpoint


def main() -> None:
    """Make the checkpoint, run both sides, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--recipes", nargs="*", default=["q4_0", "q4_k_m"])
    parser.add_argument("--model", choices=MODELS, default="mini")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    checkpoint = random_checkpoint(args.work, args.model, args.layers)
    print(json.dumps({"machine": cpu_name(), "cores": os.cpu_count(), "checkpoint": checkpoint.name}), flush=True)
    for _ in range(args.rounds):
        rows = {}
        for recipe in args.recipes:
            out = args.work / "ours"
            command = [sys.executable, "-m", "phi3edge", "export", checkpoint, "--target", "cpu", "--recipe", recipe]
            command += ["--out", out, "--force", "--no-validate"]
            rows[recipe] = step(f"phi3edge {recipe}", command, out)
            shutil.rmtree(out)
        if not args.llama_cpp:
            continue
        full, quantized = args.work / "bf16.gguf", args.work / "quantized.gguf"
        convert = [sys.executable, args.llama_cpp / "llama.cpp" / "convert_hf_to_gguf.py", checkpoint]
        convert += ["--outtype", "bf16", "--outfile", full, "--model-name", "peer"]
        first = step("llama.cpp convert", convert, full)
        for recipe in args.recipes:
            quantize = [args.llama_cpp / "bin" / "llama-quantize", full, quantized, QUANTIZE_NAMES[recipe]]
            second = step(f"llama-quantize {recipe}", quantize, quantized)
            quantized.unlink()
            ours, theirs = rows[recipe]["seconds"], first["seconds"] + second["seconds"]
            print(json.dumps({"recipe": recipe, "time_over_llama_cpp": round(ours / theirs, 3)}), flush=True)
        full.unlink()


if __name__ == "__main__":
    main()
