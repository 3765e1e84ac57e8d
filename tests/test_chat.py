"""Chatting: what transformers would answer, whole characters, turns that keep the context, and ways to end."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from _genai import write_genai
from _gguf import write_gguf
from _models import MHA, Shape, write_model
from _tokenizers import PIECES, write_sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi3edge import build
from phi3edge.artifact import find_artifact
from phi3edge.chat import Chat, Sampling, choose, open_chat
from phi3edge.cli import chat as command
from phi3edge.errors import UsageError
from phi3edge.runners import Runner, llama_cpp, ort_genai
from phi3edge.targets import Format

GREEDY = Sampling()


class Scripted:
    """A runner of a model that says some bytes, one a token, whatever it is asked; token 256 ends an answer."""

    END = 256

    def __init__(self, answer: bytes, context: int = 512) -> None:
        self.answer, self.said, self._context = [*answer, self.END], 0, context
        self.evaluated: list[int] = []  # how many ids each call held

    def info(self) -> dict[str, Any]:
        return {"runtime": "a script", "threads": 1, "context": self._context, "eog_ids": [self.END]}

    def tokenize(self, text: str, *, special: bool, bos: bool) -> list[int]:
        assert (special, bos) == (True, False)
        return list(text.encode())

    def detokenize(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def logits(self, ids: np.ndarray, start: int, *, reuse: bool) -> np.ndarray:
        assert start == len(ids) - 1
        assert reuse
        self.evaluated.append(len(ids))
        prompt = bytes(ids.tolist()).rfind(b"A:") + 2  # a piece of a prompt has none
        row = np.zeros((1, 257), np.float32)
        row[0, self.answer[(len(ids) - prompt) % len(self.answer)]] = 1
        return row


def render(messages: list[dict[str, str]]) -> str:
    return "".join(f"{m['role'][0].upper()}:{m['content']}\n" for m in messages) + "A:"


def scripted(answer: bytes, context: int = 512, **options: Any) -> Chat:
    return Chat(Scripted(answer, context), render, **options)  # type: ignore[arg-type]


def test_characters_come_whole_and_spaces_stay() -> None:
    text = " a é 你好 🙂 end "
    talk = scripted(text.encode())
    pieces = list(talk.ask("?"))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "🙂" in pieces
    assert talk.last is not None
    assert (talk.last.finish, talk.last.tokens, talk.last.text) == ("stop", len(text.encode()), text)


def test_bytes_that_never_become_a_character_are_shown_as_such() -> None:
    assert "".join(scripted(b"a\xff\xe4\xbdb\xf0\x9f").ask("?")) == "a\ufffd\ufffdb\ufffd"


def test_turns_follow_each_other_and_keep_the_context() -> None:
    talk = scripted(b"yes", messages=[{"role": "system", "content": "Be short."}])
    assert "".join(talk.ask("first")) == "yes"
    assert talk.last is not None
    assert talk.last.reused_tokens == 0
    assert "".join(talk.ask("second")) == "yes"
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    whole = render(talk.messages[:-1])
    assert talk.last.prompt_tokens == len(whole)
    assert talk.last.reused_tokens == whole.index("U:second") - 1  # up to the line's end, which was not evaluated


def test_a_full_context_ends_the_answer_and_then_the_chat() -> None:
    talk = scripted(b"x" * 100, context=24)
    answer = "".join(talk.ask("0123456789"))
    assert talk.last is not None
    assert talk.last.finish == "context"
    assert len(render(talk.messages[:1])) + len(answer) == 24 + 1  # the last token needs no place
    assert max(talk.runner.evaluated) == 24  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="the context of 24 tokens is full"):
        list(talk.ask("more"))


def test_an_answer_has_at_most_max_tokens() -> None:
    talk = scripted(b"x" * 100, max_tokens=5)
    assert "".join(talk.ask("?")) == "xxxxx"
    assert talk.last is not None
    assert talk.last.finish == "length"


def test_stopped_while_the_prompt_is_read() -> None:
    talk = scripted(b"yes", context=2000)
    asked = iter([False, True])
    assert "".join(talk.ask("long " * 100, lambda: next(asked, True))) == ""
    assert talk.last is not None
    assert (talk.last.finish, talk.last.tokens) == ("interrupted", 0)
    assert len(talk.runner.evaluated) == 1  # type: ignore[attr-defined]
    assert "".join(talk.ask("and now?")) == "yes"


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = scripted(b"x" * 100)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    asked: Iterator[str | type[BaseException]] = iter(["one", KeyboardInterrupt, "two", "", EOFError])

    def ask(prompt: str) -> str:
        what = next(asked)
        if isinstance(what, str):
            return what
        raise what

    def interrupted(ids: np.ndarray, start: int, *, reuse: bool) -> np.ndarray:
        row = Scripted.logits(talk.runner, ids, start, reuse=reuse)  # type: ignore[arg-type]
        if len(talk.messages) == 0 and len(talk.runner.evaluated) == 4:  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGINT)
        return row

    monkeypatch.setattr("builtins.input", ask)
    talk.runner.logits = interrupted  # type: ignore[method-assign]
    command._converse(talk, "a script")
    said = capsys.readouterr()
    first, second, _ = said.out.split("\n")
    assert (len(first), len(second)) == (3, 100)
    assert said.err.count("tokens; first after") + said.err.count("tokens/s; first after") == 2
    with pytest.raises(KeyboardInterrupt):  # afterwards Ctrl-C is again what it was
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_sampling() -> None:
    logits, random = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), np.random.default_rng(0)
    assert choose(logits, GREEDY, random) == 0
    counts = np.bincount([choose(logits, Sampling(1.0), random) for _ in range(4000)], minlength=4) / 4000
    assert counts == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.04)
    counts = np.bincount([choose(logits, Sampling(1.0, 0.75), random) for _ in range(4000)], minlength=4) / 4000
    assert counts == pytest.approx([0.625, 0.375, 0, 0], abs=0.04)
    sharp = [choose(logits, Sampling(0.25), random) for _ in range(1000)]
    assert sharp.count(0) / 1000 == pytest.approx(0.5**4 / (0.5**4 + 0.3**4 + 0.15**4 + 0.05**4), abs=0.05)
    for wrong in ({"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}):
        with pytest.raises(UsageError):
            Sampling(**wrong)


def test_a_seed_makes_the_same_answer() -> None:
    answers = {"".join(scripted(b"yes", sampling=Sampling(2.0, seed=7), max_tokens=20).ask("?")) for _ in range(2)}
    assert len(answers) == 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", MHA)


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def artifact(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return write_gguf(model, folder / "tiny.gguf") if request.param == "gguf" else write_genai(model, folder / "tiny")


def opened(artifact: Path, context: int = 256) -> Runner:
    module: ModuleType = llama_cpp if artifact.suffix == ".gguf" else ort_genai
    return module.open(
        artifact, context=context, threads=1, plain=True, **({"kv_type": "f32"} if module is llama_cpp else {})
    )


def test_two_turns_are_what_transformers_answers(model: Path, artifact: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with opened(artifact) as runner:
        talk = open_chat(runner, find_artifact(artifact), max_tokens=12)
        for question in ("What is it?", " And then, the é 🙂?"):
            turn = [*talk.messages, {"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                out = reference.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=[0, 3], pad_token_id=0)
            expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert joined("".join(talk.ask(question))) == joined(expected)
        assert talk.last is not None
        assert talk.last.reused_tokens > 0


def joined(text: str) -> str:
    """With one sign for several broken bytes in a row: their number is each decoder's own."""
    return re.sub("\ufffd+", "\ufffd", text)


