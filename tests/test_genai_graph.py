"""What is taken from onnxruntime-genai's builder: fails, and names what moved, when its internals change."""

import re
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnx
import pytest
from _models import GROUPED, Shape, write_model
from _onnx_folders import make
from _onnx_graphs import attributes

from phi3edge.build import prepare
from phi3edge.emitters import _genai_graph
from phi3edge.emitters._genai_graph import build_graph
from phi3edge.errors import MissingExtraError, UnsupportedError
from phi3edge.types import ModelSpec

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime_genai")

LAYER = {
    "/model/layers.1/attn/qkv_proj/MatMul": "MatMul",
    "/model/layers.1/attn/GroupQueryAttention": "GroupQueryAttention",
    "/model/layers.1/attn/o_proj/MatMul": "MatMul",
    "/model/layers.1/post_attention_layernorm/SkipLayerNorm": "SkipSimplifiedLayerNormalization",
    "/model/layers.1/mlp/gate_up_proj/MatMul": "MatMul",
    "/model/layers.1/mlp/gate_up_proj/Split": "Split",
    "/model/layers.1/mlp/act_fn/Sigmoid": "Sigmoid",
    "/model/layers.1/mlp/act_fn/Mul": "Mul",
    "/model/layers.1/mlp/Mul": "Mul",
    "/model/layers.1/mlp/down_proj/MatMul": "MatMul",
}
"""The nodes of a layer between its norms, for the CPU."""

PARTS = {"cpu": {""}, "cuda": {""}, "webgpu": {""}, "dml": {"q", "k", "v"}}
"""Parts of attn_qkv that are weights of their own: DirectML's attention takes q, k and v apart."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny", GROUPED, sliding_window=47)


@pytest.fixture(scope="module")
def spec(checkpoint: Path) -> ModelSpec:
    return prepare(str(checkpoint), "cpu", format_="onnx").plan.model


def test_a_layers_nodes(spec):
    model, _ = build_graph(spec, "cpu", "float32")
    found = {node.name: node.op_type for node in model.graph if re.match(r"/model/layers\.1/", node.name)}
    norms = {name for name in found if name.endswith("input_layernorm/SkipLayerNorm")}
    assert {k: v for k, v in found.items() if k not in norms and "final_norm" not in k} == LAYER


@pytest.mark.parametrize("provider", ["cpu", "cuda", "dml", "webgpu"])
def test_every_weight_is_asked_for_once_in_its_shape(spec, provider):
    io = "float32" if provider == "cpu" else "float16"
    model, weights = build_graph(spec, provider, io)
    shapes = {(t.role, t.layer): t.shape for t in spec.tensors}
    rows = {(t.role, p.name): p.stop - p.start for t in spec.tensors for p in t.parts}
    assert {w.part for w in weights if w.role == "attn_qkv"} == PARTS[provider]
    assert {w.part for w in weights if w.role == "ffn_gate_up"} == {""}
    assert {(w.role, w.layer) for w in weights} == set(shapes)
    assert len({(w.role, w.layer, w.part) for w in weights}) == len(weights)
    for w in weights:
        [node] = w.value.consumers()
        shape = shapes[w.role, w.layer]
        if w.part:
            shape = (rows[w.role, w.part], shape[1])
        expected = shape[::-1] if node.op_type == "MatMul" else shape
        assert tuple(w.value.shape) == expected, w.value.name
    left = [v.name for v in model.graph.initializers.values() if isinstance(v.const_value, ir.LazyTensor)]
    assert sorted(left) == sorted(w.value.name for w in weights)


def test_a_weight_that_is_not_known_is_named(spec, monkeypatch):
    monkeypatch.delitem(_genai_graph.WEIGHTS, "ffn_down")
    with pytest.raises(UnsupportedError, match=r"not known: model\.layers\.0\.mlp\.down_proj\.MatMul\.weight"):
        build_graph(spec, "cpu", "float32")


def test_a_weight_that_is_not_asked_for_is_named(checkpoint, tmp_path, monkeypatch):
    from phi3edge.emitters import ort_genai

    def without(*args):
        model, weights = build_graph(*args)
        return model, [w for w in weights if (w.role, w.layer, w.part) != ("attn_qkv", 1, "k")]

    monkeypatch.setattr(ort_genai, "build_graph", without)
    with pytest.raises(UnsupportedError, match=r"does not use all of model\.layers\.1\.self_attn\.qkv_proj\.weight"):
        make(checkpoint, tmp_path / "out", "f16", "directml")
    assert not (tmp_path / "out").exists()


def test_attention_of_another_kind_is_named(spec):
    empty = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
    with pytest.raises(UnsupportedError, match="made 0 GroupQueryAttention nodes for 2 layers"):
        _genai_graph._set_window(empty, spec)


def test_another_version_is_refused_with_what_to_install(spec, monkeypatch):
    monkeypatch.setattr(_genai_graph, "version", lambda _: "0.19.1")
    with pytest.raises(UnsupportedError, match=r"0\.19\.1 is installed") as caught:
        build_graph(spec, "cpu", "float32")
    assert "onnxruntime-genai==0.18" in str(caught.value.hint)


def test_the_pinned_version_is_the_one_that_is_driven():
    major, minor = _genai_graph.SUPPORTED
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    [pin] = set(re.findall(r'"onnxruntime-genai(.*?)"', project))
    assert pin == f">={major}.{minor},<{major}.{minor + 1}"
    assert version("onnxruntime-genai").startswith(f"{major}.{minor}.")


def test_a_missing_package_names_the_extra(spec, monkeypatch):
    def missing(_: str) -> str:
        raise PackageNotFoundError

    monkeypatch.setattr(_genai_graph, "version", missing)
    with pytest.raises(MissingExtraError, match="ONNX Runtime GenAI folders") as caught:
        build_graph(spec, "cpu", "float32")
    assert "onnx]" in str(caught.value.hint)


def test_the_builder_is_silent_and_asks_no_network(spec, monkeypatch, capsys):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was made"))
    build_graph(spec, "webgpu", "float16")
    assert capsys.readouterr().out == ""


def check(path: Path) -> None:
    """The checker of onnx; it passes over other domains, to which this norm of onnxruntime's belongs by rights."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    checked = path.with_name("checked.onnx")
    onnx.save(model, checked)
    onnx.checker.check_model(str(checked))


