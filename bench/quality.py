"""Quality and size of our artifacts of the demo beside llama.cpp's own, against the same reference, in one run.

    python bench/quality.py WORK --llama-cpp DIR [--text FILE] [--chunks 40] [--recipes q4_0 q4_k_m]

DIR holds llama.cpp's source in `llama.cpp` and its tools in `bin`. FILE is the text to score on, for example
wikitext-2's test set; without it, the documentation inside Python. Prints one JSON line per artifact, then the ratios
of KL and bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from phi3edge.build import export
from phi3edge.sources import resolve
from phi3edge.text import default_text, read_text
from phi3edge.validate import Windows, validate

METRICS = ("ppl", "ppl_ratio", "kl_mean", "kl_p99", "top1")


def main() -> None:
    """Make both sides' artifacts, score them all, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--recipes", nargs="*", default=["q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0"])
    args = parser.parse_args()
    text = read_text(args.text) if args.text else default_text()
    with resolve("demo") as checkpoint:
        folder = checkpoint.path
    full = args.work / "bf16.gguf"
    args.work.mkdir(parents=True, exist_ok=True)
    convert = [sys.executable, args.llama_cpp / "llama.cpp" / "convert_hf_to_gguf.py", folder]
    convert += ["--outtype", "bf16", "--outfile", full, "--model-name", "peer"]
    subprocess.run(list(map(str, convert)), check=True, capture_output=True)

    def score(artifact: Path, side: str, recipe: str) -> dict[str, float]:
        found = validate(artifact, folder, text=text, windows=Windows(args.chunks))[0].metrics
        row = {name: round(found[name].value, 5) for name in METRICS} | {"bytes": artifact.stat().st_size}
        print(json.dumps({"by": side, "recipe": recipe, **row}), flush=True)
        return row

    ratios = []
    for recipe in args.recipes:
        ours = score(
            export("demo", "cpu", recipe=recipe, out=args.work / recipe, force=True).artifact, "phi3edge", recipe
        )
        peer = args.work / f"peer-{recipe}.gguf"
        quantize = [args.llama_cpp / "bin" / "llama-quantize", full, peer, recipe.upper()]
        subprocess.run(list(map(str, quantize)), check=True, capture_output=True)
        theirs = score(peer, "llama.cpp", recipe)
        ratios.append(
            {
                "recipe": recipe,
                "kl_over_llama_cpp": round(ours["kl_mean"] / theirs["kl_mean"], 3),
                "bytes_more_than_llama_cpp": ours["bytes"] - theirs["bytes"],
            }
        )
        peer.unlink()
    for row in ratios:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
