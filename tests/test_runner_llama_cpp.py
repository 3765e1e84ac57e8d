import os
import signal
import struct
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from _gguf import write_gguf
from _models import GROUPED, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi3edge.errors import MissingExtraError, RunnerError, UsageError
from phi3edge.runners import _tiny_gguf, llama_cpp

THREADS = 1  # two would wait for each other on a busy machine


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("checkpoint") / "tiny", GROUPED)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(checkpoint, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def runner(artifact: Path):
    with llama_cpp.open(artifact, context=1024, threads=THREADS, kv_type="f32", timeout=120) as runner:
        yield runner


@pytest.fixture(scope="module")
def model(checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


def reference(model, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


def kl(p: np.ndarray, q: np.ndarray) -> float:
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (p, q))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_logits_are_those_of_transformers(artifact: Path, runner, model) -> None:
    ids = np.random.default_rng(1).integers(0, 320, 200)
    expected = reference(model, ids)
    with llama_cpp.open(artifact, context=256, threads=THREADS, kv_type="f32", plain=True) as plain:
        logits = plain.logits(ids)
    assert logits.shape == expected.shape == (200, 320)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert kl(expected, runner.logits(ids)) < 1e-4  # flash attention rounds to float16
    assert kl(expected[1:], expected[:-1]) > 0.1  # the bound above means something


def test_logits_start_anywhere_and_every_call_starts_afresh(runner) -> None:
    ids = np.random.default_rng(2).integers(0, 320, 700)  # two batches
    everything = runner.logits(ids)
    for start in (0, 1, 511, 512, 513, 699):
        tail = runner.logits(ids, start)
        assert tail.shape == (700 - start, 320)
        np.testing.assert_allclose(tail, everything[start:], atol=2e-2)
    assert [len(block) for block in runner.logits_blocks(ids[:150], 20)] == [64, 64, 2]


def test_greedy_generation_stops_at_the_end(artifact: Path, model, checkpoint: Path, tmp_path: Path) -> None:
    prompt = AutoTokenizer.from_pretrained(checkpoint)("in the hand")["input_ids"]
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(reference(model, np.array(ids))[-1].argmax()))
    expected = ids[len(prompt) :]
    assert not {0, 3} & set(expected)  # else choose another prompt
    with llama_cpp.open(artifact, context=256, threads=THREADS, kv_type="f32", plain=True) as runner:
        assert runner.generate(prompt, 12) == expected
        assert runner.generate(prompt, 3) == expected[:3]
    other = write_gguf(checkpoint, tmp_path / "eos.gguf", eos=expected[6])
    with llama_cpp.open(other, context=256, threads=THREADS, kv_type="f32", plain=True) as runner:
        assert expected[6] in runner.info()["eog_ids"]
        assert runner.generate(prompt, 12) == expected[: expected.index(expected[6])]


def test_tokens_special_or_not(runner) -> None:
    assert runner.tokenize("<|user|>", special=True, bos=False) == [1]
    assert len(runner.tokenize("<|user|>", special=False, bos=False)) > 3
    assert runner.tokenize("", special=True, bos=False) == []


def test_info(runner) -> None:
    info = runner.info()
    assert info["runtime"] == "llama.cpp"
    assert info["threads"] == THREADS
    assert info["vocabulary_size"] == 320
    assert {0, 3} <= set(info["eog_ids"])
    assert "assistant" in info["chat_template"]


def test_speed_and_memory(runner, artifact: Path) -> None:
    speed = runner.speed(64, 8)
    assert speed["prompt_tokens_per_s"] == pytest.approx(64 / speed["time_to_first_token_s"])
    assert speed["decode_tokens_per_s"] > 0
    assert speed["load_s"] > 0
    assert artifact.stat().st_size < runner.peak_memory() < 2**30


def test_memory_is_the_childs_own(artifact: Path) -> None:
    ballast = np.ones(2**27)  # 1 GiB that is ours, not the child's
    with llama_cpp.open(artifact, context=256, threads=THREADS) as runner:
        assert runner.peak_memory() < ballast.nbytes


def test_a_wrong_request_is_an_error_and_the_runner_goes_on(runner) -> None:
    with pytest.raises(RunnerError, match="vocabulary of 320"):
        runner.logits(np.array([1, 320]))
    with pytest.raises(RunnerError, match="empty prompt"):
        runner.generate([], 1)
    with pytest.raises(RunnerError, match="1100 tokens do not fit into a context of 1024"):
        runner.logits(np.zeros(1100, int))
    assert runner.tokenize("the", special=True, bos=False)


def test_probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = llama_cpp.probe()
    assert found["version"].startswith("llama-cpp-python 0.")
    assert found["threads"] >= 1
    monkeypatch.setattr(llama_cpp.Runner, "logits", lambda *_: np.array([[1.0, np.nan]]))
    with pytest.raises(RunnerError, match="NaN"):
        llama_cpp.probe()


def test_the_tiny_model_is_a_gguf_that_others_read(tmp_path: Path) -> None:
    _tiny_gguf.write(tmp_path / "tiny.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    weight = gguf.quants.dequantize(tensors["blk.0.attn_qkv.weight"].data, gguf.GGMLQuantizationType.Q4_0)
    assert weight.shape == (768, 256)
    assert weight.std() == pytest.approx(0.046, rel=0.05)


def test_vocabulary_only(artifact: Path, runner) -> None:
    with llama_cpp.open(artifact, context=16, vocab_only=True) as vocabulary:
        text = "<|user|>\nin the hand<|end|>"
        assert vocabulary.tokenize(text, special=True, bos=True) == runner.tokenize(text, special=True, bos=True)
        with pytest.raises(RunnerError, match="vocabulary only"):
            vocabulary.generate([1], 1)


def test_a_crash_names_the_signal(artifact: Path) -> None:
    with llama_cpp.open(artifact, context=256, threads=THREADS) as runner:
        os.kill(runner.pid, signal.SIGSEGV)
        with pytest.raises(RunnerError, match=r"killed by SIGSEGV.*tiny\.gguf") as error:
            runner.tokenize("the", special=True, bos=False)
        assert "\n" not in error.value.message
        assert error.value.hint


def test_an_assertion_of_the_library_is_quoted(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    _tiny_gguf.write(path)
    data = bytearray(path.read_bytes())
    value = data.index(b"phi3.rope.dimension_count") + len(b"phi3.rope.dimension_count") + 4
    data[value : value + 4] = struct.pack("<I", 66)  # more than a head has
    path.write_bytes(data)
    with llama_cpp.open(path, context=64, threads=THREADS) as runner:
        with pytest.raises(RunnerError, match=r"killed by SIGABRT .*\(odd\.gguf\): \w+\.cpp:\d+: GGML_ASSERT") as error:
            runner.logits(np.arange(8))
        assert "/" not in error.value.message


def test_a_hang_ends_at_the_timeout(artifact: Path) -> None:
    with llama_cpp.open(artifact, context=256, threads=THREADS, timeout=15) as runner:
        os.kill(runner.pid, signal.SIGSTOP)
        runner._timeout = 0.2
        with pytest.raises(RunnerError, match=r"no answer within 0.2 s while tokenizing"):
            runner.tokenize("the", special=True, bos=False)
        assert runner._process.wait(timeout=5) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("keep", "cause"),
    [(0, "failed to read magic"), (2000, "failed to read"), (0.6, "corrupted or incomplete")],
    ids=["empty", "within the header", "within the weights"],
)
def test_a_truncated_file_says_so(artifact: Path, tmp_path: Path, keep: float, cause: str) -> None:
    data = artifact.read_bytes()
    path = tmp_path / "short.gguf"
    path.write_bytes(data[: int(keep * len(data) if keep < 1 else keep)])
    with pytest.raises(RunnerError, match=rf"cannot load short\.gguf: .*{cause}") as error:
        llama_cpp.open(path, context=256, threads=THREADS)
    assert "\n" not in error.value.message


def test_a_file_that_is_no_gguf_says_so(tmp_path: Path) -> None:
    path = tmp_path / "wrong.gguf"
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(RunnerError, match="invalid magic"):
        llama_cpp.open(path, context=256, threads=THREADS)


def test_a_missing_part_of_a_split_file(tmp_path: Path) -> None:
    first = tmp_path / "model-00001-of-00003.gguf"
    first.touch()
    assert [f.name for f in llama_cpp.files(first)][1:] == ["model-00002-of-00003.gguf", "model-00003-of-00003.gguf"]
    with pytest.raises(RunnerError, match=r"no such file.*00002-of-00003"):
        llama_cpp.open(first, context=256, threads=THREADS)


def test_a_missing_runtime_names_its_extra(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError) as error:
        llama_cpp.open(artifact, context=256, threads=THREADS)
    assert "[llama-cpp]" in error.value.hint


def test_a_runtime_that_does_not_import(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('libllama.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RunnerError, match="cannot open shared object file"):
        llama_cpp.open(artifact, context=256, threads=THREADS)


def test_a_file_beside_the_user_does_not_shadow_a_package(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 cannot leave the working directory off its path")
    (tmp_path / "llama_cpp.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    with llama_cpp.open(artifact.resolve(), context=256, threads=THREADS) as runner:
        assert runner.info()["vocabulary_size"] == 320


def test_an_unknown_cache_type(artifact: Path) -> None:
    with pytest.raises(UsageError, match="'q3'"):
        llama_cpp.open(artifact, context=256, kv_type="q3")


@pytest.mark.parametrize(("flags", "expected"), [("avx2 amx_tile amx_int8", True), ("avx2 avx512f", False)])
def test_amx_is_seen(monkeypatch: pytest.MonkeyPatch, flags: str, expected: bool) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: f"model name : x\nflags : {flags}\n")
    assert llama_cpp._has_amx() is expected
