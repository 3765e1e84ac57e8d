"""The GGUF emitter: read back by gguf-py and run by llama.cpp, whole, split and interrupted."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _models import GROUPED, TIED, Shape, phi3_config
from _tokenizers import ASSISTANT, END, ENDOFTEXT, PIECES, TEMPLATE, write_sentencepiece

from phi3edge.emitters import WrittenFile, gguf
from phi3edge.errors import CheckpointError, OutputError, UnsupportedError, UsageError
from phi3edge.families import phi3
from phi3edge.gguf_file import ValueType, read_header
from phi3edge.gguf_names import tensor_name
from phi3edge.tokenizer import Vocabulary, load_tokenizer
from phi3edge.types import ModelSpec, QuantPlan, Source, TensorPlan

VOCAB = PIECES + 20
SOURCE = Source("someone/Phi-3-tiny", "0123abc", "mit")
DTYPES = {"f32": np.float32, "f16": np.float16}


def spec(shape: Shape = GROUPED, name: str = "Phi-3-tiny") -> ModelSpec:
    config = phi3_config(shape, vocab_size=VOCAB, eos_token_id=ENDOFTEXT, pad_token_id=ENDOFTEXT)
    return phi3.parse(config, {"eos_token_id": [ENDOFTEXT, ASSISTANT, END]}, name)


def make_plan(model: ModelSpec, codec: str = "f16") -> QuantPlan:
    tensors = []
    for tensor in model.tensors:
        chosen = "f32" if len(tensor.shape) == 1 else codec
        tensors.append(TensorPlan(tensor, chosen, "cast", tensor.size * np.dtype(DTYPES[chosen]).itemsize))
    return QuantPlan(model, codec, tuple(tensors))


def weights(tensor: TensorPlan) -> np.ndarray:
    """The same random weights for a name, whatever else is in the plan."""
    seed = int.from_bytes(hashlib.sha256(tensor.tensor.name.encode()).digest()[:4], "little")
    values = np.random.default_rng(seed).normal(size=tensor.tensor.shape) / tensor.tensor.shape[-1] ** 0.5
    return values.astype(DTYPES[tensor.codec])


def stream(plan: QuantPlan, rows: int = 100) -> Iterator[tuple[TensorPlan, Iterator[np.ndarray]]]:
    def parts(tensor: TensorPlan) -> Iterator[np.ndarray]:
        values = weights(tensor)
        for start in range(0, len(values), rows):
            yield values[start : start + rows].view(np.uint8)

    for tensor in plan.tensors:
        yield tensor, parts(tensor)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_sentencepiece(folder)
    return load_tokenizer(folder, spec())


def emit(plan: QuantPlan, vocabulary: Vocabulary, folder: Path, **options: Any) -> list[WrittenFile]:
    data = options.pop("data", None) or stream(plan)
    return gguf.write(plan, SOURCE, vocabulary, data, folder, "model", file_type=1, **options)


CHILD = """
import json, sys
import numpy as np
from llama_cpp import Llama
llama = Llama(sys.argv[1], n_ctx=64, logits_all=True, verbose=False, n_threads=1)
llama.eval(json.loads(sys.argv[2]))
np.save(sys.argv[3], llama.scores[:llama.n_tokens])
"""


def logits(path: Path, ids: list[int], folder: Path) -> np.ndarray:
    """llama.cpp's logits, from a process of its own."""
    pytest.importorskip("llama_cpp")
    out = folder / "logits.npy"
    command = [sys.executable, "-c", CHILD, str(path), json.dumps(ids), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(out)


@pytest.mark.parametrize("shape", [GROUPED, TIED])
def test_gguf_py_reads_every_tensor(vocabulary: Vocabulary, tmp_path: Path, shape: Shape) -> None:
    reader_of = pytest.importorskip("gguf").GGUFReader
    plan = make_plan(spec(shape))
    seen: list[int] = []
    [written] = emit(plan, vocabulary, tmp_path, on_bytes=seen.append)
    assert written.path == tmp_path / "model.gguf"
    assert sum(seen) == plan.weight_bytes
    content = written.path.read_bytes()
    assert (written.bytes, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    read = {t.name: t for t in reader_of(written.path).tensors}
    assert list(read) == [tensor_name(t.tensor) for t in plan.tensors]
    assert ("output.weight" in read) is not shape.tied
    for tensor in plan.tensors:
        got = read[tensor_name(tensor.tensor)]
        assert tuple(got.shape) == tensor.tensor.shape[::-1]
        assert np.array_equal(np.asarray(got.data).reshape(tensor.tensor.shape), weights(tensor))


def test_same_input_same_bytes(vocabulary: Vocabulary, tmp_path: Path) -> None:
    plan = make_plan(spec())
    [one] = emit(plan, vocabulary, tmp_path / "one")
    [two] = emit(plan, vocabulary, tmp_path / "two", data=stream(plan, rows=7))
    assert one.sha256 == two.sha256


def test_metadata(vocabulary: Vocabulary) -> None:
    model = spec()
    pairs = gguf.metadata(make_plan(model), SOURCE, vocabulary, file_type=1)
    u32, f32, text, boolean = ValueType.UINT32, ValueType.FLOAT32, ValueType.STRING, ValueType.BOOL
    assert pairs == {
        "general.architecture": (text, "phi3"),
        "general.type": (text, "model"),
        "general.name": (text, "Phi-3-tiny"),
        "general.size_label": (text, "1.5M"),
        "general.license": (text, "mit"),
        "general.source.url": (text, "https://huggingface.co/someone/Phi-3-tiny/tree/0123abc"),
        "general.source.repo_url": (text, "https://huggingface.co/someone/Phi-3-tiny"),
        "general.base_model.count": (u32, 1),
        "general.base_model.0.name": (text, "Phi-3-tiny"),
        "general.base_model.0.version": (text, "0123abc"),
        "general.base_model.0.organization": (text, "someone"),
        "general.base_model.0.repo_url": (text, "https://huggingface.co/someone/Phi-3-tiny"),
        "general.file_type": (u32, 1),
        "phi3.context_length": (u32, 512),
        "phi3.rope.scaling.original_context_length": (u32, 512),
        "phi3.embedding_length": (u32, 256),
        "phi3.feed_forward_length": (u32, 512),
        "phi3.block_count": (u32, 2),
        "phi3.attention.head_count": (u32, 4),
        "phi3.attention.head_count_kv": (u32, 2),
        "phi3.attention.layer_norm_rms_epsilon": (f32, 1e-5),
        "phi3.attention.sliding_window": (u32, 511),
        "phi3.rope.dimension_count": (u32, 64),
        "phi3.rope.freq_base": (f32, 10000.0),
        "tokenizer.ggml.model": (text, "llama"),
        "tokenizer.ggml.pre": (text, "default"),
        "tokenizer.ggml.tokens": (text, vocabulary.tokens),
        "tokenizer.ggml.scores": (f32, vocabulary.scores),
        "tokenizer.ggml.token_type": (ValueType.INT32, vocabulary.types),
        "tokenizer.ggml.bos_token_id": (u32, 1),
        "tokenizer.ggml.eos_token_id": (u32, ENDOFTEXT),
        "tokenizer.ggml.eot_token_id": (u32, END),
        "tokenizer.ggml.eom_token_id": (u32, ASSISTANT),
        "tokenizer.ggml.unknown_token_id": (u32, 0),
        "tokenizer.ggml.padding_token_id": (u32, ENDOFTEXT),
        "tokenizer.ggml.add_bos_token": (boolean, True),
        "tokenizer.ggml.add_eos_token": (boolean, False),
        "tokenizer.chat_template": (text, TEMPLATE),
    }
    assert gguf.notes(model, vocabulary) == []


def test_a_plain_load_is_no_longer_than_what_is_exact() -> None:
    """llama.cpp opens a file with the context length that it says; None stands for the checkpoint's."""
    mini = replace(spec(), context_length=4096, original_context_length=4096, sliding_window=2047)
    assert [gguf.written_context(mini, n) for n in (512, 2047, 2048, 4096)] == [2047, 2047, None, None]
    assert gguf.written_context(replace(mini, sliding_window=None), 512) is None
    rope = replace(mini.rope, short_factors=(1.0,), long_factors=(2.0,))
    long = replace(mini, context_length=131072, rope=rope)
    assert [gguf.written_context(long, n) for n in (512, 2048, 4096, 4097)] == [2047, 4096, 4096, None]
    wide = replace(long, sliding_window=262144)
    assert [gguf.written_context(wide, n) for n in (512, 4096, 4097, 131072)] == [4096, 4096, None, None]


def test_metadata_that_depends(vocabulary: Vocabulary) -> None:
    plan = make_plan(spec())
    quantized = replace(plan, tensors=(replace(plan.tensors[0], codec="q8_0"), *plan.tensors[1:]))
    bare = gguf.metadata(quantized, Source("demo", None), vocabulary, file_type=None, context_length=128)
    assert bare["general.quantization_version"] == (ValueType.UINT32, 2)
    assert bare["phi3.context_length"] == (ValueType.UINT32, 128)
    assert not any(key.startswith(("general.source", "general.base_model", "general.license")) for key in bare)
    assert "general.file_type" not in bare
    no_window = replace(plan, model=replace(plan.model, sliding_window=None))
    pairs = gguf.metadata(no_window, SOURCE, vocabulary, file_type=0)
    assert pairs["phi3.attention.sliding_window"] == (ValueType.UINT32, 0)
    templates = replace(vocabulary, other_templates={"tool use": "a", "rag": "b"})
    pairs = gguf.metadata(plan, SOURCE, templates, file_type=0)
    assert pairs["tokenizer.chat_templates"] == (ValueType.STRING, ["rag", "tool_use"])
    assert pairs["tokenizer.chat_template.tool_use"] == (ValueType.STRING, "a")


def sampling(vocabulary: Vocabulary, config: dict[str, Any] | None) -> dict[str, tuple[ValueType, Any]]:
    pairs = gguf.metadata(make_plan(spec()), SOURCE, vocabulary, file_type=0, generation_config=config)
    start = "general.sampling."
    return {key.removeprefix(start): pair for key, pair in pairs.items() if key.startswith(start)}


def test_settings_for_sampling(vocabulary: Vocabulary, tmp_path: Path) -> None:
    i32, f32 = ValueType.INT32, ValueType.FLOAT32
    config = {
        "do_sample": False,
        "temperature": 0.0,
        "top_k": 40,
        "top_p": None,
        "repetition_penalty": 1,
        "sequence": "",
    }
    expected = {"temp": (f32, 0.0), "top_k": (i32, 40), "penalty_repeat": (f32, 1)}
    assert sampling(vocabulary, config) == expected
    assert sampling(vocabulary, {"repetition_penalty": 1.5, "penalty_repeat": 1.25}) == {"penalty_repeat": (f32, 1.25)}
    assert sampling(vocabulary, {"repetition_penalty": 1.5, "penalty_repeat": None}) == {}
    assert sampling(vocabulary, {"eos_token_id": 2}) == sampling(vocabulary, None) == {}
    reader_of = pytest.importorskip("gguf").GGUFReader
    [written] = emit(make_plan(spec()), vocabulary, tmp_path, generation_config=config)
    fields = reader_of(written.path).fields
    for key, (kind, value) in expected.items():
        field = fields[f"general.sampling.{key}"]
        assert ([kind.name], value) == ([t.name for t in field.types], field.contents())


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("top_k", 50.0, "an integer"),
        ("top_k", 2**31, "an integer"),
        ("mirostat", True, "an integer"),
        ("temperature", "0.7", "a finite number"),
        ("top_p", True, "a finite number"),
        ("min_p", float("nan"), "a finite number"),
        ("repetition_penalty", float("inf"), "a finite number"),
        ("sequence", ["top_k"], "a string"),
    ],
)
def test_settings_for_sampling_of_another_kind_are_refused(
    vocabulary: Vocabulary, tmp_path: Path, key: str, value: Any, expected: str
) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json: {key} is .*; expected {expected}"):
        emit(make_plan(spec()), vocabulary, tmp_path / "out", generation_config={key: value})
    assert not (tmp_path / "out").exists()


