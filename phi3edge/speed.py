"""How fast an artifact runs here: prompts and decoding over lengths, depths, threads and batches.

The tests are llama-bench's: pp512 evaluates a prompt of 512 random tokens, tg128 decodes 128 tokens one at a time,
"@ d1024" does so behind 1024 tokens that are in the context already. What is timed is in `runners/_timing.py`. A
decoded token reads all weights and the KV cache once: its speed is held against that of memory, measured beside it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import product
from math import isnan
from pathlib import Path
from typing import Any

from phi3edge import folders, manifest
from phi3edge.bandwidth import read_bandwidth
from phi3edge.errors import UsageError
from phi3edge.files import write_text
from phi3edge.genai_folder import is_genai
from phi3edge.machine import cpu_name, usable_cores
from phi3edge.progress import Stages, silent
from phi3edge.runners import Runner, Traffic, runner_for
from phi3edge.runners._timing import Sample
from phi3edge.types import JSON

SCHEMA = 1
SPARE = 2
"""Tokens of context that a runtime may need beyond a test's own."""

BUSY = 0.05
"""Share of the machine's time that others may take before the figures are doubted."""

LEAST_S = 1.0
"""Below so many seconds, what others took is not known: the system counts in hundredths, of every sample anew."""

TIMEOUT = 3600.0


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to measure: every combination of these.

    Attributes:
        prompts: tokens of a prompt; 0 is left out.
        decodes: tokens to decode; 0 is left out.
        depths: tokens in the context before the clock starts.
        threads: of the runtime; empty for one per usable core.
        batches: most tokens of a prompt at once; None for the runtime's own way.
        micro_batches: the same within a batch, where the runtime has it; None for its own way.
        kv_type: type of the KV cache, where the artifact does not fix it.
        repeats: samples of each test.
        warm_up: whether each test is run once before it is timed.
    """

    prompts: tuple[int, ...] = (512,)
    decodes: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0,)
    threads: tuple[int, ...] = ()
    batches: tuple[int | None, ...] = (None,)
    micro_batches: tuple[int | None, ...] = (None,)
    kv_type: str = "f16"
    repeats: int = 5
    warm_up: bool = True

    def lengths(self) -> list[tuple[int, int, int]]:
        """(prompt, decode, depth) of each test, in order.

        Raises:
            UsageError: nothing to measure, or a number that makes no sense.
        """
        numbers = (*self.prompts, *self.decodes, *self.depths)
        if min(numbers, default=0) < 0 or min(self.threads, default=1) < 1 or self.repeats < 1:
            raise UsageError("lengths and depths must be 0 or more, threads and repeats 1 or more")
        works = [(prompt, 0) for prompt in self.prompts if prompt] + [(0, n) for n in self.decodes if n]
        if not works or not self.depths:
            raise UsageError("nothing to measure: no prompt and nothing to decode", "--prompt 512 --decode 128")
        return [(*work, depth) for depth, work in product(self.depths, works)]


@dataclass(frozen=True, slots=True)
class Spread:
    """Figures of several samples.

    Attributes:
        mad: median absolute deviation from the median.
        stddev: of the sample (n - 1); 0 for a single one, as in llama-bench.
    """

    median: float
    mad: float
    mean: float
    stddev: float


def spread(values: Sequence[float]) -> Spread:
    """Median and mean of at least one value, each with its deviation."""
    median = statistics.median(values)
    return Spread(
        median=median,
        mad=statistics.median(abs(value - median) for value in values),
        mean=statistics.fmean(values),
        stddev=statistics.stdev(values) if len(values) > 1 else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Measurement:
    """One test and its samples.

    Attributes:
        prompt: tokens of the prompt, 0 where tokens are decoded.
        decode: tokens decoded, 0 where a prompt is evaluated.
        depth: tokens in the context before.
        time: RFC 3339, when it was begun.
        samples: at least one.
    """

    prompt: int
    decode: int
    depth: int
    time: str
    samples: tuple[Sample, ...]

    @property
    def name(self) -> str:
        """As llama-bench writes it: "pp512", "tg128 @ d1024"."""
        work = f"pp{self.prompt}" if self.prompt else f"tg{self.decode}"
        return work + (f" @ d{self.depth}" if self.depth else "")

    @property
    def ns(self) -> list[int]:
        """Nanoseconds of each sample: the prompt's without the choice of a token, or those of decoding."""
        return [round(s.prompt_ns if self.prompt else s.decode_ns) for s in self.samples]

    @property
    def tokens_per_s(self) -> list[float]:
        """Of each sample."""
        return [1e9 * (self.prompt + self.decode) / ns for ns in self.ns]

    @property
    def first_token_s(self) -> list[float]:
        """Seconds from a prompt to the token after it, of each sample; empty where tokens are decoded."""
        return [s.first_token_ns / 1e9 for s in self.samples] if self.prompt else []

    @property
    def joules_per_token(self) -> list[float] | None:
        """Energy of the processors, of each sample; None where the machine does not tell."""
        found = [s.joules / (self.prompt + self.decode) for s in self.samples]
        return None if any(map(isnan, found)) else found

    @property
    def mean_length(self) -> float:
        """Tokens in the context of a decoded token, itself included, on average over the test."""
        return self.depth + (self.decode + 1) / 2


