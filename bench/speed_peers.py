"""`phi3edge bench` beside the runtimes' own benchmarks, on the same artifacts, in turns: ratios of tokens per second.

    python bench/speed_peers.py ARTIFACT ... [--llama-bench FILE] [--threads 1] [--prompt 512] [--decode 64]

GGUF files run in llama-bench, whose program is given, and in our runner on the libraries that lie beside that program,
so that both are one build. ONNX Runtime GenAI folders run in what onnxruntime-genai's benchmark_e2e.py measures, made
again here with its public API, because the package does not bring the script: a whole prompt appended to a new
generator, then one token after another; the first, which only chooses, is not counted. Decoding is measured behind the
prompt. Both sides get the same threads, context lengths and KV cache, and a new process each round; who begins changes
from round to round. One JSON line a test: `median` is the median of the rounds' ratios, ours over theirs, each of
their medians; `best` is our best sample of all over theirs. On a busy machine the first lies, and the second less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from phi3edge.machine import usable_cores
from phi3edge.speed import Sweep, benchmark, model_of

Figures = dict[str, list[float]]
"""Tokens per second of each sample by test: "pp512", "tg64 @ d512"."""


def ours(artifact: Path, args: argparse.Namespace) -> Figures:
    """What `phi3edge bench` finds."""
    sweep = Sweep((args.prompt,), (args.decode,), (0, args.prompt), (args.threads,), repeats=args.repeats)
    found = benchmark(artifact, sweep)
    return {test.name: test.tokens_per_s for _, test in found.rows()}


def llama_bench(artifact: Path, args: argparse.Namespace) -> Figures:
    """What llama-bench finds."""
    numbers = {"-p": args.prompt, "-n": args.decode, "-d": f"0,{args.prompt}", "-t": args.threads, "-r": args.repeats}
    flags = [str(word) for pair in numbers.items() for word in pair]
    done = subprocess.run(
        [args.llama_bench, "-m", artifact, *flags, "-ngl", "0", "-o", "jsonl"], check=True, capture_output=True
    )
    found = {}
    for row in map(json.loads, done.stdout.splitlines()):
        work = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
        found[work + (f" @ d{row['n_depth']}" if row["n_depth"] else "")] = row["samples_ts"]
    return found


def e2e(artifact: Path, args: argparse.Namespace) -> Figures:
    """What onnxruntime-genai's benchmark_e2e.py measures, in a process of its own."""
    numbers = [str(n) for n in (args.threads, args.prompt, args.decode, args.repeats)]
    command = [sys.executable, __file__, "--e2e-child", artifact, *numbers]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def e2e_child(folder: str, threads: int, prompt: int, decode: int, repeats: int) -> Figures:
    """The measurement of benchmark_e2e.py (batch size 1, random tokens, greedy), with a thread count set."""
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    tokens = np.random.randint(100, size=prompt)
    prompts, decodes = [], []
    for repeat in range(1 + repeats):
        params = og.GeneratorParams(model)
        length = prompt + decode
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = og.Generator(model, params)
        started = time.perf_counter()
        generator.append_tokens(tokens)
        prompt_time = time.perf_counter() - started
        generator.generate_next_token()
        token_times = []
        while not generator.is_done() and len(token_times) < decode - 1:
            started = time.perf_counter()
            generator.generate_next_token()
            token_times.append(time.perf_counter() - started)
        if repeat:  # the first one warms up
            prompts.append(prompt / prompt_time)
            decodes.append(len(token_times) / sum(token_times))
        del generator
    return {f"pp{prompt}": prompts, f"tg{decode} @ d{prompt}": decodes}


def compare(artifact: Path, args: argparse.Namespace) -> None:
    """Measures one artifact on both sides, in turns; prints a line a test that both have."""
    model = model_of(artifact)
    theirs = llama_bench if model.suffix == ".gguf" else e2e
    rounds: list[dict[str, Figures]] = []
    for number in range(args.rounds):
        sides = [ours, theirs][:: -1 if number % 2 else 1]
        rounds.append({side.__name__: side(model, args) for side in sides})
    for test in rounds[0][theirs.__name__]:
        mine, other = ([one[side.__name__][test] for one in rounds] for side in (ours, theirs))
        ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(mine, other, strict=True)]
        row = {
            "artifact": str(artifact),
            "test": test,
            "peer": theirs.__name__,
            "threads": args.threads,
            "ours": [round(statistics.median(x), 2) for x in mine],
            "theirs": [round(statistics.median(x), 2) for x in other],
            "median": round(statistics.median(ratios), 3),
            "best": round(max(map(max, mine)) / max(map(max, other)), 3),
        }
        print(json.dumps(row), flush=True)


def main() -> None:
    """Compare every artifact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--llama-bench", type=Path, help="the program, with its libraries beside it")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.llama_bench:
        args.llama_bench = args.llama_bench.resolve()
        os.environ["LLAMA_CPP_LIB_PATH"] = str(args.llama_bench.parent)  # llama-cpp-python takes libllama from there
    elif any(artifact.suffix == ".gguf" for artifact in map(model_of, args.artifacts)):
        parser.error("a GGUF file needs --llama-bench")
    for artifact in args.artifacts:
        compare(artifact, args)


if __name__ == "__main__":
    if sys.argv[1] == "--e2e-child":
        print(json.dumps(e2e_child(sys.argv[2], *map(int, sys.argv[3:]))))
    else:
        main()