def test_heads_that_phi3_in_llama_cpp_cannot_hold_are_refused(vocabulary: Vocabulary) -> None:
    plan = make_plan(replace(spec(), head_dim=96))
    with pytest.raises(UnsupportedError, match="4 \\* 96 and 256"):
        gguf.metadata(plan, SOURCE, vocabulary, file_type=0)


def test_the_name_turns_the_rule_on_exactly_where_it_is_right(vocabulary: Vocabulary) -> None:
    assert gguf.model_name("Phi-3-mini-4k-instruct", vocabulary) == "Phi-3-mini-4k-instruct"
    assert gguf.model_name("my phi3", vocabulary) == "my phi3"
    assert gguf.model_name("Phi 3 Mini", vocabulary) == "Phi 3 Mini (Phi-3)"
    plain = replace(vocabulary, added=tuple(replace(token, rstrip=False) for token in vocabulary.added))
    assert gguf.model_name("Phi-3-vision phi3", plain) == "Phi 3-vision phi 3"
    lacking = replace(vocabulary, tokens=tuple(t.replace("</s>", "</t>") for t in vocabulary.tokens))
    assert gguf.model_name("phi3edge", lacking) == "phi 3edge"
    assert gguf.model_name("demo", lacking) == "demo"


@pytest.mark.parametrize(
    ("parameters", "label"), [(3_821_079_552, "3.8B"), (134_515_008, "135M"), (13_960_238_080, "14B"), (900, "0.9K")]
)
def test_size_label(parameters: int, label: str) -> None:
    assert gguf.size_label(parameters) == label


