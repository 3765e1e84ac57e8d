"""Runs an artifact beside its checkpoint and says, in figures and gates, whether it is still the same model.

Quality: a text is tokenized once, with the checkpoint's tokenizer, and cut into windows; each is evaluated on its own.
Windows that do not overlap have their second half scored, so that every scored token has at least half a window before
it (llama.cpp's protocol); with a stride of at most half a window, the last `stride` tokens of each are scored: every
token of the text once. Perplexity is exp of the mean negative log-probability of the text's tokens; KL is
KL(reference || artifact) of the next-token distributions. The artifact is scored with the runtime's plain kernels, so
that figures compare across machines; speed, memory and greedy answers are taken with the kernels that an app gets.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi3edge.calibration import CalibrationText, refuse_overlap
from phi3edge.distributions import DRAWN, TOP, Distributions, Keeper, log_softmax
from phi3edge.errors import RunnerError, UsageError
from phi3edge.files import sha256
from phi3edge.gates import Gates, Limit, check_gates, judge, require_baseline
from phi3edge.machine import cpu_name
from phi3edge.metrics import Metric
from phi3edge.parity import QUESTIONS, check_tokens, compare_answer, prompt_ids
from phi3edge.positions import Probe, allocations, probes, reach
from phi3edge.progress import Stages, silent
from phi3edge.reference import Reference, Wanted, eos_ids, load_tokenizer, reference_pass, vocabulary_size
from phi3edge.report import Answer, Band, Checkpoint, Environment, File, Protocol, Report, TextInfo, baseline
from phi3edge.runners import Runner, runner_for
from phi3edge.scores import Scores, band, mean_of
from phi3edge.text import Text, cut, default_text
from phi3edge.types import ModelSpec, Source

ALWAYS: Gates = {"tokenizer_mismatches": Limit(limit=0), "eog_missing": Limit(limit=0)}
"""Gates that hold for every artifact, unless another one replaces them."""

CHUNKS, CHUNK_TOKENS = 16, 512
PROMPT_TOKENS, DECODE_TOKENS = 128, 32
GREEDY_TOKENS = 32

_ELSEWHERE = ("runtime", "version", "threads", "context", "vocabulary_size", "eog_ids", "chat_template", "load_s")
"""What of a runner's info the report holds in another place, or need not hold."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How a text is cut and scored.

    Attributes:
        chunks: number of windows; None for as many as the text has.
        tokens: in each.
        stride: tokens from one window's start to the next one's; None for a window's length.
    """

    chunks: int | None = CHUNKS
    tokens: int = CHUNK_TOKENS
    stride: int | None = None

    def __post_init__(self) -> None:
        stride = self.tokens if self.stride is None else self.stride
        if (self.chunks is not None and self.chunks < 1) or self.tokens < 4 or stride < 1:
            raise UsageError(
                f"{self.chunks} chunks of {self.tokens} tokens every {stride} leave nothing to score",
                "at least 1 chunk of 4 tokens, a stride of at least 1",
            )
        if self.tokens // 2 < stride != self.tokens:
            raise UsageError(
                f"a stride of {stride} is neither the window, {self.tokens} tokens, nor at most half of it",
                f"at most {self.tokens // 2}: then every token of the text is scored once",
            )

    @property
    def step(self) -> int:
        """The stride in tokens."""
        return self.tokens if self.stride is None else self.stride

    @property
    def first(self) -> int:
        """The first position of a window whose prediction is scored; its last position's is not."""
        return self.tokens // 2 if self.step == self.tokens else self.tokens - self.step - 1


@dataclass(frozen=True, slots=True)
class Other:
    """Another artifact's distributions on the same text, to hold this one's against."""

    name: str
    distributions: Distributions


@dataclass(frozen=True, slots=True)
class Pair:
    """KL(other || this one) per token in nats, mean; and the share of the same most likely token."""

    other: str
    kl: Metric
    top1: Metric


