"""Our runtimes, and the float reference, as models of lm-evaluation-harness.

They are asked what lm-evaluation-harness asks its own Hugging Face model: the same token ids, by the checkpoint's
tokenizer, split between context and continuation at the same place, in the same windows. Two things differ: a prompt
that does not fit is refused, not cut from the left, and the beginnings that prompts share are evaluated once.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from phi3edge.answers import Answers
from phi3edge.distributions import log_softmax
from phi3edge.errors import UnsupportedError, UsageError
from phi3edge.progress import Stages, silent
from phi3edge.reference import load_model, loading
from phi3edge.runners import Runner, shared_length

PIECE = 16
"""Tokens generated before the first look for a stop string; as many again before each further one."""

WARM, PROMPT, DECODE = 8, 128, 16
"""Tokens of the measurement that times are estimated from."""

_ROWS = 64  # rows of logits at a time
_HARMLESS = {"do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks", "num_beams"}
_SPREAD = 7919  # a prime: tokens of the measurement's prompt


@dataclass(frozen=True, slots=True)
class Scoring:
    """A continuation whose log-probability is asked.

    Attributes:
        ids: context and continuation, int32 (n,); all but the last are evaluated.
        context: number of tokens of the context.
        asked: task and document.
    """

    ids: np.ndarray
    context: int
    asked: str

    @property
    def fed(self) -> np.ndarray:
        """What is evaluated."""
        return self.ids[:-1]

    @property
    def needs(self) -> int:
        """Tokens of context it takes."""
        return len(self.fed)

    @property
    def key(self) -> str:
        """Names it by all that its answer depends on, but for the model."""
        return _digest("score", self.context, self.ids)


@dataclass(frozen=True, slots=True)
class Generation:
    """A prompt to continue greedily.

    Attributes:
        ids: the prompt, int32 (n,).
        max_tokens: at most so many are generated.
        until: strings before which the answer ends.
        asked: task and document.
    """

    ids: np.ndarray
    max_tokens: int
    until: tuple[str, ...]
    asked: str

    @property
    def fed(self) -> np.ndarray:
        """What is evaluated before anything is generated."""
        return self.ids

    @property
    def needs(self) -> int:
        """Tokens of context it takes."""
        return len(self.ids) + self.max_tokens

    @property
    def key(self) -> str:
        """Names it by all that its answer depends on, but for the model."""
        return _digest("generate", (self.max_tokens, self.until), self.ids)


def _digest(kind: str, what: object, ids: np.ndarray) -> str:
    return hashlib.sha256(f"{kind} {what!r} ".encode() + ids.tobytes()).hexdigest()[:32]


class Requests:
    """Requests of lm-evaluation-harness as token ids, each made once.

    Args:
        tokenizer: the checkpoint's.
        context: the most tokens that one request may take, and the length of a perplexity's windows.
    """

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self._made: dict[str, list[Scoring | Generation]] = {}

    def of(self, request: Instance) -> list[Scoring | Generation]:
        """What a request asks: one part, or as many as a long text has windows.

        Raises:
            UsageError: it does not fit into the context.
            UnsupportedError: it asks for something other than a greedy continuation.
        """
        key = hashlib.sha256(repr((request.request_type, request.args)).encode()).hexdigest()
        if key not in self._made:
            asked = f"{request.task_name}/{request.doc_id}"
            if request.request_type == "generate_until":
                prompt, options = request.args
                made = self._generation(prompt, options, asked)
            elif request.request_type == "loglikelihood_rolling":
                (text,) = request.args
                made = self._rolling(text, asked)
            else:
                context, continuation = request.args
                made = self._scoring(context, continuation, asked)
            for part in made:
                if part.needs > self.context:
                    extra = f" and {part.max_tokens} of answer" if isinstance(part, Generation) else ""
                    raise UsageError(
                        f"{part.asked}: a prompt of {len(part.fed)} tokens{extra} is longer than the context of "
                        f"{self.context}",
                        "fewer examples (--num-fewshot), or a longer --context where the model has one",
                    )
            self._made[key] = made
        return self._made[key]

    def encode(self, text: str) -> list[int]:
        """Token ids as lm-evaluation-harness has them: with what the tokenizer adds, unless the text begins so."""
        if has_bos_prefix(text, self.tokenizer.decode(self.prefix)):
            return self.tokenizer.encode(text, add_special_tokens=False)
        return self.tokenizer.encode(text)

    @property
    def prefix(self) -> int:
        """The token that stands where a text has nothing before it."""
        begin = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if begin is None else begin

    def _scoring(self, context: str, continuation: str, asked: str) -> list[Scoring | Generation]:
        bare = context.rstrip()  # spaces belong to the word that follows them
        if bare:
            before, whole = self.encode(bare), self.encode(context + continuation)
            return [_scoring(before, whole[len(before) :], asked)]
        ids = self.tokenizer.encode(context + continuation, add_special_tokens=False)
        first = [] if ids[:1] == [self.prefix] else [self.prefix]
        return [_scoring((first + ids)[:1], (first + ids)[1:], asked)]

    def _rolling(self, text: str, asked: str) -> list[Scoring | Generation]:
        windows = get_rolling_token_windows(self.encode(text), self.prefix, self.context, 1)
        return [_scoring(before, after, asked) for before, after in map(make_disjoint_window, windows)]

    def _generation(self, prompt: str, options: dict[str, Any], asked: str) -> list[Scoring | Generation]:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(options))
        if wanted.get("do_sample") or wanted.get("num_beams", 1) != 1:
            raise UnsupportedError(
                f"{asked} asks for sampled answers; phi3edge only continues greedily",
                "a copy of the task with do_sample: false, in a --task-folder",
            )
        if unknown := wanted.keys() - _HARMLESS:
            raise UnsupportedError(
                f"{asked} asks for {', '.join(sorted(unknown))}, which a greedy answer does not have"
            )
        ids = np.array(self.encode(prompt), np.int32)
        return [Generation(ids, int(wanted["max_gen_toks"]), tuple(wanted["until"]), asked)]


def _scoring(context: list[int], continuation: list[int], asked: str) -> Scoring:
    if not continuation:
        raise UsageError(f"{asked}: a continuation has no token of its own", "the task's answers must not be empty")
    return Scoring(np.array(context + continuation, np.int32), len(context), asked)


@dataclass(frozen=True, slots=True)
class Cost:
    """What requests cost a model.

    Attributes:
        requests: parts that are asked, equal ones once.
        answered: of these, how many an earlier run has answered.
        passes: runs of the model for the rest: continuations that differ in their last token share one.
        prompt_tokens: tokens of all these passes.
        computed_tokens: those that no pass before it shares: what is evaluated.
        generated_tokens: the most that may be generated.
    """

    requests: int
    answered: int
    passes: int
    prompt_tokens: int
    computed_tokens: int
    generated_tokens: int


class Adapter(TemplateLM):
    """A model of lm-evaluation-harness that keeps its answers. A subclass evaluates tokens.

    Args:
        requests: makes token ids.
        answers: what it has answered so far.
        stages: shows progress.
    """

    def __init__(self, requests: Requests, answers: Answers, stages: Stages = silent) -> None:
        super().__init__()
        self.tokenizer = requests.tokenizer
        self._requests, self._answers, self._stages = requests, answers, stages

    # what a subclass does

    @abstractmethod
    def rows(self, ids: np.ndarray, start: int) -> Iterator[np.ndarray]:
        """Logits of positions from `start` on, float32 (rows, vocabulary) in blocks; a shared beginning is reused."""

    @abstractmethod
    def extend(self, ids: list[int], count: int) -> list[int]:
        """At most `count` most likely tokens that follow; fewer where generation ends."""

    @abstractmethod
    def speed(self) -> tuple[float, float]:
        """Tokens per second of a prompt and of greedy decoding, from a quick measurement."""

    # what lm-evaluation-harness calls

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation in nats, and whether greedy decoding would give it."""
        return [(found[0], found[1]) for (found,) in self._answer(requests, "score")]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of each text in nats, in windows of the context's length."""
        return [sum(found[0] for found in windows) for windows in self._answer(requests, "perplexity")]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy answers, up to the first stop string."""
        return [found for (found,) in self._answer(requests, "generate")]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as the checkpoint's template writes it."""
        return render_chat(self.tokenizer, chat_history, add_generation_prompt)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text."""
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-evaluation-harness's cache of requests, which is not used."""
        return self.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text."""
        return self._requests.encode(string)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("loglikelihood goes another way here")

    # how answers come about

    def cost(self, requests: Sequence[Instance]) -> Cost:
        """What answering would take."""
        parts = {part.key: part for request in requests for part in self._requests.of(request)}
        left = [part for key, part in parts.items() if key not in self._answers]
        generations = [part for part in left if isinstance(part, Generation)]
        groups = _passes(part for part in left if isinstance(part, Scoring))
        fed = [(group[0].fed, min(part.context for part in group) - 1) for group in groups]
        fed += [(part.fed, len(part.fed) - 1) for part in _in_order(generations)]
        before: list[np.ndarray] = [np.empty(0, np.int32), *(ids for ids, _ in fed)]
        shared = [min(_shared(a, b), most) for a, (b, most) in zip(before, fed, strict=False)]
        total = sum(len(ids) for ids, _ in fed)
        return Cost(
            requests=len(parts),
            answered=len(parts) - len(left),
            passes=len(fed),
            prompt_tokens=total,
            computed_tokens=total - sum(shared),
            generated_tokens=sum(part.max_tokens for part in generations),
        )

    def _answer(self, requests: list[Instance], stage: str) -> list[list[Any]]:
        asked = [self._requests.of(request) for request in requests]
        left = {part.key: part for part in itertools.chain(*asked) if part.key not in self._answers}
        with self._stages(stage, len(left)) as advance:
            for group in _passes(part for part in left.values() if isinstance(part, Scoring)):
                for part, answer in zip(group, self._score(group), strict=True):
                    self._answers.add(part.key, part.asked, answer)
                advance(len(group))
            for generation in _in_order([part for part in left.values() if isinstance(part, Generation)]):
                self._answers.add(generation.key, generation.asked, self._generate(generation))
                advance(1)
        return [[self._answers[part.key] for part in parts] for parts in asked]

    def _score(self, group: Sequence[Scoring]) -> list[list[Any]]:
        """Log-probability and greediness of continuations that differ in nothing but their last token."""
        fed, start = group[0].fed, min(part.context for part in group) - 1
        scores, greedy, last, at = [np.empty(0)], [np.empty(0, bool)], np.empty(0), start
        for rows in self.rows(fed, start):
            log_probs = log_softmax(rows)
            following = fed[at + 1 : at + 1 + len(rows)]
            here = np.arange(len(following))
            scores.append(log_probs[here, following])
            greedy.append(log_probs[here].argmax(-1) == following)
            last, at = log_probs[-1], at + len(rows)
        inner, agrees, best = np.concatenate(scores), np.concatenate(greedy), int(last.argmax())
        answers = []
        for part in group:
            token, first = int(part.ids[-1]), part.context - 1 - start
            answers.append([float(inner[first:].sum() + last[token]), bool(agrees[first:].all() and best == token)])
        return answers

    def _generate(self, part: Generation) -> str:
        prompt: list[int] = part.ids.tolist()
        out: list[int] = []
        while len(out) < part.max_tokens:
            wanted = min(max(PIECE, len(out)), part.max_tokens - len(out))
            piece = self.extend(prompt + out, wanted)
            end = next((n for n in range(1, len(piece) + 1) if self._stops(out + piece[:n], part.until)), None)
            out += piece[:end]
            if end is not None or len(piece) < wanted:
                break
        text = self.tokenizer.decode(out, skip_special_tokens=True)
        return postprocess_generated_text(text, list(part.until), None)

    def _stops(self, ids: list[int], until: Sequence[str]) -> bool:
        text = self.tokenizer.decode(ids)
        return any(stop in text for stop in until if stop)


def render_chat(tokenizer: Any, chat: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """A chat as the checkpoint's template writes it, with the opening of an answer or within one."""
    return tokenizer.apply_chat_template(
        chat,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )


