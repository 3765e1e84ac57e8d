import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from phi3edge.errors import CheckpointError
from phi3edge.onnx_file import check_data, read_model


def make(*tensors: TensorProto, nodes: list[onnx.NodeProto] | None = None) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    ids, logits = value("ids", TensorProto.INT64, ["batch", None]), value("logits", TensorProto.FLOAT16, [1, 7])
    nodes = nodes if nodes is not None else [helper.make_node("Gather", ["w", "ids"], ["logits"])]
    graph = helper.make_graph(nodes, "g", [ids], [logits], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="us", producer_version="1.2")


def external(name: str = "w", shape: tuple[int, ...] = (4, 8), kind: int = TensorProto.FLOAT, **entries) -> TensorProto:
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, text in entries.items():
        tensor.external_data.add(key=key, value=str(text))
    return tensor


def save(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_it_reads_what_onnx_wrote(tmp_path: Path) -> None:
    then = helper.make_graph([helper.make_node("Identity", ["w"], ["x"])], "then", [], [])
    constant = numpy_helper.from_array(np.arange(3), "c")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("If", ["c"], ["x"], then_branch=then, else_branch=then),
        helper.make_node("MatMulNBits", ["a", "w"], ["y"], domain="com.microsoft", K=3),
    ]
    types = ["float32", "float16", "uint8", "int64", "float64", "bool", "int8"]
    tensors = [numpy_helper.from_array(np.ones((3, n + 1), t), t) for n, t in enumerate(types)]
    int4 = helper.make_tensor("int4", TensorProto.INT4, [3], [1, -2, 3])
    path = save(make(*tensors, int4, nodes=nodes), tmp_path)
    model = read_model(path)
    assert (model.ir_version, model.producer) == (10, "us 1.2")
    assert model.opsets == {"": 21, "com.microsoft": 1}
    assert [(v.name, v.dtype, v.shape) for v in model.inputs] == [("ids", "int64", ("batch", "?"))]
    assert [(v.name, v.dtype, v.shape) for v in model.outputs] == [("logits", "float16", (1, 7))]
    assert model.operators == Counter({"Identity": 2, "Constant": 1, "If": 1, "com.microsoft.MatMulNBits": 1})
    found = {t.name: t for t in model.tensors}
    for n, t in enumerate(types):
        assert (found[t].dtype, found[t].shape, found[t].location) == (t, (3, n + 1), None)
        assert found[t].nbytes == 3 * (n + 1) * np.dtype(t).itemsize
    assert (found["int4"].dtype, found["int4"].nbytes) == ("int4", 2)
    assert found["c"].shape == (3,)
    assert model.file_size == path.stat().st_size
    assert check_data(model, tmp_path) == []


def test_external_data(tmp_path: Path) -> None:
    tensors = [external("a", location="data", offset=64, length=128), external("b", location="data.1")]
    model = read_model(save(make(*tensors), tmp_path))
    assert model.data_files == ["data", "data.1"]
    assert [(t.offset, t.nbytes, t.location) for t in model.tensors] == [(64, 128, "data"), (0, 128, "data.1")]
    (tmp_path / "data").write_bytes(bytes(192))
    with pytest.raises(CheckpointError, match=r"data\.1 is missing"):
        check_data(model, tmp_path)
    (tmp_path / "data.1").write_bytes(bytes(127))
    with pytest.raises(CheckpointError, match=r"data\.1 has 127 bytes, the model's weights end at 128"):
        check_data(model, tmp_path)
    (tmp_path / "data.1").write_bytes(bytes(128))
    assert check_data(model, tmp_path) == [tmp_path / "data", tmp_path / "data.1"]


@pytest.mark.parametrize(
    ("tensor", "cause"),
    [
        (external(location="../x"), "in '../x'"),
        (external(location="/etc/passwd"), "in '/etc/passwd'"),
        (external(location="*/_ORT_MEM_ADDR_/*", offset=4096), "expected the name of a file"),
        (external(location="a\\b"), "expected the name of a file"),
        (external(location=".."), "expected the name of a file"),
        (external(), "expected the name of a file"),
        (external(location="x", offset="-1"), "the offset '-1'"),
        (external(location="x", offset="9" * 30), "the offset '999"),
        (external(location="x", length=5), "has 5 bytes, its shape and type 128"),
        (external(location="x", shape=(4, -8)), "shape [4, -8]"),
        (external(location="x", kind=99), "unknown type 99"),
        (TensorProto(name="w", data_type=1, dims=[5], raw_data=b"1234"), "has 4 bytes, its shape and type 20"),
    ],
)
def test_a_hostile_tensor_is_refused_wherever_it_is(tmp_path: Path, tensor: TensorProto, cause: str) -> None:
    inside = helper.make_graph([helper.make_node("Constant", [], ["x"], value=tensor)], "inside", [], [])
    for model in (
        make(tensor),
        make(nodes=[helper.make_node("Constant", [], ["x"], value=tensor)]),
        make(nodes=[helper.make_node("If", ["ids"], ["x"], then_branch=inside, else_branch=inside)]),
    ):
        with pytest.raises(CheckpointError, match=re.escape(cause)):
            read_model(save(model, tmp_path))


def test_graphs_within_graphs_end_somewhere(tmp_path: Path) -> None:
    graph = helper.make_graph([], "g", [], [])
    for _ in range(18):
        graph = helper.make_graph([helper.make_node("Loop", [], ["x"], body=graph)], "g", [], [])
    model = helper.make_model(graph)
    with pytest.raises(CheckpointError, match="graphs within graphs"):
        read_model(save(model, tmp_path))


def test_every_truncation_and_every_flipped_byte_is_read_or_refused(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    path = save(make(weight, external("e", location="data")), tmp_path)
    content = path.read_bytes()
    whole, cut = read_model(path), []
    for length in range(len(content)):
        path.write_bytes(content[:length])
        try:
            cut.append(read_model(path))
        except CheckpointError:
            continue
    assert len(cut) < 3  # the operator sets come last: without the second one it is a model still
    assert all(model.tensors == whole.tensors for model in cut)
    refused = 0
    for at in range(len(content)):
        for flip in (0x01, 0x80, 0xFF):
            path.write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
            try:
                read_model(path)
            except CheckpointError:
                refused += 1
    assert refused > len(content)  # a third of all, at the least; the rest are other names and numbers


def test_what_is_no_onnx_says_so(tmp_path: Path) -> None:
    for content in (b"", b"PK\x03\x04" * 9, b"GGUF" * 9, b"version https://git-lfs.github.com/spec/v1\n", bytes(64)):
        path = tmp_path / "model.onnx"
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            read_model(path)
