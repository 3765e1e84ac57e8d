"""Memory of an artifact in llama.cpp, beside what `phi3edge plan` estimates.

    python bench/memory.py CHECKPOINT WORK [--target iphone] [--contexts 2048 4096]

Exports the checkpoint to WORK and runs 256 prompt tokens and 16 more in each context, with the plain kernels and with
those that llama.cpp picks itself: these repack 4-bit weights at load, so the pages of the mapped file count beside the
copy until the system takes them back. One JSON line per run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from phi3edge.build import export
from phi3edge.plan import estimate_fit
from phi3edge.runners import llama_cpp


def main() -> None:
    """Export once, run every context twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("work", type=Path)
    parser.add_argument("--target", default="iphone")
    parser.add_argument("--contexts", type=int, nargs="*", default=[2048, 4096])
    args = parser.parse_args()
    made = export(args.checkpoint, args.target, out=args.work / "artifact", force=True)
    target, kv_type = made.prepared.target, made.prepared.runtime.kv_cache
    for context in args.contexts:
        fit = estimate_fit(made.prepared.plan, target, "gguf", context)
        for plain in (True, False):
            with llama_cpp.open(made.artifact, context=context, kv_type=kv_type, plain=plain) as runner:
                runner.speed(256, 16)
                peak = runner.peak_memory()
            row = {"context": context, "kernels": "plain" if plain else "repacked", "peak_bytes": peak}
            print(json.dumps({**row, "estimate_bytes": fit.total, "peak_over_estimate": round(peak / fit.total, 3)}))


if __name__ == "__main__":
    main()
