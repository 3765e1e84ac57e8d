"""Calibrated artifacts of the demo beside the peers' of the same layout or size, all scored in one run.

    python bench/calibrated.py WORK --llama-cpp DIR --text FILE [--calibration FILE] [--second-text FILE]

DIR holds llama.cpp's source in `llama.cpp` and its tools in `bin`. `--text` is scored on. `--calibration` is what
llama.cpp's importance matrix is made on, all of it, and what we calibrate on, 48 sequences of 512 tokens of it. Without
it we take our default text, and the peers `--peer-calibration`. Names: q4_0, q4_k_m, iq4_xs (ours: a budget of the
peer's bytes), onnx (peer: onnxruntime-genai's builder with k_quant_mixed). Export times are those of runs on text that
was not generated yet. One JSON line an artifact, then the ratios of KL and bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from phi3edge.budget import Budget
from phi3edge.build import export
from phi3edge.rounding import Rounding
from phi3edge.sources import resolve
from phi3edge.text import read_text
from phi3edge.validate import Windows, validate

METRICS = ("ppl", "ppl_ratio", "kl_mean", "kl_p99", "top1")
PEERS = {"q4_0": "Q4_0", "q4_k_m": "Q4_K_M", "iq4_xs": "IQ4_XS", "onnx": "k_quant_mixed"}
ONNX_RECIPE = "int4-mixed"


def run(*command: object) -> None:
    """Run a peer's tool; its talk is shown only if it fails."""
    subprocess.run(list(map(str, command)), check=True, capture_output=True)


def make_peer(name: str, folder: Path, work: Path, tools: Path, calibration: Path) -> Path:
    """The peer's artifact, made unless an earlier run did."""
    if name == "onnx":
        out = work / "peer-onnx"
        if not out.exists():
            builder = (sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", out, "-p", "int4")
            options = ("--extra_options", "int4_accuracy_level=4", "algo_config=k_quant_mixed")
            run(*builder, "-e", "cpu", "-c", work / "cache", *options)
        return out
    full, matrix, out = work / "bf16.gguf", work / "imatrix.gguf", work / f"peer-{name}.gguf"
    if not full.exists():
        convert = tools / "llama.cpp" / "convert_hf_to_gguf.py"
        run(sys.executable, convert, folder, "--outtype", "bf16", "--outfile", full, "--model-name", "peer")
    if not matrix.exists():
        run(tools / "bin" / "llama-imatrix", "-m", full, "-f", calibration, "-o", matrix, "-c", 512)
    if not out.exists():
        run(tools / "bin" / "llama-quantize", "--imatrix", matrix, full, out, PEERS[name])
    return out


def make_ours(name: str, work: Path, rounding: Rounding, limit: int) -> Path:
    """Our artifact: the peer's layout, or the best mix within its bytes."""
    out = work / f"ours-{name}"
    if name == "onnx":
        export("demo", "cpu", recipe=ONNX_RECIPE, format_="onnx", out=out, rounding=rounding, force=True)
        return out
    chosen = {"budget": Budget(bytes=limit)} if name == "iq4_xs" else {"recipe": name}
    return export("demo", "cpu", format_="gguf", out=out, rounding=rounding, force=True, **chosen).artifact


def size(artifact: Path) -> int:
    """Bytes of a file, or of a folder's graph and weights."""
    return sum(f.stat().st_size for f in ([artifact] if artifact.is_file() else artifact.glob("*.onnx*")))


def main() -> None:
    """Make both sides, score them, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--second-text", type=Path)
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--peer-calibration", type=Path)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--only", nargs="*", default=list(PEERS), choices=list(PEERS))
    args = parser.parse_args()
    theirs_on = args.peer_calibration or args.calibration
    if theirs_on is None:
        parser.error("llama.cpp's importance matrix needs a text: --calibration or --peer-calibration")
    args.work.mkdir(parents=True, exist_ok=True)
    with resolve("demo") as checkpoint:
        folder = checkpoint.path
    texts = [read_text(path) for path in (args.text, args.second_text) if path]
    rounding = Rounding("gptq", str(args.calibration) if args.calibration else None, args.sequences)
    ratios = []
    for name in args.only:
        peer = make_peer(name, folder, args.work, args.llama_cpp, theirs_on)
        start = time.perf_counter()
        ours = make_ours(name, args.work, rounding, size(peer))
        seconds = time.perf_counter() - start
        for text in texts:
            kl = {}
            for side, artifact in (("phi3edge", ours), (PEERS[name], peer)):
                found = validate(artifact, folder, text=text, windows=Windows(args.chunks))[0].metrics
                row = {metric: round(found[metric].value, 5) for metric in METRICS} | {"bytes": size(artifact)}
                print(json.dumps({"by": side, "name": name, "text": text.name, **row}), flush=True)
                kl[side] = row["kl_mean"]
            ratios.append(
                {
                    "name": name,
                    "text": text.name,
                    "kl_over_peer": round(kl["phi3edge"] / kl[PEERS[name]], 3),
                    "bytes_over_peer": round(size(ours) / size(peer), 4),
                    "export_seconds": round(seconds),
                }
            )
    for row in ratios:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
