"""Runs an artifact beside its checkpoint and says, in figures and gates, whether it is still the same model.

Quality: a text is tokenized once, with the checkpoint's tokenizer, and cut into chunks; each is evaluated on its own,
and its second half is scored, so that every scored token has at least half a chunk before it. Perplexity is exp of the
mean negative log-probability of the text's tokens; KL is KL(reference || artifact) of the next-token distributions.
Standard errors take the tokens as independent. The artifact is scored with the runtime's plain kernels, so that figures
compare across machines; speed, memory and greedy answers are taken with the kernels that an app gets.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from phi3edge import registry
from phi3edge.calibration import CalibrationText, refuse_overlap
from phi3edge.errors import RunnerError, UsageError
from phi3edge.files import sha256
from phi3edge.progress import Stages, silent
from phi3edge.reference import Reference, eos_ids, load_tokenizer, reference_pass, vocabulary_size
from phi3edge.report import (
    Answer,
    Checkpoint,
    Environment,
    File,
    Metric,
    Mismatch,
    Protocol,
    Report,
    TextInfo,
    Tokens,
    check_gates,
    judge,
)
from phi3edge.runners import Runner
from phi3edge.text import Text, chunk, default_text
from phi3edge.types import Source

ALWAYS = {"tokenizer_mismatches": 0.0, "eog_missing": 0.0}
"""Gates that hold for every target, unless it sets its own limit."""

PROMPT_TOKENS, DECODE_TOKENS = 128, 32
GREEDY_TOKENS = 24
QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.", "List three uses of a paper clip.")

STRINGS = (
    "Hello, world!",
    " leading space, trailing space ",
    "two  spaces,   three, a\ttab\nand\n\nnewlines\r\n",
    "",
    " ",
    "\n",
    "0 1 12 123 1234567890 3.14159 -1e-9 0x1F",
    "It's we'll I'd THEY'RE don't",
    "def f(x: int) -> int:\n    return x**2  # squared\n",
    '{"key": ["value", null, true], "n": 1.5}',
    "Ünïcödé, façade, naïve, Straße, Ελληνικά, Привет, עברית, العربية",
    "你好，世界。こんにちは 한국어 ไทย हिन्दी",  # noqa: RUF001
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈 and e\u0301 combined, \u200bzero width, \u00a0no-break",
    "https://example.org/a?b=c&d=%20#e  user@example.org  C:\\path\\file.txt",
    "!!! ??? ... --- ___ ### ~~~ <<< >>> [[]] {{}} (()) `code` $x_i^2$",
    "supercalifragilisticexpialidocious Donaudampfschifffahrtsgesellschaft",
    "<s> </s> <unk> <|endoftext|> <|end|> <|user|>\nhi<|im_end|>\n",
)


_ELSEWHERE = ("runtime", "version", "threads", "context", "vocabulary_size", "eog_ids", "chat_template", "load_s")
"""What of a runner's info the report holds in another place, or need not hold."""


def runner_for(artifact: Path) -> ModuleType:
    """The runner whose runtime executes such an artifact.

    Raises:
        UsageError: none does.
    """
    for name in registry.names("runners"):
        module = registry.load("runners", name)
        if module.accepts(artifact):
            return module
    raise UsageError(
        f"no runtime here runs {artifact.name}",
        f"runtimes: {', '.join(registry.names('runners'))}; a .gguf file, say, or a folder with genai_config.json",
    )


