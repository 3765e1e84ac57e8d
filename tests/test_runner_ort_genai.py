import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from _genai import write_genai
from _models import GROUPED, write_model
from onnx import helper

from phi3edge import machine
from phi3edge.errors import CheckpointError, OutputError, Phi3EdgeError, RunnerError, UnsupportedError, UsageError
from phi3edge.onnx_file import read_model
from phi3edge.runners import _tiny_onnx, ort_genai

THREADS = 1


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("checkpoint") / "tiny", GROUPED)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_genai(checkpoint, tmp_path_factory.mktemp("artifact") / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to damage."""
    folder = tmp_path / "odd"
    folder.mkdir()
    _tiny_onnx.write(folder)
    return folder


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """A folder with external data and a tokenizer to damage."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def edit(folder: Path, change) -> None:
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    change(config["model"])
    path.write_text(json.dumps(config))


def edit_model(folder: Path, change) -> None:
    model = onnx.load(folder / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")


def open_(folder: Path, context: int = 64, **options):
    return ort_genai.open(folder, context=context, threads=THREADS, **options)


def refusal(folder: Path, kind: type[Phi3EdgeError] = RunnerError, context: int = 64) -> Phi3EdgeError:
    with pytest.raises(kind) as error:
        open_(folder, context).close()
    assert "\n" not in error.value.message
    assert len(error.value.message) < 500
    return error.value


def test_logits_are_those_of_plain_onnxruntime(artifact: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 320, 200)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(artifact / "model.onnx", options, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids[None], "attention_mask": np.ones((1, 200), np.int64)}
    caches = [i.name for i in session.get_inputs() if i.name.startswith("past")]
    feeds |= {name: np.zeros((1, 2, 0, 64), np.float32) for name in caches}
    with open_(artifact, 256) as runner:
        np.testing.assert_array_equal(runner.logits(ids), session.run(["logits"], feeds)[0][0])


def test_the_model_in_a_folder_stands_for_it(artifact: Path) -> None:
    assert ort_genai.accepts(artifact / "model.onnx")
    with open_(artifact / "model.onnx") as runner:
        assert runner.logits(np.arange(9)).shape == (9, 320)
    assert [f.name for f in ort_genai.files(artifact)] == ["model.onnx", "model.onnx.data"]


def test_data_files_may_be_links(artifact: Path, tmp_path: Path) -> None:
    for file in artifact.iterdir():  # as the hub's cache has them
        (tmp_path / file.name).symlink_to(file)
    with open_(tmp_path) as runner:
        assert runner.logits(np.arange(9)).shape == (9, 320)


def test_a_folder_made_for_another_provider_runs_on_the_cpu(checkpoint: Path, artifact: Path, tmp_path: Path) -> None:
    half = write_genai(checkpoint, tmp_path / "half", dtype=np.float16)
    options = [{"dml": {"enable_graph_capture": "1"}}]
    edit(half, lambda model: model["decoder"]["session_options"].update(provider_options=options))
    ids = np.arange(100)
    with open_(half, 128) as runner, open_(artifact, 128) as exact:
        assert runner.info()["provider"] == "cpu (made for dml)"
        assert runner.info()["kv_type"] == "f16"
        assert exact.info()["provider"] == "cpu"
        logits = runner.logits(ids)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, exact.logits(ids), atol=0.05)


def test_a_folders_search_settings_do_not_change_greedy_text(artifact: Path, copy: Path) -> None:
    path = copy / "genai_config.json"
    config = json.loads(path.read_text())
    config["search"] |= {"repetition_penalty": 9.0, "num_beams": 3, "do_sample": True, "min_length": 50}
    path.write_text(json.dumps(config))
    with open_(artifact) as plain, open_(copy) as odd:
        assert odd.generate([5, 6, 7], 20) == plain.generate([5, 6, 7], 20)


def test_threads_spin_as_in_an_app_unless_plain_or_the_folder_says_so(folder: Path) -> None:
    for plain, said in ((False, "on"), (True, "off")):
        with ort_genai.open(folder, context=64, threads=1, plain=plain) as runner:
            assert runner.info()["spinning"] == said
    edit(folder, lambda model: model["decoder"]["session_options"].update({ort_genai.SPINNING: "0"}))
    with ort_genai.open(folder, context=64, threads=1) as runner:
        assert runner.info()["spinning"] == "off"


def test_a_graph_that_chooses_by_length_gets_a_prompt_at_once(folder: Path) -> None:
    with open_(folder, 128) as runner:
        assert runner.info()["batch"] == 512

    def choose(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Greater", ["total32", "last32"], ["longer"]))

    edit_model(folder, choose)
    with open_(folder, 128) as runner:
        assert runner.info()["batch"] == 128


def test_special_tokens_are_always_special(artifact: Path) -> None:
    with open_(artifact) as runner, pytest.raises(RunnerError, match=r"always reads special tokens.*\[1\]"):
        runner.tokenize("<|user|>", special=False, bos=False)


def test_missing_and_truncated_files(copy: Path) -> None:
    data = copy / "model.onnx.data"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    assert "the model's weights end at" in refusal(copy, CheckpointError).message
    data.unlink()
    assert "model.onnx.data is missing" in refusal(copy, CheckpointError).message
    model = copy / "model.onnx"
    model.write_bytes(model.read_bytes()[:-9])
    assert "truncated" in refusal(copy, CheckpointError).message
    model.write_bytes(b"")
    assert "an empty file" in refusal(copy, CheckpointError).message
    model.unlink()
    assert "model.onnx is missing" in refusal(copy, CheckpointError).message
    (copy / "genai_config.json").write_text('{"model": ')
    assert "not JSON" in refusal(copy, CheckpointError).message


def rename_operator(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = "MatMulNBitsTurbo"


def add_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[-1].attribute.append(helper.make_attribute("turbo", 1))


def raise_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def raise_ir(model: onnx.ModelProto) -> None:
    model.ir_version = 99


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (rename_operator, "MatMulNBitsTurbo"),
        (add_attribute, "Unrecognized attribute: turbo"),
        (raise_opset, "Opset 99"),
        (raise_ir, "IR version: 99"),
    ],
)
def test_a_model_that_needs_a_newer_runtime(folder: Path, change, cause: str) -> None:
    edit_model(folder, change)
    error = refusal(folder)
    assert cause in error.message
    assert "/onnxruntime" not in error.message
    assert "pip install --upgrade" in error.hint


def test_an_operator_without_a_kernel_for_the_cpu(folder: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        inputs, sizes = ["hidden", "gain", "gain"], {"groups": 1, "activation": 0, "channels_last": 1}
        model.graph.node[1].CopyFrom(
            helper.make_node("GroupNorm", inputs, ["normed"], "", "", "com.microsoft", **sizes)
        )

    edit_model(folder, change)
    error = refusal(folder)
    assert "Could not find an implementation for GroupNorm" in error.message
    assert "the CPU has no kernel" in error.hint


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda model: model.update(turbo=1), 'Unknown value "turbo"'),
        (lambda model: model.update(type="phi9"), "phi9"),
    ],
)
def test_a_configuration_of_another_version(folder: Path, change, cause: str) -> None:
    edit(folder, change)
    error = refusal(folder)
    assert cause in error.message
    assert "genai_config.json" in error.hint