def validate(
    artifact: Path,
    checkpoint: Path,
    *,
    text: Text | None = None,
    windows: Windows = Windows(),
    gates: Mapping[str, Limit] | None = None,
    earlier: Report | None = None,
    context: int = CHUNK_TOKENS,
    kv_type: str = "f16",
    threads: int | None = None,
    timeout: float = 600,
    name: str | None = None,
    source: Source | None = None,
    spec: ModelSpec | None = None,
    positions: bool = True,
    not_run: Sequence[str] = (),
    keep: Path | None = None,
    others: Sequence[Other] = (),
    predicted_kl: float | None = None,
    calibration: CalibrationText | None = None,
    stages: Stages = silent,
) -> tuple[Report, list[Pair]]:
    """Scores an artifact against the checkpoint it was made from.

    Args:
        artifact: what to run: a .gguf file (of a split one, the first part), or an ONNX Runtime GenAI folder.
        checkpoint: the checkpoint's folder, in Hugging Face layout.
        text: what to score on; None for `default_text()`.
        windows: how it is cut.
        gates: what the figures are held to.
        earlier: the baseline that gates may be relative to.
        context: tokens of KV cache while speed and memory were measured, and the longest sequence of `positions` but
            where a runtime ignores a window that ends there: what the target is planned for.
        kv_type: type of the KV cache, all the time.
        threads: of the runtime; None for one per usable core.
        timeout: seconds that one answer of the runtime may take.
        name: the checkpoint's name for the report; None for its folder's.
        source: where the checkpoint came from, for the report.
        spec: the checkpoint's, which says where long contexts break; None if its family is not known.
        positions: score there, if the context reaches such places.
        not_run: what the figures do not show, for the report.
        keep: folder to keep the artifact's own distributions in, for another validation's `others`.
        others: distributions of other artifacts on the same text and windows.
        predicted_kl: what its plan predicted, to stand beside what is measured.
        calibration: the text that its weights were rounded with, which may not be scored on.
        stages: shows progress.

    Returns:
        The report; a missed gate is in it, not an exception. And what the other artifacts are to this one.

    Raises:
        ConfigError: a gate on an unknown metric.
        UsageError: too short a text, one that shares passages with the calibration's, a baseline of another protocol
            or none where a gate needs one, no runtime for the artifact, too little memory for a reference of
            integers.
        MissingExtraError: the runtime, torch or transformers is not installed.
        CheckpointError: transformers cannot load the checkpoint.
        RunnerError: the runtime refuses the artifact, crashes or hangs, or the artifact has another vocabulary.
    """
    limits = {**ALWAYS, **(gates or {})}
    check_gates(limits)
    require_baseline(limits, earlier)
    text = text or default_text()
    runtime = runner_for(artifact)

    with stages("tokenize", None):
        tokenizer = load_tokenizer(checkpoint)
        all_ids = tokenizer(text.text)["input_ids"]
        ids = cut(all_ids, windows.chunks, windows.tokens, windows.step, text.name)
        if calibration is not None:
            refuse_overlap(calibration, ids, text.name)
    size = vocabulary_size(checkpoint)
    prompts = [prompt_ids(tokenizer, question) for question in QUESTIONS]
    longest = reach(spec, context, runtime.HEEDS_WINDOW) if spec and positions else context
    longest = max(context, min(longest, len(all_ids)))  # of a longer context only what the text is long enough for
    long = probes(spec, longest) if spec and positions else []
    if long and len(all_ids) < longest:
        raise UsageError(
            f"the text {text.name} has {len(all_ids)} tokens; scoring the positions where long contexts break needs "
            f"{longest}",
            "give a longer text, or --no-positions",
        )
    sequences = [(np.array(all_ids[: p.tokens], np.int64), [n for band in p.bands for n in band]) for p in long]
    wanted = Wanted(ids, windows.first, prompts, GREEDY_TOKENS, sequences)
    options = {"kv_type": kv_type, "threads": threads, "timeout": timeout}

    with stages("run", None), runtime.open(artifact, context=_room(context), **options) as runner:
        info = runner.info()
        if info["vocabulary_size"] != size:
            raise RunnerError(
                f"{artifact.name} has {info['vocabulary_size']} tokens in its vocabulary, the checkpoint {size}",
                "is it an export of this checkpoint?",
            )
        speed = runner.speed(PROMPT_TOKENS, DECODE_TOKENS)
        memory = runner.peak_memory()
        tokens = check_tokens(runner, tokenizer, eos_ids(checkpoint), text.text)
        answers = [runner.generate(prompt, GREEDY_TOKENS) for prompt in prompts]

    reference = reference_pass(checkpoint, wanted, stages)
    by_context = spec is not None and spec.rope.by_length and context > spec.original_context_length
    # where a runtime may choose the rotation by its context, it is scored with the one that an app opens it with
    room = _room(context if by_context else windows.tokens)
    with runtime.open(artifact, context=room, plain=True, **options) as runner:
        stops = [
            not runner.generate([*prompt, *answer], 1) if ended else None
            for prompt, answer, ended in zip(prompts, reference.greedy, reference.ended, strict=True)
        ]
        scores, pairs = _score(runner, ids, windows.first, reference, keep, others, stages)
    found: list[Band] = []
    for allocated in allocations(spec, longest) if spec and long else ():
        with runtime.open(artifact, context=allocated, plain=True, **options) as runner:
            for probe, (sequence, _), theirs in zip(long, sequences, reference.long, strict=True):
                if probe.tokens <= allocated:
                    found += _long(runner, sequence, probe, allocated, theirs, stages)

    compared = [
        compare_answer(tokenizer, question, theirs, ours, ended, stop)
        for question, theirs, ours, ended, stop in zip(
            QUESTIONS, reference.greedy, answers, reference.ended, stops, strict=True
        )
    ]
    with stages("hash", None):
        files = [File(name=f.name, bytes=f.stat().st_size, sha256=sha256(f)) for f in runtime.files(artifact)]
    metrics = {
        **scores.metrics(),
        **_of_answers(compared),
        "tokenizer_mismatches": Metric(value=len(tokens.mismatches)),
        "eog_missing": Metric(value=len(set(tokens.eos_ids) - set(tokens.eog_ids))),
        **{key: Metric(value=value) for key, value in speed.items()},
        "bytes": Metric(value=sum(f.bytes for f in files)),
        "reference_bytes": Metric(value=sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))),
    }
    if reference.shared is not None:
        metrics |= scores.apart(reference.shared)
    if within := [b.kl for b in found if b.last < context]:
        metrics["kl_positions"] = max(within, key=lambda m: np.nan_to_num(m.value, nan=np.inf))
    if memory is not None:
        metrics["peak_memory_bytes"] = Metric(value=memory)
    if predicted_kl is not None:
        metrics["kl_predicted"] = Metric(value=predicted_kl)
    about = TextInfo(name=text.name, sha256=text.sha256)
    protocol = Protocol(
        chunks=len(ids),
        chunk_tokens=windows.tokens,
        stride=windows.step,
        context_tokens=windows.first + 1,
        scored_tokens=len(ids) * wanted.rows,
        reference=f"{next(iter(reference.software))}, float32",
        distributions=f"{TOP} likeliest tokens, {DRAWN} drawn from the rest and its mass; KL by the estimator k3",
        kl_drawing_error=scores.drawing_error(),
        context=_room(context),
        prompt_tokens=PROMPT_TOKENS,
        decode_tokens=DECODE_TOKENS,
    )
    environment = _environment(info, reference)
    ppl = metrics["reference_ppl"].value
    judged = judge(metrics, limits, baseline(earlier, about, protocol, environment, ppl) if earlier else None)
    report = Report(
        passed=all(gate.passed for gate in judged),
        artifact=files,
        checkpoint=Checkpoint(
            name=name or checkpoint.name,
            repository=source.repository if source else None,
            revision=source.revision if source else None,
        ),
        text=about,
        calibration=TextInfo(name=calibration.name, sha256=calibration.sha256) if calibration else None,
        protocol=protocol,
        metrics=metrics,
        gates=judged,
        tokens=tokens,
        answers=compared,
        positions=found,
        histogram=scores.histogram(),
        worst=scores.worst(ids, tokenizer.decode),
        environment=environment,
        not_run=list(not_run),
    )
    return report, pairs