def _in_order(parts: Sequence[Any]) -> list[Any]:
    """Sorted by tokens, so that those that share a beginning are neighbours."""
    return sorted(parts, key=lambda part: part.fed.astype(">i4").tobytes())


def _passes(parts: Iterator[Scoring]) -> list[list[Scoring]]:
    """Groups that one run of the model answers, in order."""
    return [list(group) for _, group in itertools.groupby(_in_order(list(parts)), lambda part: part.fed.tobytes())]


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    other = np.flatnonzero(a[:n] != b[:n])
    return int(other[0]) if len(other) else n


class RunnerModel(Adapter):
    """An artifact in its runtime."""

    def __init__(self, runner: Runner, requests: Requests, answers: Answers, stages: Stages = silent) -> None:
        super().__init__(requests, answers, stages)
        self._runner = runner

    def rows(self, ids: np.ndarray, start: int) -> Iterator[np.ndarray]:
        """See `Adapter.rows`."""
        return self._runner.logits_blocks(ids, start, reuse=True)

    def extend(self, ids: list[int], count: int) -> list[int]:
        """See `Adapter.extend`."""
        return self._runner.generate(ids, count, reuse=True)

    def speed(self) -> tuple[float, float]:
        """See `Adapter.speed`."""
        found = self._runner.speed(PROMPT, DECODE)
        return found["prompt_tokens_per_s"], found["decode_tokens_per_s"]


