"""Compare every codec with the quantizer of the runtime that reads it, ggml's or onnxruntime's: time and squared error.

Both sides use one thread.

    python bench/codecs.py [--checkpoint NAME] [--only q4_k,iq4_xs] [--limit 8000000] [--repeats 3] [--json]

NAME is a folder in Hugging Face's layout, a hub name, or "demo" (the default). Tensors are taken from the middle of
the model until the limit of weights is reached. Each repeat times both sides in turn, and the fastest of each counts.
The importance is a stand-in for a calibration: log-normal, sigma 1.5, seeded; onnxruntime's quantizer knows none. The
squared error is sum(importance * (weight - decoded)**2), both sides decoded by gguf-py or, for affine codecs, by our
own code, which tests hold against MatMulNBits. Ratios are ours over theirs: below 1 is better in all columns.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import _ggml  # noqa: E402
import _ort  # noqa: E402

from phi3edge.codecs import codec, codec_names, is_float  # noqa: E402
from phi3edge.sources import resolve  # noqa: E402


def weights(checkpoint: str, limit: int) -> dict[str, np.ndarray]:
    """Two-dimensional tensors from the middle of a checkpoint, cut to rows that fill the limit."""
    chosen: dict[str, np.ndarray] = {}
    with resolve(checkpoint) as opened:
        matrices = [name for name in opened.names if len(opened.info(name)[1]) == 2 and ".layers." in name]
        kinds: dict[str, list[str]] = {}
        for name in matrices:
            kinds.setdefault(name.split(".layers.")[1].split(".", 1)[1], []).append(name)
        for same_kind in kinds.values():
            name = same_kind[len(same_kind) // 2]
            rows, columns = opened.info(name)[1]
            keep = min(rows, max(1, limit // len(kinds) // columns))
            chosen[name] = opened.rows(name, 0, keep)
    return chosen


def rival(module: Any, weight: np.ndarray, importance: np.ndarray | None) -> Any:
    """What the runtime's own quantizer makes of a weight."""
    if "onnx" in module.FORMATS and not is_float(module.NAME):
        return _ort.quantize(module, weight)
    return _ggml.quantize_chunk(module, weight, importance)


def error(weight: np.ndarray, made: Any, module: Any, importance: np.ndarray | None) -> float:
    """The weighted squared error of packed bytes, or of an affine codec's Quantized."""
    if "onnx" in module.FORMATS and not is_float(module.NAME):
        decoded = module.dequantize(module.unpack(made) if isinstance(made, np.ndarray) else made)
    else:
        decoded = gguf.quants.dequantize(made, gguf.GGMLQuantizationType(module.GGML_TYPE))
    squares = (weight - decoded).astype(np.float64) ** 2
    return float((squares if importance is None else squares * importance).sum())


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call took, and what it gave."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def compare(name: str, tensors: dict[str, np.ndarray], weighted: bool, repeats: int) -> dict[str, float | None]:
    """Sums over all tensors that the codec holds."""
    module = codec(name)
    seconds = np.zeros(2)
    errors = np.zeros(2)
    size = 0
    for weight in tensors.values():
        columns = weight.shape[1]
        if columns % module.BLOCK_SIZE:
            continue
        random = np.random.default_rng(columns)
        importance = np.exp(1.5 * random.standard_normal(columns)).astype(np.float32) if weighted else None
        module.pack(module.quantize(weight[:1], importance))  # compiles
        best = np.full(2, np.inf)
        for _ in range(repeats):
            our_time, ours = timed(lambda w=weight, i=importance: module.pack(module.quantize(w, i)))
            their_time, theirs = timed(lambda w=weight, i=importance: rival(module, w, i))
            best = np.minimum(best, (our_time, their_time))
        seconds += best
        errors += error(weight, ours, module, importance), error(weight, theirs, module, importance)
        size += weight.size
    return {
        "weights": size,
        "our_weights_per_second": size / seconds[0] if size else None,
        "their_weights_per_second": size / seconds[1] if size else None,
        "time_ratio": seconds[0] / seconds[1] if size else None,
        "error_ratio": errors[0] / errors[1] if errors[1] else None,
    }


def table(results: dict[str, dict[str, Any]]) -> Table:
    """What `compare` found, for people."""
    out = Table(title="ours over ggml's or onnxruntime's, one thread; below 1 is better")
    for column in ("codec", "Mw/s", "time", "error", "Mw/s, weighted", "time, weighted", "error, weighted"):
        out.add_column(column, justify="left" if column == "codec" else "right")
    for name, result in results.items():
        cells = []
        for one in (result["plain"], result["weighted"]):
            speed = one["our_weights_per_second"]
            cells.append("-" if speed is None else f"{speed / 1e6:.0f}")
            cells += ["-" if one[key] is None else f"{one[key]:.3f}" for key in ("time_ratio", "error_ratio")]
        out.add_row(name, *cells)
    return out


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(codec_names()))
    parser.add_argument("--limit", type=int, default=8_000_000, help="weights to read")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tensors = weights(options.checkpoint, options.limit)
    results = {}
    for name in options.only:
        results[name] = {
            "plain": compare(name, tensors, weighted=False, repeats=options.repeats),
            # Float codecs round every weight by itself.
            "weighted": compare(name, {} if is_float(name) else tensors, weighted=True, repeats=options.repeats),
        }
    if options.json:
        print(json.dumps({"checkpoint": options.checkpoint, "tensors": list(tensors), "codecs": results}, indent=2))
    else:
        Console().print(table(results))


if __name__ == "__main__":
    main()