def test_split_files_load_and_run_alike(vocabulary: Vocabulary, tmp_path: Path) -> None:
    plan = make_plan(spec())
    [whole] = emit(plan, vocabulary, tmp_path / "whole")
    limit = whole.bytes // 3
    files = emit(plan, vocabulary, tmp_path / "split", split_max_size=limit)
    count = len(files)
    assert count > 3
    assert [f.path.name for f in files] == [f"model-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    for number, file in enumerate(files):
        assert file.bytes == file.path.stat().st_size <= limit
        header = read_header(file.path)
        assert header.metadata["split.no"] == number
        assert header.metadata["split.count"] == count
        assert header.metadata["split.tensors.count"] == len(plan.tensors)
        assert ("general.architecture" in header.metadata) is (number == 0)
    ids = [1, 300, 301, 302, END, ASSISTANT]
    expected = logits(whole.path, ids, tmp_path)
    assert expected.shape == (len(ids), VOCAB)
    assert np.array_equal(logits(files[0].path, ids, tmp_path), expected)


def test_a_limit_that_holds_everything_makes_one_file(vocabulary: Vocabulary, tmp_path: Path) -> None:
    [written] = emit(make_plan(spec()), vocabulary, tmp_path, split_max_size=1 << 30)
    assert written.path.name == "model.gguf"
    assert "split.count" not in read_header(written.path).metadata


def test_a_limit_below_a_tensor_is_refused(vocabulary: Vocabulary, tmp_path: Path) -> None:
    plan = make_plan(spec())
    with pytest.raises(UsageError, match=r"blk\.0\.ffn_up\.weight has 524288 bytes") as caught:
        emit(plan, vocabulary, tmp_path, split_max_size=200_000)
    enough = int(str(caught.value.hint).split()[3])
    assert len(emit(plan, vocabulary, tmp_path, split_max_size=enough)) > 1
    with pytest.raises(UsageError):
        emit(plan, vocabulary, tmp_path, split_max_size=enough - 32)


def interrupted(plan: QuantPlan, error: BaseException) -> Iterator[Any]:
    """A stream that breaks inside its last but one tensor."""
    tensors = list(stream(plan))
    yield from tensors[:-2]
    tensor, chunks = tensors[-2]

    def broken() -> Iterator[np.ndarray]:
        yield next(chunks)
        raise error

    yield tensor, broken()


@pytest.mark.parametrize("error", [ValueError("a weight is not finite"), KeyboardInterrupt()])
@pytest.mark.parametrize("limit", [None, 600_000])
def test_an_interrupted_run_leaves_everything_as_it_was(
    vocabulary: Vocabulary, tmp_path: Path, error: BaseException, limit: int | None
) -> None:
    plan = make_plan(spec())
    before = {"model.gguf": b"kept", "model-00001-of-00004.gguf": b"kept too"}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(type(error)):
        emit(plan, vocabulary, tmp_path, data=interrupted(plan, error), split_max_size=limit)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    [written] = emit(plan, vocabulary, tmp_path)
    assert (tmp_path / "model.gguf").stat().st_size == written.bytes


def swapped(plan: QuantPlan) -> Iterator[Any]:
    tensors = list(stream(plan))
    tensors[1], tensors[4] = tensors[4], tensors[1]
    return iter(tensors)


def short(plan: QuantPlan) -> Iterator[Any]:
    return ((tensor, list(chunks)[:-1]) for tensor, chunks in stream(plan))


def extra(plan: QuantPlan) -> Iterator[Any]:
    yield from stream(plan)
    yield from stream(plan)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (swapped, "expected tensor .* next, got"),
        (short, "bytes, got"),
        (extra, "expected no tensor after"),
        (lambda plan: iter(list(stream(plan))[:-1]), "got the end"),
    ],
)
def test_a_stream_that_is_not_the_plan_is_our_bug(
    vocabulary: Vocabulary, tmp_path: Path, data: Any, message: str
) -> None:
    plan = make_plan(spec())
    with pytest.raises(RuntimeError, match=message):
        emit(plan, vocabulary, tmp_path, data=data(plan))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_line(vocabulary: Vocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"model\.gguf: cannot be written: No space left") as caught:
        emit(make_plan(spec()), vocabulary, tmp_path)
    assert "free some space" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_clear_line(vocabulary: Vocabulary, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written"):
        emit(make_plan(spec()), vocabulary, tmp_path / "file" / "folder")
