"""Are the recipes that carry llama.cpp's names its own choices? Compares every tensor's type, on the demo.

    python bench/mix_conformance.py WORK --llama-cpp DIR

DIR holds llama.cpp's source in `llama.cpp` and its tools in `bin`. Exit code 1 if a tensor differs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from phi3edge.gguf_file import ggml_types, read_header
from phi3edge.gguf_names import tensor_name
from phi3edge.plan import make_plan
from phi3edge.recipes import load_recipe
from phi3edge.sources import resolve, resolve_spec

MIXES = ("q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0")


def main() -> int:
    """Convert once, quantize every mix, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    spec = resolve_spec("demo")
    full = args.work / "bf16.gguf"
    with resolve("demo") as checkpoint:
        convert = [sys.executable, args.llama_cpp / "llama.cpp" / "convert_hf_to_gguf.py", checkpoint.path]
    convert += ["--outtype", "bf16", "--outfile", full, "--model-name", "peer"]
    subprocess.run(list(map(str, convert)), check=True, capture_output=True)
    wrong = 0
    for mix in MIXES:
        theirs = args.work / f"{mix}.gguf"
        command = [args.llama_cpp / "bin" / "llama-quantize", full, theirs, mix.upper()]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        types = {t.name: ggml_types()[t.ggml_type].name for t in read_header(theirs).tensors}
        plan = make_plan(spec, *load_recipe(mix))
        differences = [
            f"{name}: {types[name]}, ours {t.codec}"
            for t in plan.tensors
            if types[name := tensor_name(t.tensor)] != t.codec
        ]
        print(f"{mix}: {len(plan.tensors)} tensors, {len(differences)} differ", *differences, sep="\n  ")
        wrong += len(differences)
        theirs.unlink()
    full.unlink()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