def validate(
    artifact: Path,
    checkpoint: Path,
    *,
    text: Text | None = None,
    chunks: int = 16,
    chunk_tokens: int = 512,
    gates: Mapping[str, float] | None = None,
    context: int = 512,
    kv_type: str = "f16",
    threads: int | None = None,
    timeout: float = 600,
    name: str | None = None,
    source: Source | None = None,
    not_run: Sequence[str] = (),
    keep: Path | None = None,
    predicted_kl: float | None = None,
    calibration: CalibrationText | None = None,
    stages: Stages = silent,
) -> Report:
    """Scores an artifact against the checkpoint it was made from.

    Args:
        artifact: what to run: a .gguf file (of a split one, the first part), or an ONNX Runtime GenAI folder.
        checkpoint: the checkpoint's folder, in Hugging Face layout.
        text: what to score on; None for `default_text()`.
        chunks: number of chunks of the text.
        chunk_tokens: tokens in each.
        gates: limits by metric (see report.METRICS), upper or lower as the metric's sense says.
        context: tokens of KV cache while speed and memory are measured: what the target is planned for.
        kv_type: type of the KV cache, all the time.
        threads: of the runtime; None for one per usable core.
        timeout: seconds that one answer of the runtime may take.
        name: the checkpoint's name for the report; None for its folder's.
        source: where the checkpoint came from, for the report.
        not_run: what the figures do not show, for the report.
        keep: where to write the artifact's own log-probabilities of the scored rows, for `comparison.compare`:
            a .npy file, float16 of shape (chunks, rows, vocabulary).
        predicted_kl: what its plan predicted, to stand beside what is measured.
        calibration: the text that its weights were rounded with, which may not be scored on.
        stages: shows progress.

    Returns:
        The report; a missed gate is in it, not an exception.

    Raises:
        ConfigError: a gate on an unknown metric.
        UsageError: too short a text, one that shares passages with the calibration's, no runtime for the artifact,
            too little memory for the reference.
        MissingExtraError: the runtime, torch or transformers is not installed.
        CheckpointError: transformers cannot load the checkpoint.
        RunnerError: the runtime refuses the artifact, crashes or hangs, or the artifact has another vocabulary.
    """
    limits = {**ALWAYS, **(gates or {})}
    check_gates(limits)
    if chunks < 1 or chunk_tokens < 4:
        raise UsageError(f"{chunks} chunks of {chunk_tokens} tokens leave nothing to score", "at least 1 of 4")
    text = text or default_text()
    runtime = runner_for(artifact)

    with stages("tokenize", None):
        tokenizer = load_tokenizer(checkpoint)
        ids = chunk(tokenizer(text.text)["input_ids"], chunks, chunk_tokens, text.name)
        if calibration is not None:
            refuse_overlap(calibration, ids, text.name)
    size = vocabulary_size(checkpoint)
    prompts = [_prompt(tokenizer, question) for question in QUESTIONS]
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
        tokens = _check_tokens(runner, tokenizer, eos_ids(checkpoint))
        answers = [runner.generate(prompt, GREEDY_TOKENS) for prompt in prompts]

    reference = reference_pass(checkpoint, ids, prompts, GREEDY_TOKENS, stages)
    with runtime.open(artifact, context=chunk_tokens, plain=True, **options) as runner:
        scores = _score(runner, ids, reference, keep, stages)
    metrics = scores.metrics()
    compared = [
        _compare(tokenizer, question, theirs, ours)
        for question, theirs, ours in zip(QUESTIONS, reference.greedy, answers, strict=True)
    ]
    with stages("hash", None):
        files = [File(name=f.name, bytes=f.stat().st_size, sha256=sha256(f)) for f in runtime.files(artifact)]
    metrics |= {
        "greedy_agreement": Metric(value=_agreement(compared)),
        "tokenizer_mismatches": Metric(value=len(tokens.mismatches)),
        "eog_missing": Metric(value=len(set(tokens.eos_ids) - set(tokens.eog_ids))),
        **{name: Metric(value=value) for name, value in speed.items()},
        "bytes": Metric(value=sum(f.bytes for f in files)),
    }
    if memory is not None:
        metrics["peak_memory_bytes"] = Metric(value=memory)
    if predicted_kl is not None:
        metrics["kl_predicted"] = Metric(value=predicted_kl)
    judged = judge(metrics, limits)
    return Report(
        passed=all(gate.passed for gate in judged),
        artifact=files,
        checkpoint=Checkpoint(
            name=name or checkpoint.name,
            repository=source.repository if source else None,
            revision=source.revision if source else None,
        ),
        text=TextInfo(name=text.name, sha256=text.sha256),
        calibration=TextInfo(name=calibration.name, sha256=calibration.sha256) if calibration else None,
        protocol=Protocol(
            chunks=chunks,
            chunk_tokens=chunk_tokens,
            scored_tokens=int(reference.top1.size),
            reference="transformers, float32; distributions kept as float16 log-probabilities, normalized again",
            context=_room(context),
            prompt_tokens=PROMPT_TOKENS,
            decode_tokens=DECODE_TOKENS,
        ),
        metrics=metrics,
        gates=judged,
        tokens=tokens,
        answers=compared,
        environment=_environment(info, reference),
        not_run=list(not_run),
    )


