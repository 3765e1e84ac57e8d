"""What a prompt meets before and after the weights: token ids, chat template, end-of-generation, greedy answers."""

from __future__ import annotations

from typing import Any

from phi3edge.errors import RunnerError
from phi3edge.report import Answer, Mismatch, Tokens
from phi3edge.runners import Runner

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three uses of a paper clip.",
    "Answer with one word: what is the opposite of cold?",
    "How much is 12 + 30? Only the number.",
    "Say hello.",
    "Translate to Spanish: good morning",
    "Is water wet? Answer yes or no.",
)
"""Answered greedily. Some have short answers, so that they end."""

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


LINES = 64
"""Lines of the text scored on whose token ids are compared, evenly spaced."""


def check_tokens(runner: Runner, tokenizer: Any, eos: tuple[int, ...], text: str) -> Tokens:
    """Compares token ids of fixed strings, of special tokens, of lines of a text, and of a rendered chat."""
    specials = sorted(str(token) for token in tokenizer.get_added_vocab())[:32]
    lines = [line for line in text.splitlines() if line.strip()]
    chosen = lines[:: max(len(lines) // LINES, 1)][:LINES]
    strings = [*STRINGS, *(f"{token} a{token}\n{token}" for token in specials), *chosen]
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


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a question as a chat, or as it is where the checkpoint has no template."""
    if not tokenizer.chat_template:
        return tokenizer(question)["input_ids"]
    return _ids(tokenizer, _render(tokenizer, [{"role": "user", "content": question}]))


def compare_answer(
    tokenizer: Any, prompt: str, reference: list[int], artifact: list[int], ended: bool, stops: bool | None
) -> Answer:
    """Two greedy continuations side by side; see report.Answer."""
    longest = max(len(reference), len(artifact))
    equal = next((i for i, (a, b) in enumerate(zip(reference, artifact, strict=False)) if a != b), None)
    return Answer(
        prompt=prompt,
        reference=tokenizer.decode(reference),
        artifact=tokenizer.decode(artifact),
        equal=min(len(reference), len(artifact)) if equal is None else equal,
        tokens=longest,
        ended=ended,
        stops=stops,
    )
