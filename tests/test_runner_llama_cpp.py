import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from _gguf import write_gguf
from _models import GROUPED, write_model
from transformers import AutoModelForCausalLM

from phi3edge.errors import RunnerError, UsageError
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


def test_fast_kernels_compute_almost_the_same(artifact: Path, runner, model) -> None:
    ids = np.random.default_rng(1).integers(0, 320, 200)
    expected = reference(model, ids)
    assert kl(expected, runner.logits(ids)) < 1e-4  # flash attention rounds to float16
    assert kl(expected[1:], expected[:-1]) > 0.1  # the bound above means something


def test_special_tokens_can_be_read_as_text(runner) -> None:
    assert runner.tokenize("<|user|>", special=True, bos=False) == [1]
    assert len(runner.tokenize("<|user|>", special=False, bos=False)) > 3


def test_the_tiny_model_is_a_gguf_that_others_read(tmp_path: Path) -> None:
    _tiny_gguf.write(tmp_path / "tiny.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    weight = gguf.quants.dequantize(tensors["blk.0.attn_qkv.weight"].data, gguf.GGMLQuantizationType.Q4_0)
    assert weight.shape == (768, 256)
    assert weight.std() == pytest.approx(0.046, rel=0.05)


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


def test_an_unknown_cache_type(artifact: Path) -> None:
    with pytest.raises(UsageError, match="'q3'"):
        llama_cpp.open(artifact, context=256, kv_type="q3")


@pytest.mark.parametrize(("flags", "expected"), [("avx2 amx_tile amx_int8", True), ("avx2 avx512f", False)])
def test_amx_is_seen(monkeypatch: pytest.MonkeyPatch, flags: str, expected: bool) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: f"model name : x\nflags : {flags}\n")
    assert llama_cpp._has_amx() is expected