@dataclass(frozen=True, slots=True)
class Run:
    """All tests in one process of the runtime.

    Attributes:
        info: what the runtime says of itself, see `Runner.info`.
        bandwidth: bytes per second that memory is read at, by as many threads.
        peak_memory: of the process with that context, in bytes; None where unknown.
        traffic: what a decoded token reads.
    """

    info: JSON
    bandwidth: float
    peak_memory: int | None
    traffic: Traffic
    tests: tuple[Measurement, ...]

    def bytes_per_token(self, test: Measurement) -> float | None:
        """What a decoded token of the test reads on average; None for a prompt, whose tokens share what they read."""
        return None if test.prompt else self.traffic.bytes(test.mean_length)

    def roofline_share(self, test: Measurement) -> float | None:
        """The median speed over what memory allows: tokens/s x bytes per token / bandwidth; None for a prompt."""
        read = self.bytes_per_token(test)
        return None if read is None else spread(test.tokens_per_s).median * read / self.bandwidth

    def others_share(self) -> float | None:
        """What other processes took of the machine's time while the clock ran; None where unknown."""
        samples = [sample for test in self.tests for sample in test.samples]
        elapsed = sum(sample.first_token_ns + sample.decode_ns for sample in samples) / 1e9
        taken = sum(sample.others_s for sample in samples)
        return None if isnan(taken) or elapsed < LEAST_S else max(taken, 0) / (elapsed * usable_cores())


@dataclass(frozen=True, slots=True)
class Benchmark:
    """All runs of an artifact.

    Attributes:
        model: path of the file or folder that was run.
        bytes: size of the files that hold the model.
        kv_type: that the KV cache had.
    """

    model: Path
    bytes: int
    kv_type: str
    warm_up: bool
    runs: tuple[Run, ...]

    def rows(self) -> Iterator[tuple[Run, Measurement]]:
        """Every test with its run, in order."""
        for run in self.runs:
            for test in run.tests:
                yield run, test