def test_broken_bytes_hide_nothing_that_follows(artifact: Path) -> None:
    with opened(artifact) as runner:
        smile, word = (runner.tokenize(text, special=True, bos=False) for text in ("🙂", "word"))
        for broken in (smile[:2], smile[1:], [smile[0]] * 5):
            said = runner.detokenize([*word, *broken, *word, *smile, *broken, *word])
            assert joined(said) == "word\ufffdword🙂\ufffdword"
            assert joined(runner.detokenize([*word, *broken])) == "word\ufffd"


def test_a_graph_that_chooses_by_length_goes_on_from_token_to_token(model: Path, tmp_path: Path) -> None:
    folder = write_genai(model, tmp_path / "tiny")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    graph.graph.node.append(onnx.helper.make_node("Greater", ["total32", "last32"], ["longer"]))
    onnx.save(graph, folder / "model.onnx")
    with opened(folder, context=400) as runner:
        talk = open_chat(runner, find_artifact(folder), max_tokens=8)
        calls = []
        original = runner.logits
        runner.logits = lambda ids, *args, **options: calls.append(len(ids)) or original(ids, *args, **options)  # type: ignore[method-assign,assignment,func-returns-value]
        answer = "".join(talk.ask("long " * 40))
        assert talk.last is not None
        first = talk.last.prompt_tokens
        assert first > 128  # a prompt at once
        assert calls == [*range(first, first + talk.last.tokens)]
        ids = runner.tokenize(talk.render(talk.messages[:1]), special=True, bos=False)
        assert answer == runner.detokenize(runner.generate(ids, 8))


