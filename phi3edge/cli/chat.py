"""`phi3edge chat`: talk with an artifact."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phi3edge.cli._errors import INTERRUPTED
from phi3edge.cli._options import JsonOption, ThreadsOption
from phi3edge.cli._output import print_json, say
from phi3edge.errors import UsageError

if TYPE_CHECKING:
    from phi3edge.chat import Answer, Chat


def chat(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="An exported folder, .gguf file or ONNX folder.")
    ],
    question: Annotated[
        str | None,
        typer.Argument(metavar="[QUESTION]", help="Answer this and end; default: what is piped in, or chat."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among tokens of this probability together.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Of the drawing; default: another each time.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Of an answer; default: while there is room.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=16, help="Tokens of the whole chat; default: the manifest's, or 4096."),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Chat with an artifact, whoever made it, by its own template, tokenizer and end tokens.

    Ctrl-C stops an answer, Ctrl-D ends the chat. With a question, or one piped in, its answer alone goes to stdout.

    Examples: `phi3edge chat dist/demo-iphone`, `phi3edge chat model.gguf "Why is the sky blue?"`,
    `phi3edge chat dist/demo-cpu --temperature 0.8 --top-p 0.95 --seed 1 < question.txt`
    """
    from phi3edge.artifact import find_artifact
    from phi3edge.chat import LONGEST, Sampling, open_chat
    from phi3edge.runners import runner_for

    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
    if as_json and not question:
        raise UsageError("--json is for one question", 'phi3edge chat ARTIFACT "..." --json')
    if question == "":
        raise UsageError("there is no question", 'phi3edge chat ARTIFACT "..."')
    sampling = Sampling(temperature, top_p, seed)
    found = find_artifact(artifact)
    runtime = runner_for(found.file)
    said = found.said or {}
    options: dict[str, Any] = {"kv_type": said["kv_cache"]} if said.get("kv_cache") else {}
    room = context or said.get("context") or min(LONGEST, found.positions or LONGEST)
    with runtime.open(found.file, context=room, threads=threads, **options) as runner:
        talk = open_chat(runner, found, system, sampling, max_tokens)
        if question is None:
            _converse(talk, found.file.name)
        else:
            _answer_one(talk, question, as_json)


def _answer_one(talk: Chat, question: str, as_json: bool) -> None:
    answer = _show(talk, question, quiet=as_json)
    if as_json:
        print_json(
            {
                "question": question,
                "answer": answer.text,
                "finish": answer.finish,
                "tokens": answer.tokens,
                "prompt_tokens": answer.prompt_tokens,
                "time_to_first_token_s": answer.first_s,
                "decode_tokens_per_s": answer.tokens_per_s,
            }
        )
    if answer.finish == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _converse(talk: Chat, name: str) -> None:
    info = talk.runner.info()
    say(f"{name}: {info['runtime']}, {info['threads']} threads, {talk.context} tokens of context")
    say("Ctrl-C stops an answer, Ctrl-D ends the chat")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("\nCtrl-D ends the chat")
            continue
        if question and _show(talk, question).finish == "context":
            return


def _show(talk: Chat, question: str, quiet: bool = False) -> Answer:
    """Answers, on stdout as it comes unless `quiet`; then its speed on stderr."""
    with _interruptible() as stopped:
        for piece in talk.ask(question, stopped):
            if not quiet:
                sys.stdout.write(piece)
                sys.stdout.flush()
    answer = talk.last
    assert answer is not None
    if quiet:
        return answer
    sys.stdout.write("\n")
    sys.stdout.flush()
    speed = f", {answer.tokens_per_s:.1f} tokens/s" if answer.tokens_per_s else ""
    say(
        f"[{answer.tokens} tokens{speed}; first after {answer.first_s:.2f} s, prompt of {answer.prompt_tokens}, "
        f"{answer.reused_tokens} of them kept]"
    )
    if answer.finish == "context":
        say(f"the context of {talk.context} tokens is full: the chat ends here; --context gives it more")
    if answer.finish == "length":
        say(f"stopped after {answer.tokens} tokens: --max-tokens")
    return answer


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """While an answer comes, Ctrl-C only asks it to stop."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