def benchmark(artifact: Path, sweep: Sweep, stages: Stages = silent) -> Benchmark:
    """Measures an artifact.

    Args:
        artifact: a .gguf file (of a split one, the first part), an ONNX Runtime GenAI folder, or a folder that export
            wrote.
        sweep: what to measure.
        stages: shows progress.

    Raises:
        UsageError: no runtime for it, nothing to measure, or options that the runtime does not have.
        MissingExtraError: the runtime or numba is not installed.
        CheckpointError, UnsupportedError, OutputError: the artifact is damaged.
        RunnerError: the runtime refuses it, or crashes.
    """
    model = model_of(artifact)
    runtime, lengths = runner_for(model), sweep.lengths()
    runtime.require_runtime()
    missing = [file for file in runtime.files(model) if not file.is_file()]
    if missing:
        raise UsageError(f"{missing[0]} does not exist", "expected a .gguf file or a folder with genai_config.json")
    threads = sweep.threads or (usable_cores(),)
    with stages("bandwidth", len(threads)) as advance:
        bandwidths = {}
        for count in threads:
            bandwidths[count] = read_bandwidth(count)
            advance(1)
    settings = list(product(threads, sweep.batches, sweep.micro_batches))
    with stages("measure", len(settings) * len(lengths) * sweep.repeats) as advance:
        runs = []
        for count, batch, micro_batch in settings:
            context = max(sum(length) for length in lengths) + SPARE
            options = {"batch": batch, "micro_batch": micro_batch, "kv_type": sweep.kv_type, "spinning": True}
            with runtime.open(model, context=context, threads=count, timeout=TIMEOUT, **options) as runner:
                tests = []
                for length in lengths:
                    tests.append(_test(runner, *length, sweep, advance))
                info = runner.info()
                traffic = runtime.traffic(model, info["kv_type"])
                runs.append(Run(info, bandwidths[count], runner.peak_memory(), traffic, tuple(tests)))
    size = sum(file.stat().st_size for file in runtime.files(model))
    return Benchmark(model, size, runs[0].info["kv_type"], sweep.warm_up, tuple(runs))


def _test(runner: Runner, prompt: int, decode: int, depth: int, sweep: Sweep, advance: Any) -> Measurement:
    time = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    samples = []
    for sample in runner.samples(prompt, decode, depth=depth, repeats=sweep.repeats, warm_up=sweep.warm_up):
        samples.append(sample)
        advance(1)
    return Measurement(prompt, decode, depth, time, tuple(samples))


def model_of(artifact: Path) -> Path:
    """What a runtime opens of an artifact: itself, or the file in a folder that export wrote.

    Raises:
        UsageError: no such file or folder.
        OutputError: its manifest cannot be read.
    """
    if not artifact.exists():
        raise UsageError(f"{artifact} does not exist", "expected a .gguf file or a folder with genai_config.json")
    if artifact.is_file() or is_genai(artifact) or not (artifact / manifest.NAME).is_file():
        return artifact
    return artifact / manifest.read_manifest(artifact)["files"][0]["name"]


def notes(found: Benchmark) -> list[str]:
    """What a reader of the figures should know."""
    remarks = []
    shares = [share for run in found.runs if (share := run.others_share()) is not None]
    if max(shares, default=0) > BUSY:
        remarks.append(
            f"other processes took {max(shares):.0%} of this machine's time while the clock ran: measure again alone"
        )
    if any((run.roofline_share(test) or 0) > 1 for run, test in found.rows()):
        remarks.append("faster than memory: a small model stays in the caches, and the roofline says nothing of it")
    remarks += dict.fromkeys(run.info["workaround"] for run in found.runs if run.info.get("workaround"))
    return remarks


RUN_KEYS = ("runtime", "version", "threads", "batch", "micro_batch", "context", "wait_policy", "spinning", "load_s")
"""What of a runtime's words goes into JSON and CSV."""


def to_data(found: Benchmark) -> JSON:
    """A benchmark as plain data; None stands for what this machine does not tell."""
    return {
        "schema": SCHEMA,
        "model": str(found.model),
        "bytes": found.bytes,
        "kv_type": found.kv_type,
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "warm_up": found.warm_up,
        "notes": notes(found),
        "runs": [
            {
                **{key: run.info.get(key) for key in RUN_KEYS},
                "bandwidth_bytes_per_s": run.bandwidth,
                "peak_memory_bytes": run.peak_memory,
                "others_share": run.others_share(),
                "weight_bytes_per_token": run.traffic.weights,
                "kv_bytes_per_token": run.traffic.kv_per_token,
                "tests": [_test_data(run, test) for test in run.tests],
            }
            for run in found.runs
        ],
    }