def _room(context: int) -> int:
    """Tokens of context for the prompts that are timed and answered, at least."""
    return max(context, PROMPT_TOKENS + 2 * DECODE_TOKENS)


def _score(
    runner: Runner,
    ids: np.ndarray,
    first: int,
    reference: Reference,
    keep: Path | None,
    others: Sequence[Other],
    stages: Stages,
) -> tuple[Scores, list[Pair]]:
    """Compares the artifact's distributions with the reference's and other artifacts', a few rows at a time."""
    scores = Scores()
    kl: list[list[np.ndarray]] = [[] for _ in others]
    same: list[list[np.ndarray]] = [[] for _ in others]
    with stages("score", len(ids)) as advance, ExitStack() as stack:
        shape = (len(ids), ids.shape[1] - first - 1)
        keeper = stack.enter_context(Keeper(keep, shape, runner.info()["vocabulary_size"])) if keep else None
        for i, tokens in enumerate(ids):
            row = 0
            for logits in runner.logits_blocks(tokens[:-1], first):
                rows = slice(row, row + len(logits))
                log_probs = log_softmax(logits)
                scores.add(
                    i,
                    first + row,
                    tokens[first + 1 :][rows],
                    reference.distributions[i, rows],
                    reference.text_log_probs[i, rows],
                    log_probs,
                )
                if keeper:
                    keeper.add(log_probs)
                for n, other in enumerate(others):
                    theirs = other.distributions[i, rows]
                    kl[n].append(theirs.kl(log_probs)[0])
                    same[n].append(theirs.top1 == log_probs.argmax(-1))
                row += len(logits)
            advance(1)
    return scores, [Pair(o.name, mean_of(k), mean_of(s)) for o, k, s in zip(others, kl, same, strict=True)]


