"""What every runner promises, asked of each of them with the same model."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from _genai import write_genai
from _gguf import write_gguf
from _models import GROUPED, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi3edge import registry
from phi3edge.errors import MissingExtraError, RunnerError
from phi3edge.runners import Runner, llama_cpp, ort_genai

THREADS = 1  # two would wait for each other on a busy machine
CONTEXT, VOCABULARY = 1024, 320


@dataclass(frozen=True)
class Kind:
    """A runner, and how to make what it runs.

    Attributes:
        write: makes an artifact in an empty folder, from a checkpoint and its end-of-generation ids.
        package: what Python imports.
    """

    module: ModuleType
    runtime: str
    write: Callable[[Path, Path, tuple[int, ...]], Path]
    package: str
    extra: str

    def open(self, artifact: Path, context: int = 256, **options) -> Runner:
        return self.module.open(artifact, context=context, threads=THREADS, kv_type="f32", **options)


KINDS = {
    "llama_cpp": Kind(
        llama_cpp,
        "llama.cpp",
        lambda checkpoint, folder, eos: write_gguf(checkpoint, folder / "tiny.gguf", eos=eos[0]),
        "llama_cpp",
        "llama-cpp",
    ),
    "ort_genai": Kind(
        ort_genai,
        "ONNX Runtime GenAI",
        lambda checkpoint, folder, eos: write_genai(checkpoint, folder / "tiny", eos=eos),
        "onnxruntime_genai",
        "onnx",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    longer = {"max_position_embeddings": CONTEXT, "original_max_position_embeddings": CONTEXT, "sliding_window": 2047}
    return write_model(tmp_path_factory.mktemp("checkpoint") / "tiny", GROUPED, **longer)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def artifact(kind: Kind, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kind.write(checkpoint, tmp_path_factory.mktemp("artifact"), (0, 3))


@pytest.fixture(scope="module")
def runner(kind: Kind, artifact: Path) -> Iterator[Runner]:
    with kind.open(artifact, CONTEXT, plain=True, timeout=120) as runner:
        yield runner


@pytest.fixture(scope="module")
def model(checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def reference(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


def random_ids(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count)


def test_every_runner_is_tested_here() -> None:
    assert set(KINDS) == set(registry.names("runners"))


def test_it_accepts_what_it_runs_and_nothing_else(kind: Kind, artifact: Path, checkpoint: Path) -> None:
    assert kind.module.accepts(artifact)
    assert not kind.module.accepts(checkpoint)
    assert [k for k in KINDS.values() if k.module.accepts(artifact)] == [kind]
    assert all(file.is_file() for file in kind.module.files(artifact))


def test_logits_are_those_of_transformers(runner: Runner, model) -> None:
    ids = random_ids(700)  # more than one batch
    expected = reference(model, ids)
    logits = runner.logits(ids)
    assert logits.shape == (700, VOCABULARY)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=2e-4)
    assert np.abs(expected[1:] - expected[:-1]).mean() > 0.1  # the bound above means something


def test_the_same_ids_give_the_same_logits(runner: Runner) -> None:
    ids = random_ids(300, 1)
    first = runner.logits(ids)
    runner.generate([5, 6, 7], 3)  # leaves nothing behind
    np.testing.assert_array_equal(runner.logits(ids), first)


def test_logits_look_back_only(runner: Runner) -> None:
    ids = random_ids(100, 2)
    np.testing.assert_allclose(runner.logits(ids[:40]), runner.logits(ids)[:40], atol=1e-4)


def test_logits_start_anywhere(runner: Runner) -> None:
    ids = random_ids(700, 3)
    everything = runner.logits(ids)
    for start in (0, 1, 511, 512, 513, 699):
        tail = runner.logits(ids, start)
        assert tail.shape == (700 - start, VOCABULARY)
        np.testing.assert_allclose(tail, everything[start:], atol=1e-4)
    assert [len(block) for block in runner.logits_blocks(ids[:150], 20)] == [64, 64, 2]


def test_generation_is_greedy_and_stops_at_the_end(
    kind: Kind, runner: Runner, model, checkpoint: Path, tmp_path: Path
) -> None:
    prompt = AutoTokenizer.from_pretrained(checkpoint)("in the hand")["input_ids"]
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(reference(model, np.array(ids))[-1].argmax()))
    expected = ids[len(prompt) :]
    assert not {0, 3} & set(expected)  # else choose another prompt
    assert runner.generate(prompt, 12) == expected
    assert runner.generate(prompt, 3) == expected[:3]
    assert runner.generate(prompt, 0) == []
    assert runner.logits(np.array(ids)).argmax(-1)[len(prompt) - 1 : -1].tolist() == expected
    other = kind.write(checkpoint, tmp_path, (expected[6],))
    with kind.open(other, plain=True) as stops:
        assert expected[6] in stops.info()["eog_ids"]
        assert stops.generate(prompt, 12) == expected[: expected.index(expected[6])]
        assert stops.generate(prompt, 12) == stops.generate(prompt, 12)  # also after it has stopped
        assert stops.speed(8, 40)["decode_tokens_per_s"] > 0  # which goes on past the end


def test_tokens_are_the_checkpoints(runner: Runner, checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for text in ("", " ", "in the  hand\n", "<|user|>\nüber 12<|end|>\n<|assistant|>\n"):
        assert runner.tokenize(text, special=True, bos=False) == tokenizer(text)["input_ids"]
    assert runner.tokenize("the", special=False, bos=False) == tokenizer("the")["input_ids"]
    assert runner.tokenize("<|user|>", special=True, bos=True) == [1]  # this checkpoint adds nothing to a prompt


def test_chats_are_the_checkpoints(kind: Kind, runner: Runner, checkpoint: Path) -> None:
    chat = [{"role": "user", "content": " über  \n"}, {"role": "assistant", "content": ""}]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert runner.chat(chat) == (expected if kind.module is ort_genai else None)


def test_info(kind: Kind, runner: Runner, checkpoint: Path) -> None:
    info = runner.info()
    assert info["runtime"] == kind.runtime
    assert any(digit in info["version"] for digit in "0123456789")
    assert (info["threads"], info["context"], info["kv_type"]) == (THREADS, CONTEXT, "f32")
    assert info["vocabulary_size"] == VOCABULARY
    assert {0, 3} <= set(info["eog_ids"])
    assert info["chat_template"] == AutoTokenizer.from_pretrained(checkpoint).chat_template
    assert info["load_s"] > 0


def test_speed_and_memory(kind: Kind, runner: Runner, artifact: Path) -> None:
    speed = runner.speed(64, 8)
    assert speed["prompt_tokens_per_s"] > 64 / speed["time_to_first_token_s"] > 0  # which has the choice of a token
    assert speed["decode_tokens_per_s"] > 0
    assert speed["load_s"] > 0
    assert sum(file.stat().st_size for file in kind.module.files(artifact)) < runner.peak_memory() < 2**30


def test_memory_is_the_childs_own(kind: Kind, artifact: Path) -> None:
    ballast = np.ones(2**27)  # 1 GiB that is ours, not the child's
    with kind.open(artifact) as runner:
        assert runner.peak_memory() < ballast.nbytes


def test_a_wrong_request_is_an_error_and_the_runner_goes_on(runner: Runner) -> None:
    for ids in ([1, VOCABULARY], [-1]):
        with pytest.raises(RunnerError, match="vocabulary of 320"):
            runner.logits(np.array(ids))
    with pytest.raises(RunnerError, match="empty prompt"):
        runner.generate([], 1)
    with pytest.raises(RunnerError, match="1100 tokens do not fit into a context of 1024"):
        runner.logits(np.zeros(1100, int))
    with pytest.raises(RunnerError, match="1025 tokens do not fit into a context of 1024"):
        runner.generate([5] * CONTEXT, 2)
    assert runner.logits(random_ids(9)).shape == (9, VOCABULARY)


def test_vocabulary_only(kind: Kind, artifact: Path, runner: Runner) -> None:
    with kind.open(artifact, vocab_only=True) as vocabulary:
        text = "<|user|>\nin the hand<|end|>"
        assert vocabulary.tokenize(text, special=True, bos=True) == runner.tokenize(text, special=True, bos=True)
        assert vocabulary.info()["vocabulary_size"] == VOCABULARY
        with pytest.raises(RunnerError, match="vocabulary only"):
            vocabulary.generate([1], 1)


def test_probe(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    found = kind.module.probe()
    assert found["version"].startswith(kind.package.replace("_", "-").replace("llama-cpp", "llama-cpp-python"))
    assert found["threads"] >= 1
    monkeypatch.setattr(Runner, "logits", lambda *_: np.array([[1.0, np.nan]]))
    with pytest.raises(RunnerError, match="NaN"):
        kind.module.probe()


def test_a_crash_names_the_signal(kind: Kind, artifact: Path) -> None:
    with kind.open(artifact) as runner:
        os.kill(runner.pid, signal.SIGSEGV)
        with pytest.raises(RunnerError, match=r"killed by SIGSEGV.*tiny") as error:
            runner.tokenize("the", special=True, bos=False)
        assert "\n" not in error.value.message
        assert error.value.hint


def test_a_hang_ends_at_the_timeout(kind: Kind, artifact: Path) -> None:
    with kind.open(artifact, timeout=15) as runner:
        os.kill(runner.pid, signal.SIGSTOP)
        runner._timeout = 0.2
        with pytest.raises(RunnerError, match=r"no answer within 0.2 s while tokenizing"):
            runner.tokenize("the", special=True, bos=False)
        assert runner._process.wait(timeout=5) == -signal.SIGKILL


def test_a_missing_runtime_names_its_extra(kind: Kind, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as error:
        kind.open(artifact)
    assert f"[{kind.extra}]" in error.value.hint


def test_a_runtime_that_does_not_import(
    kind: Kind, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{kind.package}.py").write_text("raise ImportError('libnative.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunnerError, match="cannot open shared object file"):
        kind.open(artifact)


def test_a_file_beside_the_user_does_not_shadow_a_package(
    kind: Kind, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 cannot leave the working directory off its path")
    (tmp_path / f"{kind.package}.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    with kind.open(artifact.resolve()) as runner:
        assert runner.info()["vocabulary_size"] == VOCABULARY
