"""A chat with an artifact, token by token: its own template, its own tokenizer, its own ends of an answer.

The KV cache stays between turns: of a new turn's prompt only what differs from what was evaluated is evaluated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from phi3edge.artifact import Artifact
from phi3edge.errors import MissingExtraError, UsageError
from phi3edge.gguf_file import read_header
from phi3edge.runners import Runner, shared_length

LONGEST = 4096
"""Tokens of context for an artifact whose manifest says nothing, if it has positions for so many."""

_PIECE = 128  # tokens of a prompt evaluated at once: between them the user can stop it
_BROKEN = "\ufffd"  # what stands for bytes that are no character, or not yet

Finish = Literal["stop", "length", "context", "interrupted"]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely one.
        top_p: draw among the likeliest tokens that together have this probability.
        seed: of the drawing; None for another one each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"--temperature {self.temperature:g}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p:g}: expected more than 0, at most 1")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and how it came.

    Attributes:
        finish: "stop": the model ended it; "length": max_tokens did; "context": there is no room for another token;
            "interrupted": the user did.
        tokens: of the answer.
        prompt_tokens: of the whole prompt.
        reused_tokens: how many of them were in the KV cache.
        first_s: seconds until its first token was there.
        rest_s: seconds of all after it.
    """

    text: str
    finish: Finish
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    first_s: float
    rest_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token; None without a second one."""
        return (self.tokens - 1) / self.rest_s if self.tokens > 1 and self.rest_s > 0 else None


@dataclass(slots=True)
class Chat:
    """A conversation with an open artifact.

    Attributes:
        runner: its model.
        render: messages to the text of a prompt.
        sampling: how tokens are chosen.
        max_tokens: of an answer; None for as many as there is room for.
        messages: so far; a system message may stand first.
        last: the answer that `ask` gave last.
    """

    runner: Runner
    render: Callable[[list[Message]], str]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    messages: list[Message] = field(default_factory=list)
    last: Answer | None = None
    _held: list[int] = field(default_factory=list)  # token ids in the KV cache
    _random: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.sampling.seed)

    @property
    def context(self) -> int:
        """Tokens that the conversation may have."""
        return int(self.runner.info()["context"])

    def ask(self, question: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Answer a question, piece by piece: whole characters, as they come. `last` is the answer when it ends.

        Args:
            question: the user's turn.
            stopped: asked before every token; True ends the answer there.

        Raises:
            UsageError: no room for the question and an answer.
            RunnerError: the runtime failed.
        """
        started = time.perf_counter()
        turn = [*self.messages, {"role": "user", "content": question}]
        ids = self.runner.tokenize(self.render(turn), special=True, bos=False)
        if len(ids) >= self.context:
            raise UsageError(
                f"the context of {self.context} tokens is full: this conversation needs {len(ids)} before its answer",
                "begin another one, or give it more with --context",
            )
        reused = min(shared_length(ids, self._held), len(ids) - 1)  # the last token's logits are wanted anyway
        ends, chosen, shown = set(self.runner.info()["eog_ids"]), list[int](), ""
        logits = self._evaluate(ids, reused, stopped)
        first = time.perf_counter()
        finish: Finish = "interrupted"
        while logits is not None and not stopped():
            token = choose(logits, self.sampling, self._random)
            if token in ends:
                finish = "stop"
                break
            chosen.append(token)
            whole = self.runner.detokenize(chosen).rstrip(_BROKEN)
            yield whole[len(shown) :]
            shown = whole if len(whole) > len(shown) else shown
            if len(self._held) == self.context:
                finish = "context"
                break
            if len(chosen) == self.max_tokens:
                finish = "length"
                break
            logits = self._evaluate([*ids, *chosen], len(self._held), stopped)
        text = self.runner.detokenize(chosen)
        yield text[len(shown) :]
        self.messages = [*turn, {"role": "assistant", "content": text}]
        rest = time.perf_counter() - first
        self.last = Answer(text, finish, len(chosen), len(ids), reused, first - started, rest)

    def _evaluate(self, ids: list[int], start: int, stopped: Callable[[], bool]) -> np.ndarray | None:
        """Evaluate ids[start:] after ids[:start], which are held; the last one's logits, None if it was stopped."""
        logits, most = None, self.runner.info().get("batch", _PIECE)
        piece = (
            most if most >= self.context else _PIECE
        )  # what takes a whole context at once would begin anew each time
        for first in range(start, len(ids), piece):
            if stopped():
                return None
            self._held = ids[: first + piece]
            logits = self.runner.logits(np.array(self._held), len(self._held) - 1, reuse=True)[0]
        return logits


def choose(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """The next token.

    Args:
        logits: float32, shape (vocabulary,).
        sampling: how.
        random: what to draw with.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    p = np.exp(scaled[order])
    p /= p.sum()
    kept = int(np.searchsorted(p.cumsum(), sampling.top_p)) + 1 if sampling.top_p < 1 else len(p)
    return int(random.choice(order[:kept], p=p[:kept] / p[:kept].sum()))


def open_chat(
    runner: Runner,
    artifact: Artifact,
    system: str | None = None,
    sampling: Sampling = Sampling(),
    max_tokens: int | None = None,
) -> Chat:
    """Begin a conversation.

    Args:
        runner: the artifact, opened.
        artifact: where its template is.
        system: a system message; None for none.
        sampling: how tokens are chosen.
        max_tokens: of an answer.

    Raises:
        UsageError: no chat template, one that fails, or one that has no place for a system message.
    """
    template = runner.info()["chat_template"]
    if not template:
        raise UsageError(
            f"{artifact.file.name} has no chat template: it completes text, and cannot chat",
            "export it from a checkpoint that has one",
        )
    render = _own_engine(runner) if artifact.is_onnx else _jinja(template, _special_tokens(artifact))
    opening = [{"role": "system", "content": system}] if system else []
    if system and system not in render([*opening, {"role": "user", "content": "?"}]):
        raise UsageError(f"the chat template of {artifact.file.name} has no place for a system message")
    return Chat(runner, render, sampling, max_tokens, opening)


def _own_engine(runner: Runner) -> Callable[[list[Message]], str]:
    def render(messages: list[Message]) -> str:
        return runner.chat(messages) or ""

    return render


def _special_tokens(artifact: Artifact) -> dict[str, str]:
    """The texts of the tokens that templates name, from a GGUF file."""
    found = read_header(artifact.file).metadata
    tokens = found.get("tokenizer.ggml.tokens", [])
    ids = {name: found.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return {f"{name}_token": tokens[n] for name, n in ids.items() if n is not None and n < len(tokens)}


def _jinja(template: str, tokens: dict[str, str]) -> Callable[[list[Message]], str]:
    """A chat template as transformers renders it; it comes with the file, so it runs in a sandbox."""
    try:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise MissingExtraError("rendering chat templates", "llama-cpp") from None

    def fail(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    def render(messages: list[Message]) -> str:
        try:
            return compiled.render(messages=messages, add_generation_prompt=True, **tokens)
        except (TemplateError, TypeError, ValueError) as error:
            raise UsageError(f"the chat template refuses the conversation: {error}") from error

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": fail, "strftime_now": time.strftime}
    try:
        compiled = environment.from_string(template)
    except TemplateError as error:
        raise UsageError(f"the chat template cannot be read: {error}") from error
    return render
