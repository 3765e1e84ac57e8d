"""Tokens per second and memory in Phi-3-mini-4k's shapes: our folders, the builder's and a GGUF, side by side.

    python bench/decode.py WORK [--recipes int4] [--folders DIR ...] [--builder DIR] [--gguf FILE] [--layers 32]

WORK gets what is not given, kept for the next run: a random checkpoint (7.6 GB at 32 layers), a folder of ours a
recipe, and in the builder's place a twin with the same graph and random weights, for the builder itself needs 24 GB.
FILE is a Q4_K_M, for example; without it, llama.cpp is left out. Each model is open in a process of its own, all at
once (about 3 GB each), and they take turns; the builder's folder runs twice, with the same threads as the others and
with what it says itself ("as written": the runtime chooses). One JSON line a model, then the ratios to ours: `best`
compares the best rounds, `median` is the median of the rounds' ratios. On a busy machine both lie.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from _builder_twin import write_builder_twin
from _random_checkpoint import write_checkpoint

from phi3edge.build import export
from phi3edge.machine import cpu_name, usable_cores
from phi3edge.runners import Runner, llama_cpp, ort_genai

AS_WRITTEN = "builder as written"


def kept(path: Path, write: Callable[[Path], object]) -> Path:
    """`path`, written unless an earlier run did."""
    if not path.exists():
        unfinished = path.with_name("unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write(unfinished)
        unfinished.rename(path)
    return path


def export_recipe(checkpoint: Path, recipe: str, out: Path) -> None:
    """Our folder by a recipe."""
    export(str(checkpoint), "cpu", recipe=recipe, format_="onnx", out=out)


def open_as_written(folder: Path, context: int, work: Path) -> Runner:
    """A folder with the runtime's own choice of threads, which then spin, as a program that just opens it gets."""
    linked = work / AS_WRITTEN.replace(" ", "-")
    shutil.rmtree(linked, ignore_errors=True)
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).hardlink_to(path)
    options = {"folder": str(linked), "context": context, "threads": 0, "plain": False, "vocab_only": False}
    return Runner("ort_genai", ort_genai.RUNTIME, linked, options, timeout=600)


def measure(
    runners: dict[str, Runner], prompt: int, decode: int, rounds: int, prompt_rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of each model by round, in turns."""
    found: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prompt": []} for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            found[name]["decode"].append(runner.speed(16, decode)["decode_tokens_per_s"])
    for _ in range(prompt_rounds):
        for name, runner in runners.items():
            found[name]["prompt"].append(runner.speed(prompt, 1)["prompt_tokens_per_s"])
    return found


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ours over theirs: best round over best round, and the median of the rounds."""
    return {
        "best": round(max(ours) / max(theirs), 3),
        "median": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3),
    }


def main() -> None:
    """Make or take the models, measure them, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--recipes", nargs="*", default=["int4"])
    parser.add_argument("--folders", nargs="*", type=Path, default=[])
    parser.add_argument("--builder", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--decode", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompt-rounds", type=int, default=3)
    args = parser.parse_args()
    work, layers = args.work, args.layers
    work.mkdir(parents=True, exist_ok=True)
    ours = {folder.name: folder for folder in args.folders}
    for recipe in args.recipes:
        checkpoint = kept(work / f"phi-3-mini-shapes-{layers}", partial(write_checkpoint, layers=layers))
        ours[recipe] = kept(work / f"{recipe}-{layers}", partial(export_recipe, checkpoint, recipe))
    builder = args.builder or kept(work / f"builder-twin-{layers}", partial(write_builder_twin, layers=layers))
    print(json.dumps({"machine": cpu_name(), "cores": usable_cores(), "layers": layers}), flush=True)
    with ExitStack() as stack:
        runners = {
            name: ort_genai.open(path, context=args.context, threads=args.threads) for name, path in ours.items()
        }
        runners["builder"] = ort_genai.open(builder, context=args.context, threads=args.threads)
        runners[AS_WRITTEN] = open_as_written(builder, args.context, work)
        if args.gguf:
            runners["llama.cpp"] = llama_cpp.open(args.gguf, context=args.context, threads=args.threads)
        for runner in runners.values():
            stack.enter_context(runner)
        found = measure(runners, args.prompt, args.decode, args.rounds, args.prompt_rounds)
        sizes = {name: sum(p.stat().st_size for p in ort_genai.files(path)) for name, path in ours.items()}
        sizes |= dict.fromkeys(("builder", AS_WRITTEN), sum(p.stat().st_size for p in ort_genai.files(builder)))
        if args.gguf:
            sizes["llama.cpp"] = sum(p.stat().st_size for p in llama_cpp.files(args.gguf))
        for name, runner in runners.items():
            row = {
                "model": name,
                "threads": runner.info()["threads"] or "runtime's choice",
                "decode_tokens_per_s": round(max(found[name]["decode"]), 2),
                "prompt_tokens_per_s": round(max(found[name]["prompt"]), 1),
                "load_s": round(runner.info()["load_s"], 2),
                "peak_bytes": runner.peak_memory(),
                "bytes": sizes[name],
            }
            print(json.dumps(row), flush=True)
    for mine in ours:
        for peer in (name for name in runners if name not in ours):
            row = {kind: ratio(found[mine][kind], found[peer][kind]) for kind in ("decode", "prompt")}
            print(json.dumps({"ours": mine, "over": peer, **row}), flush=True)


if __name__ == "__main__":
    main()