def test_detokenizing_is_the_inverse_of_tokenizing(artifact: Path) -> None:
    text = " two  spaces, é 你好 🙂\n\tthe end "
    with opened(artifact) as runner:
        ids = runner.tokenize(text, special=True, bos=False)
        assert runner.detokenize(ids) == text
        assert runner.detokenize([1, *ids, 3]) == text  # special tokens are not shown
        assert runner.detokenize([]) == ""
        assert "\ufffd" in runner.detokenize(runner.tokenize("🙂", special=True, bos=False)[:-1])


@pytest.mark.parametrize("format_", ["gguf", "onnx"])
def test_a_sentencepiece_text_is_what_transformers_decodes(tmp_path: Path, format_: Format) -> None:
    model = write_model(tmp_path / "model", Shape(vocab=PIECES + 20))
    write_sentencepiece(model)
    out = build.export(str(model), "cpu", recipe="f32", format_=format_, out=tmp_path / "out", threads=1, force=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with opened(out.artifact) as runner:
        for text in ("The answer", " two  spaces", "naïve 你好 🙂 end", "\n\nlines", "def f(x):\n    return x"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            for start in range(len(ids)):
                shown = runner.detokenize(ids[start:])
                expected = tokenizer.decode(ids[start:], skip_special_tokens=True)
                if "\ufffd" not in shown:  # llama.cpp takes off the space that its tokenizer puts before a text
                    assert shown == (expected.removeprefix(" ") if format_ == "gguf" else expected)


def test_ctrl_c_does_not_end_the_runtime(artifact: Path) -> None:
    with opened(artifact) as runner:
        before = runner.generate([5, 6, 7], 4)
        os.kill(runner.pid, signal.SIGINT)
        assert runner.generate([5, 6, 7], 4) == before


def test_a_system_message_needs_a_place(model: Path, tmp_path: Path) -> None:
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    file = write_gguf(model, tmp_path / "tiny.gguf", template=template)
    with opened(file) as runner, pytest.raises(UsageError, match="no place for a system message"):
        open_chat(runner, find_artifact(file), "Be short.")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only once') }}", "refuses the conversation: only once"),
        ("{% for %}", "cannot be read"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses the conversation.*unsafe"),
    ],
)
def test_a_template_that_fails_or_reaches_out(model: Path, tmp_path: Path, template: str, message: str) -> None:
    file = write_gguf(model, tmp_path / "tiny.gguf", template=template)
    with opened(file) as runner, pytest.raises(UsageError, match=message):
        list(open_chat(runner, find_artifact(file)).ask("?"))


def run(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    code = [sys.executable, "-m", "phi3edge", "chat", *arguments, "--threads", "1"]
    return subprocess.run(code, capture_output=True, text=True, input=given, timeout=120)


def test_one_question_from_the_command_line_or_a_pipe(artifact: Path) -> None:
    asked = run(str(artifact), "What?", "--max-tokens", "6", "--context", "128")
    assert asked.returncode == 0, asked.stderr
    assert "first after" in asked.stderr
    piped = run(str(artifact), "--max-tokens", "6", "--context", "128", "--json", given="What?\n")
    said = json.loads(piped.stdout)
    assert piped.stderr == ""
    assert asked.stdout == said["answer"] + "\n"
    assert (said["question"], said["finish"], said["tokens"]) == ("What?", "length", 6)


def test_usage_errors(artifact: Path) -> None:
    for arguments, given, message in (
        ((str(artifact),), "", "there is no question"),
        (("/no/such.gguf", "?"), None, "does not exist"),
        ((str(artifact), "?", "--top-p", "2"), None, "--top-p 2"),
        ((str(artifact), "many words " * 50, "--context", "64"), None, "context of 64 tokens is full"),
    ):
        done = run(*arguments, given=given)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stdout == ""