def test_a_configuration_of_another_model(folder: Path) -> None:
    edit(folder, lambda model: model.update(vocab_size=65))
    assert "vocab_size 65, the logits 64 columns" in refusal(folder, CheckpointError).message


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a\\b", "", ".."])
def test_a_configuration_that_leaves_its_folder(folder: Path, name: str) -> None:
    edit(folder, lambda model: model["decoder"].update(filename=name))
    assert "expected the name of a file beside it" in refusal(folder, CheckpointError).message


def test_a_configuration_that_loads_a_library(folder: Path) -> None:
    edit(folder, lambda model: model["decoder"]["session_options"].update(custom_ops_library="evil.so"))
    assert "custom_ops_library" in refusal(folder, UnsupportedError).message


@pytest.mark.parametrize("change", [lambda m: m.update(vision={}), lambda m: m["decoder"].update(pipeline=[])])
def test_a_configuration_of_several_graphs(folder: Path, change) -> None:
    edit(folder, change)
    assert "only models of one decoder graph" in refusal(folder, UnsupportedError).message


def write_manifest(folder: Path, requires: dict[str, str], schema: int = 1) -> None:
    manifest = {
        "schema": schema,
        "files": [{"name": "model.onnx", "bytes": 1, "sha256": "0" * 64}],
        "model": {"checkpoint": "tiny", "licence": None},
        "target": "cpu",
        "context": 64,
        "recipe": {"name": "int4"},
        "notes": [],
        "format": "onnx",
        "requires": requires,
    }
    (folder / "phi3edge.json").write_text(json.dumps(manifest))


def test_what_a_manifest_requires(folder: Path) -> None:
    write_manifest(folder, {"onnxruntime-genai": ">=0.18"})
    open_(folder).close()
    write_manifest(folder, {"onnxruntime-genai": ">=9.10.1"})
    error = refusal(folder)
    assert "needs onnxruntime-genai 9.10.1 or newer" in error.message
    assert error.hint == "pip install --upgrade 'onnxruntime-genai>=9.10.1'"
    write_manifest(folder, {"nonsuch": ">=1"})
    assert "needs nonsuch 1 or newer" in refusal(folder).message
    write_manifest(folder, {}, schema=2)
    assert "schema 2" in refusal(folder, OutputError).message


def test_more_context_than_positions_or_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "128 positions, a context of 129" in refusal(folder, UsageError, 129).message
    edit(folder, lambda model: model.update(context_length=10**9))
    error = refusal(folder, RunnerError, 10**9)
    assert "2048 GB for a KV cache of 1000000000 tokens" in error.message
    assert "less context" in error.hint
    monkeypatch.setattr(ort_genai, "free_memory", lambda: None)  # where it is not known, the runtime says it
    assert "cannot make a context of 1000000000 tokens" in refusal(folder, RunnerError, 10**9).message
    assert machine.free_memory() > 10**6


def test_the_tiny_model_has_the_operators_that_count(folder: Path) -> None:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].name == "logits"
    operators = read_model(folder / "model.onnx").operators
    assert {"com.microsoft.MatMulNBits", "com.microsoft.GroupQueryAttention"} < set(operators)