def write(found: Benchmark, artifact: Path) -> Path | None:
    """Write bench.json into the folder of an artifact that phi3edge wrote; None for any other."""
    folder = artifact if artifact.is_dir() else artifact.parent
    if not (folder / manifest.NAME).is_file():
        return None
    content = {**to_data(found), "model": found.model.name}
    write_text(folder / folders.BENCH, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return folder / folders.BENCH


def _test_data(run: Run, test: Measurement) -> JSON:
    speed, joules = spread(test.tokens_per_s), test.joules_per_token
    return {
        "test": test.name,
        "prompt": test.prompt,
        "decode": test.decode,
        "depth": test.depth,
        "time": test.time,
        "tokens_per_s": {"median": speed.median, "mad": speed.mad, "mean": speed.mean, "stddev": speed.stddev},
        "time_to_first_token_s": statistics.median(test.first_token_s) if test.prompt else None,
        "joules_per_token": None if joules is None else statistics.median(joules),
        "bytes_per_token": run.bytes_per_token(test),
        "roofline_share": run.roofline_share(test),
        "samples_ns": test.ns,
        "samples_tokens_per_s": test.tokens_per_s,
        "samples_first_token_s": test.first_token_s,
        "samples_joules_per_token": joules,
    }


def csv_rows(found: Benchmark) -> list[JSON]:
    """One flat row a test: everything but the samples."""
    data = to_data(found)
    shared = {key: data[key] for key in ("model", "bytes", "kv_type", "cpu")}
    rows = []
    for run in data["runs"]:
        own = {key: value for key, value in run.items() if key != "tests"}
        for test in run["tests"]:
            flat = {key: value for key, value in test.items() if not key.startswith("samples_")}
            flat |= {f"tokens_per_s_{key}": value for key, value in flat.pop("tokens_per_s").items()}
            rows.append({**shared, **own, **flat})
    return rows


def llama_bench_rows(found: Benchmark) -> list[JSON]:
    """One object a test, with the fields of `llama-bench -o jsonl`, in its order and of its types.

    Source: llama.cpp, tools/llama-bench/llama-bench.cpp, test::get_fields. `build_commit` names the runtime's version
    where the runtime does not say its commit; `build_number` is 0 then.
    """
    return [_llama_bench_row(found, run, test) for run, test in found.rows()]


def _llama_bench_row(found: Benchmark, run: Run, test: Measurement) -> JSON:
    info, ns, speed = run.info, spread(test.ns), spread(test.tokens_per_s)
    return {
        "build_commit": info["version"],
        "build_number": 0,
        "cpu_info": cpu_name(),
        "gpu_info": "",
        "backends": "CPU",
        "model_filename": str(found.model),
        "model_type": info["model_type"],
        "model_size": info["model_bytes"],
        "model_n_params": info.get("parameters"),
        "n_batch": info["batch"],
        "n_ubatch": info.get("micro_batch", info["batch"]),
        "n_threads": info["threads"],
        "cpu_mask": "0x0",
        "cpu_strict": False,
        "poll": 50,
        "type_k": info["kv_type"],
        "type_v": info["kv_type"],
        "n_gpu_layers": 0,
        "n_cpu_moe": 0,
        "split_mode": "layer",
        "main_gpu": 0,
        "no_kv_offload": False,
        "flash_attn": -1,
        "devices": "auto",
        "tensor_split": "0.00",
        "tensor_buft_overrides": "none",
        "load_mode": "auto",
        "lazy_mode": "auto",
        "embeddings": False,
        "no_op_offload": 0,
        "no_host": False,
        "repack": bool(info.get("repacked_weights", False)),
        "fit_target": 0,
        "fit_min_ctx": 0,
        "n_prompt": test.prompt,
        "n_gen": test.decode,
        "n_depth": test.depth,
        "test_time": test.time,
        "avg_ns": int(ns.mean),
        "stddev_ns": int(ns.stddev),
        "avg_ts": speed.mean,
        "stddev_ts": speed.stddev,
        "samples_ns": test.ns,
        "samples_ts": test.tokens_per_s,
    }