def _long(
    runner: Runner, ids: np.ndarray, probe: Probe, allocated: int, reference: Distributions, stages: Stages
) -> list[Band]:
    """Scores the bands of one long sequence."""
    found: dict[range, list[np.ndarray]] = {place: [] for place in probe.bands}
    with stages(f"score, {probe.tokens} tokens in {allocated}", len(ids)) as advance:
        position = probe.bands[0][0]
        advance(position)
        for logits in runner.logits_blocks(ids, position):
            for place in probe.bands:
                rows = range(max(place[0], position), min(place[-1] + 1, position + len(logits)))
                if rows:
                    found[place].append(log_softmax(logits[rows[0] - position : rows[-1] + 1 - position]))
            position += len(logits)
            advance(len(logits))
    ends = np.cumsum([0, *map(len, probe.bands)])
    return [
        band(place, probe.tokens, allocated, reference[ends[n] : ends[n + 1]], np.concatenate(found[place]))
        for n, place in enumerate(probe.bands)
    ]


def _of_answers(answers: Sequence[Answer]) -> dict[str, Metric]:
    """Figures of greedy answers; those that both leave empty agree."""
    tokens = sum(answer.tokens for answer in answers)
    metrics = {
        "greedy_agreement": Metric(value=sum(a.equal for a in answers) / tokens if tokens else 1.0),
        "greedy_tokens": mean_of([np.array([a.equal for a in answers])]),
    }
    if stops := [a.stops for a in answers if a.stops is not None]:
        metrics["stop_agreement"] = Metric(value=sum(stops) / len(stops))
    return metrics


def _environment(info: Mapping[str, Any], reference: Reference) -> Environment:
    return Environment(
        system=platform.system(),
        machine=platform.machine(),
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        python=platform.python_version(),
        threads=info["threads"],
        software={info["runtime"]: info["version"], "numpy": np.__version__, **reference.software},
        flags={key: value for key, value in info.items() if key not in _ELSEWHERE},
    )