@pytest.mark.parametrize("target", ["cpu", "cuda", "directml", "webgpu"])
def test_a_graph_is_valid_onnx_in_the_providers_types(checkpoint, tmp_path, target):
    made = make(checkpoint, tmp_path / "out", "int4_b32", target, embedding="f16")
    check(made.artifact)
    graph = onnx.load(made.artifact, load_external_data=False).graph
    wanted = onnx.TensorProto.FLOAT if target == "cpu" else onnx.TensorProto.FLOAT16
    floats = [v for v in (*graph.input, *graph.output) if v.name.startswith(("past", "present", "logits"))]
    assert {v.type.tensor_type.elem_type for v in floats} == {wanted}
    assert len(floats) == 1 + 4 * GROUPED.layers
    attention = [n for n in graph.node if n.op_type == "GroupQueryAttention"]
    assert [attributes(n)["local_window_size"] for n in attention] == [47] * GROUPED.layers
    assert {attributes(n)["do_rotary"] for n in attention} == {int(target != "directml")}
    linears = [n for n in graph.node if n.op_type == "MatMulNBits"]
    assert len(linears) == (6 if target == "directml" else 4) * GROUPED.layers + 1
    assert {attributes(n)["accuracy_level"] for n in linears} == {0 if target in ("cuda", "directml") else 4}
    assert not [n.name for n in graph.node if n.op_type == "MatMul"]


def test_a_model_without_a_window_looks_back_at_everything(tmp_path):
    checkpoint = write_model(tmp_path / "tiny", Shape(layers=1), sliding_window=None)
    model, _ = build_graph(prepare(str(checkpoint), "cpu", format_="onnx").plan.model, "cpu", "float32")
    [attention] = [n for n in model.graph if n.op_type == "GroupQueryAttention"]
    assert attention.attributes["local_window_size"].value == -1


def test_no_weight_is_made_up_for_the_builder(spec, monkeypatch):
    import torch

    fill = torch.nn.Linear.reset_parameters
    for name in ("uniform_", "normal_"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, **__: self if self.is_meta else pytest.fail("filled"))
    build_graph(spec, "cpu", "float32")
    assert torch.nn.Linear.reset_parameters is fill