def _room(context: int) -> int:
    return max(context, PROMPT_TOKENS + DECODE_TOKENS)


@dataclass(slots=True)
class _Scores:
    """Per scored token, in order: negative log-probabilities of the text, KL, and whether the top tokens agree."""

    nll: list[np.ndarray] = field(default_factory=list)
    reference_nll: list[np.ndarray] = field(default_factory=list)
    kl: list[np.ndarray] = field(default_factory=list)
    agree: list[np.ndarray] = field(default_factory=list)

    def metrics(self) -> dict[str, Metric]:
        nll, reference_nll = np.concatenate(self.nll), np.concatenate(self.reference_nll)
        kl, agree = np.concatenate(self.kl), np.concatenate(self.agree)
        ppl, reference_ppl = np.exp(nll.mean()), np.exp(reference_nll.mean())
        ratio = np.exp((nll - reference_nll).mean())
        return {
            # the error of exp(x) is exp(x) times x's; a ratio's is far smaller than its parts', which move together
            "ppl": _metric(ppl, ppl * _error(nll)),
            "reference_ppl": _metric(reference_ppl, reference_ppl * _error(reference_nll)),
            "ppl_ratio": _metric(ratio, ratio * _error(nll - reference_nll)),
            "kl_mean": _metric(kl.mean(), _error(kl)),
            "kl_median": _metric(np.median(kl)),
            "kl_p90": _metric(np.quantile(kl, 0.9)),
            "kl_p99": _metric(np.quantile(kl, 0.99)),
            "kl_max": _metric(kl.max()),
            "top1": _metric(agree.mean(), _error(agree)),
        }


def mean_of(values: Sequence[np.ndarray]) -> Metric:
    """The mean of figures per token, with its standard error."""
    flat = np.concatenate(values).astype(np.float64)
    return _metric(flat.mean(), _error(flat))


def _metric(value: float, error: float | None = None) -> Metric:
    return Metric(value=float(value), standard_error=None if error is None else float(error))


