"""`phi3edge bench`: how fast an artifact runs on this machine."""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Annotated

import typer

from phi3edge import speed
from phi3edge.cli._options import JsonOption
from phi3edge.cli._output import note, print_json, progress, stdout, table
from phi3edge.cli._pages import refresh_pages
from phi3edge.errors import UsageError
from phi3edge.folders import artifacts_in
from phi3edge.speed import Benchmark, Measurement, Run, Sweep, spread
from phi3edge.units import size

NOT_TOLD = "not available here"


def bench(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A .gguf file, an ONNX Runtime GenAI folder, or an export.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Tokens of a prompt, e.g. 128,512; 0: none.")] = "512",
    decode: Annotated[str, typer.Option("--decode", "-n", help="Tokens to decode, e.g. 64,128; 0: none.")] = "128",
    depth: Annotated[
        str, typer.Option("--depth", "-d", help="Tokens in the context before the clock starts, e.g. 0,1024.")
    ] = "0",
    threads: Annotated[
        str | None, typer.Option("--threads", "-t", help="Threads, e.g. 1,2; default: one per usable core.")
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch", "-b", help="Most tokens of a prompt at once; default: the runtime's own (llama.cpp 2048)."
        ),
    ] = None,
    micro_batch: Annotated[
        str | None, typer.Option("--micro-batch", help="llama.cpp: most tokens computed at once; default 512.")
    ] = None,
    kv_cache: Annotated[
        str, typer.Option("--kv-cache", help="gguf: f32, f16, q8_0, q4_0; an ONNX folder has its own.")
    ] = "f16",
    repeats: Annotated[int, typer.Option("--repeats", "-r", min=1, help="Samples of each test.")] = 5,
    warm_up: Annotated[bool, typer.Option("--warm-up/--no-warm-up", help="Run each test once, untimed, first.")] = True,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="One line a test, with a header.")] = False,
    as_jsonl: Annotated[
        bool, typer.Option("--jsonl", help="One JSON object a test, with the fields of llama-bench -o jsonl.")
    ] = False,
) -> None:
    """Measure speed: prompts, decoding, time to first token, load time, memory, energy, and the share of the roofline.

    Every combination of the lists is a test. The tests are llama-bench's: pp512 evaluates a prompt of 512 random
    tokens, tg128 decodes 128 tokens, @ d1024 does so behind 1024 others. The roofline is the memory bandwidth, measured
    in the same run, over the bytes that a decoded token reads. Nothing else should run on the machine meanwhile.
    The figures are also written into an exported folder, as bench.json, and into its page.

    Examples: `phi3edge bench dist/demo-iphone`,
    `phi3edge bench model.gguf --prompt 128,512 --decode 64 --depth 0,1024 --threads 1,2`,
    `phi3edge bench model.gguf --jsonl > speed.jsonl`
    """
    if as_json + as_csv + as_jsonl > 1:
        raise UsageError("--json, --csv and --jsonl exclude each other", "give one of them")
    if parts := artifacts_in(artifact):
        raise UsageError(f"{artifact} holds {len(parts)} artifacts", f"name one of them: phi3edge bench {parts[0]}")
    sweep = Sweep(
        prompts=_numbers("--prompt", prompt),
        decodes=_numbers("--decode", decode),
        depths=_numbers("--depth", depth),
        threads=_numbers("--threads", threads) if threads else (),
        batches=_sizes("--batch", batch),
        micro_batches=_sizes("--micro-batch", micro_batch),
        kv_type=kv_cache,
        repeats=repeats,
        warm_up=warm_up,
    )
    with progress(quiet=as_json) as stages:
        found = speed.benchmark(artifact, sweep, stages)
    if kept := speed.write(found, artifact):
        refresh_pages(kept.parent, quiet=True)
    if as_json:
        print_json(speed.to_data(found))
        return
    if as_csv:
        rows = speed.csv_rows(found)
        writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    elif as_jsonl:
        sys.stdout.writelines(json.dumps(row) + "\n" for row in speed.llama_bench_rows(found))
    else:
        show(found)
    for remark in speed.notes(found):
        note(remark)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UsageError(f"{option} {text!r}: expected numbers with commas between", f"for example: {option} 128,512")
    return tuple(dict.fromkeys(map(int, text.split(","))))


def _sizes(option: str, text: str | None) -> tuple[int | None, ...]:
    if text is None:
        return (None,)
    if 0 in (numbers := _numbers(option, text)):
        raise UsageError(f"{option} {text!r}: expected 1 or more", f"for example: {option} 512")
    return numbers


def show(found: Benchmark) -> None:
    """The table of tests, then what holds for all of a run."""
    columns = (">tokens/s", ">± MAD", ">mean ± sd", ">first token", ">J/token", ">reads", ">of roofline")
    rows = table("test", ">threads", ">batch", *columns, title=str(found.model))
    for run, test in found.rows():
        rows.add_row(*_cells(run, test))
    stdout.print(rows)
    for run in found.runs:
        stdout.print(_about(found, run), soft_wrap=True)


def _cells(run: Run, test: Measurement) -> list[str]:
    figures, joules = spread(test.tokens_per_s), test.joules_per_token
    read, share = run.bytes_per_token(test), run.roofline_share(test)
    batch, micro_batch = run.info["batch"], run.info.get("micro_batch")
    pieces = f"{batch}/{micro_batch}" if micro_batch else str(batch)
    return [
        test.name,
        str(run.info["threads"]),
        "whole" if batch == run.info["context"] else pieces,
        f"{figures.median:.2f}",
        f"{figures.mad:.2f}",
        f"{figures.mean:.2f} ± {figures.stddev:.2f}",
        f"{1000 * statistics.median(test.first_token_s):.0f} ms" if test.prompt else "",
        "-" if joules is None else f"{statistics.median(joules):.3f}",
        "" if read is None else size(read),
        "" if share is None else f"{share:.0%}",
    ]


def _about(found: Benchmark, run: Run) -> str:
    info = run.info
    told = all(test.joules_per_token is not None for test in run.tests)
    parts = [
        f"{info['runtime']} ({info['version']}), {info['threads']} threads, KV cache {info['kv_type']}",
        f"loaded in {info['load_s']:.2f} s",
        f"peak memory {NOT_TOLD if run.peak_memory is None else size(run.peak_memory)} (context {info['context']})",
        f"memory is read at {run.bandwidth / 1e9:.1f} GB/s",
        f"energy {'of whole processors' if told else NOT_TOLD}",
    ]
    return "; ".join(parts)