class ReferenceModel(Adapter):
    """The checkpoint itself in float32, through transformers; loaded when it is first needed.

    Args:
        checkpoint: folder in Hugging Face layout.
        eos: ids that end a generation.
        requests: see Adapter.
        answers: see Adapter.
        stages: see Adapter.

    Its methods raise what `reference.load_model` raises.
    """

    def __init__(
        self, checkpoint: Path, eos: tuple[int, ...], requests: Requests, answers: Answers, stages: Stages = silent
    ) -> None:
        super().__init__(requests, answers, stages)
        self._checkpoint, self._eos = checkpoint, eos
        self.release()

    def release(self) -> None:
        """Gives its memory back; what is asked next loads it again."""
        self._model: Any = None
        self._past: Any = None
        self._held: list[int] = []  # tokens whose keys and values are in `_past`

    def _load(self) -> None:
        with self._stages(loading(self._checkpoint), None):
            self._model = load_model(self._checkpoint)
        config = self._model.config
        original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
        # beyond a sliding window the cache forgets; beyond the original context other factors rotate all keys
        self._reusable = min(original, getattr(config, "sliding_window", None) or original) - 1

    def rows(self, ids: np.ndarray, start: int) -> Iterator[np.ndarray]:
        """See `Adapter.rows`."""
        import torch

        if self._model is None:
            self._load()
        tokens = ids.tolist()
        with torch.inference_mode():
            kept = self._keep(tokens, start)
            feed = torch.tensor([tokens[kept:]])
            step = self._model(feed, past_key_values=self._past, use_cache=True, logits_to_keep=len(tokens) - start)
        self._past, self._held = step.past_key_values, tokens
        logits = step.logits[0]
        for row in range(0, len(logits), _ROWS):
            yield logits[row : row + _ROWS].numpy()

    def extend(self, ids: list[int], count: int) -> list[int]:
        """See `Adapter.extend`."""
        out: list[int] = []
        while len(out) < count:
            (row,) = self.rows(np.array(ids + out, np.int32), len(ids) + len(out) - 1)
            token = int(row[-1].argmax())
            if token in self._eos:
                break
            out.append(token)
        return out

    def speed(self) -> tuple[float, float]:
        """See `Adapter.speed`."""
        prompt = np.arange(PROMPT + DECODE, dtype=np.int32) * _SPREAD % len(self.tokenizer)
        list(self.rows(prompt[-WARM:], WARM - 1))
        started = time.perf_counter()
        list(self.rows(prompt[:PROMPT], PROMPT - 1))
        middle = time.perf_counter()
        for n in range(PROMPT + 1, PROMPT + DECODE + 1):  # given, not greedy: those might end at once
            list(self.rows(prompt[:n], n - 1))
        return PROMPT / (middle - started), DECODE / (time.perf_counter() - middle)

    def _keep(self, tokens: list[int], most: int) -> int:
        """Empties the cache but for at most `most` tokens that `tokens` begins with, too; how many stay."""
        kept = min(shared_length(self._held, tokens), most)
        if not kept or max(len(self._held), len(tokens)) > self._reusable:
            self._past, self._held = None, []
            return 0
        if kept < len(self._held):
            self._past.crop(kept - len(self._held))
        return kept