def _error(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def _score(runner: Runner, ids: np.ndarray, reference: Reference, keep: Path | None, stages: Stages) -> _Scores:
    """Compares the artifact's distributions with the reference's, a few rows at a time."""
    scores = _Scores()
    kept = np.lib.format.open_memmap(keep, "w+", np.float16, reference.log_probs.shape) if keep else None
    half = ids.shape[1] // 2
    with stages("score", len(ids)) as advance:
        for i, tokens in enumerate(ids):
            row = 0
            for logits in runner.logits_blocks(tokens[:-1], half):
                rows = slice(row, row + len(logits))
                following = tokens[half + 1 :][rows]
                log_probs = log_softmax(logits)
                if kept is not None:
                    kept[i, rows] = log_probs
                scores.nll.append(-log_probs[np.arange(len(following)), following].astype(np.float64))
                scores.reference_nll.append(-reference.text_log_probs[i, rows].astype(np.float64))
                scores.kl.append(kl_divergence(log_softmax(reference.log_probs[i, rows].astype(np.float32)), log_probs))
                scores.agree.append((log_probs.argmax(-1) == reference.top1[i, rows]).astype(np.float64))
                row += len(logits)
            advance(1)
    return scores


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of float32 logits, shape (tokens, vocabulary)."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def kl_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of log-probabilities in nats, float64, shape (tokens,); where p is 0 a token counts nothing."""
    with np.errstate(invalid="ignore"):  # 0 * (-inf - ...)
        return np.where(p == -np.inf, 0.0, np.exp(p) * (p - q)).sum(-1, dtype=np.float64)


def _check_tokens(runner: Runner, tokenizer: Any, eos: tuple[int, ...]) -> Tokens:
    """Compares token ids of fixed strings, of the checkpoint's own special tokens, and of a rendered chat."""
    specials = sorted(str(token) for token in tokenizer.get_added_vocab())[:32]
    strings = [*STRINGS, *(f"{token} a{token}\n{token}" for token in specials)]
    pairs = [(s, _ids(tokenizer, s), runner.tokenize(s, special=True, bos=False)) for s in strings]
    opening = STRINGS[0]  # with what each adds in front of a prompt
    pairs.append((opening, tokenizer(opening)["input_ids"], runner.tokenize(opening, special=True, bos=True)))
    if tokenizer.chat_template:
        chat = [
            {"role": "user", "content": QUESTIONS[0]},
            {"role": "assistant", "content": "Paris."},
            {"role": "user", "content": " And of  Peru? \n"},
        ]
        theirs = _render(tokenizer, chat)
        ours = _render_artifact(runner, tokenizer, chat)
        pairs.append((theirs, _ids(tokenizer, theirs), runner.tokenize(ours, special=True, bos=False)))
    return Tokens(
        checked=len(pairs),
        mismatches=[Mismatch(text=s, reference=r, artifact=a) for s, r, a in pairs if r != a],
        eos_ids=list(eos),
        eog_ids=runner.info()["eog_ids"],
        chat=bool(tokenizer.chat_template),
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _render(tokenizer: Any, chat: list[dict[str, str]], template: str | None = None) -> str:
    """The chat as the checkpoint's template, or another, writes it."""
    return tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)


def _render_artifact(runner: Runner, tokenizer: Any, chat: list[dict[str, str]]) -> str:
    """The chat as the artifact's template writes it, by the runtime's own engine or Jinja here; "" if it fails."""
    from jinja2 import TemplateError

    template = runner.info()["chat_template"]
    try:
        if not template:
            return ""
        return runner.chat(chat) or _render(tokenizer, chat, template)
    except (RunnerError, TemplateError):
        return ""


def _prompt(tokenizer: Any, question: str) -> list[int]:
    if not tokenizer.chat_template:
        return tokenizer(question)["input_ids"]
    return _ids(tokenizer, _render(tokenizer, [{"role": "user", "content": question}]))


def _compare(tokenizer: Any, prompt: str, reference: list[int], artifact: list[int]) -> Answer:
    longest = max(len(reference), len(artifact))
    equal = next((i for i, (a, b) in enumerate(zip(reference, artifact, strict=False)) if a != b), None)
    return Answer(
        prompt=prompt,
        reference=tokenizer.decode(reference),
        artifact=tokenizer.decode(artifact),
        equal=min(len(reference), len(artifact)) if equal is None else equal,
        tokens=longest,
    )


def _agreement(answers: list[Answer]) -> float:
    """Share of equal leading tokens; empty answers to every prompt agree."""
    tokens = sum(answer.tokens for answer in answers)
    return sum(answer.equal for answer in answers) / tokens if tokens else 1.0


def _environment(info: Mapping[str, Any], reference: Reference) -> Environment:
    return Environment(
        system=platform.system(),
        machine=platform.machine(),
        cpu=_cpu(),
        cores=os.cpu_count() or 1,
        python=platform.python_version(),
        threads=info["threads"],
        software={info["runtime"]: info["version"], "numpy": np.__version__, **reference.software},
        flags={key: value for key, value in info.items() if key not in _ELSEWHERE},
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
