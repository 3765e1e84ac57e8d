"""Provider lists: held against the installed runtime's own registry, and applied to graphs made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from phi3edge.codecs import codec, codec_names
from phi3edge.errors import ConfigError
from phi3edge.providers import Node, check_graph, codecs_for, load_provider, read_nodes

PROVIDERS = ("cpu", "cuda", "dml", "webgpu")
AFFINE = [name for name in codec_names() if codec(name).FORMATS == ("onnx",)]
WEIGHTS = ("float16", "uint8", "float16", "uint8")
ATTENTION = Node(
    name="attention",
    op_type="GroupQueryAttention",
    version=1,
    inputs=("float16",) * 5 + ("int32", "int32"),
    domain="com.microsoft",
    attributes={"num_heads": 4, "kv_num_heads": 4, "do_rotary": 0, "local_window_size": 20},
)
LINEAR = Node("up", "MatMulNBits", 1, WEIGHTS, "com.microsoft", {"K": 64, "N": 8, "bits": 4, "block_size": 32})


def only(constraints: dict[str, list[str]], name: str) -> list[str]:
    """The one type that a parameter of an operator may have, or that its name is; nothing if there are several."""
    allowed = constraints.get(name, [name])
    return allowed if len(allowed) == 1 else []


def test_the_cpus_list_is_in_the_installed_runtimes_registry():
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    schemas = {(s.domain, s.name): s for s in state.get_all_operator_schema()}
    kernels = state.get_all_opkernel_def()
    for name, operator in load_provider("cpu").operators.items():
        if name == "Constant":  # folded at load
            continue
        schema = schemas[operator.domain, name]
        named = {i: t.typeStr for i, t in enumerate(schema.inputs)}
        of_schema = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        for version in operator.versions:
            found = [
                k
                for k in kernels
                if (k.op_name, k.domain) == (name, operator.domain)
                and k.version_range[0] <= version <= k.version_range[1]
            ]
            assert found, (name, version)
            for position, dtypes in enumerate(operator.inputs):
                for dtype in dtypes:
                    written = f"tensor({dtype.removesuffix('32') if dtype == 'float32' else dtype})"
                    types = [
                        # what a kernel does not narrow is as the operator has it, where that is one type alone
                        k.type_constraints.get(named[position], only(of_schema, named[position]))
                        for k in found
                    ]
                    assert any(written in t for t in types), (name, version, position, dtype)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_decoders_own_nodes_are_allowed(provider):
    assert check_graph([LINEAR, ATTENTION], provider) == []


@pytest.mark.parametrize(
    ("node", "provider", "says"),
    [
        (replace(LINEAR, op_type="MatMulFpQ4"), "cpu", "MatMulFpQ4 (up): no kernel in ONNX Runtime on the CPU"),
        (replace(LINEAR, version=2), "dml", "version 2, kernels are for 1"),
        (replace(LINEAR, attributes={"bits": 2}), "webgpu", "bits is 2, kernels take 4, 8"),
        (replace(LINEAR, inputs=("float32", "uint8", "float16")), "cpu", "inputs 0, 2, 5 are float16 and float32"),
        (replace(LINEAR, inputs=(*WEIGHTS, "int32")), "dml", "input 4 is int32, kernels take none"),
        (replace(ATTENTION, inputs=("float16", "", "", "float16")), "dml", "input 1 is left out"),
        (replace(ATTENTION, attributes={"do_rotary": 1}), "dml", "do_rotary is 1, kernels take 0"),
        (Node("act", "Sigmoid", 13, ("float16",)), "cpu", "input 0 is float16, kernels take float32"),
        (Node("r", "Reshape", 23, ("float16", "int64")), "webgpu", "version 23, kernels are for 21"),
    ],
)
def test_what_a_provider_lacks_is_one_line(node, provider, says):
    [line] = check_graph([node, replace(node, name="another")], provider)
    assert says in line
    assert f"({node.name})" in line


def test_integer_bookkeeping_may_run_on_the_cpu():
    total = Node("total", "Sub", 14, ("int64", "int64"))
    assert check_graph([total], "webgpu") == []
    assert check_graph([replace(total, inputs=("uint8", "uint8"))], "webgpu") != []
    assert check_graph([replace(total, op_type="CumSum")], "webgpu") != []


def test_codecs_by_provider_and_role():
    for provider in PROVIDERS:
        assert codecs_for(provider, "ffn_down", AFFINE) == AFFINE
    assert codecs_for("cpu", "embedding", AFFINE) == codecs_for("webgpu", "embedding", AFFINE) == AFFINE
    assert (
        codecs_for("dml", "embedding", [*AFFINE, "f16"])
        == codecs_for("dml", "embedding", ["f16"], tied=True)
        == ["f16"]
    )
    assert codecs_for("cpu", "ffn_down", ["q4_0", "f32"]) == ["f32"]


def test_an_unknown_provider():
    with pytest.raises(ConfigError, match="cdua"):
        load_provider("cdua")


@pytest.fixture(scope="module")
def graph():
    """Embedding, norm, one linear of 4 bits, in float16: an onnx model with the runtime's own operators."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto as T
    from onnx import helper
    from onnx.numpy_helper import from_array

    half, byte = np.float16, np.uint8
    weights = {
        "embedding": np.ones((16, 32), byte),
        "embedding_scales": np.ones((16, 2), half),
        "gain": np.ones(64, half),
        "codes": np.ones((8, 2, 16), byte),
        "scales": np.ones((8, 2), half),
        "zero_points": np.ones((8, 1), byte),
    }
    own = {"domain": "com.microsoft", "bits": 4, "block_size": 32}
    nodes = [
        helper.make_node(
            "GatherBlockQuantized", ["embedding", "ids", "embedding_scales"], ["x"], "gather", quantize_axis=1, **own
        ),
        helper.make_node("SimplifiedLayerNormalization", ["x", "gain"], ["h"], "norm", axis=-1),
        helper.make_node("MatMulNBits", ["h", "codes", "scales", "zero_points"], ["y"], "linear", K=64, N=8, **own),
    ]
    values = [helper.make_tensor_value_info(name, T.FLOAT16, [1, 2, 64]) for name in ("x", "h")]
    made = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("ids", T.INT64, [1, 2])],
        [helper.make_tensor_value_info("y", T.FLOAT16, [1, 2, 8])],
        [from_array(value, name) for name, value in weights.items()],
        value_info=values,
    )
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(made, opset_imports=opsets, ir_version=10)


def test_a_graph_against_all_providers(graph):
    ir = pytest.importorskip("onnx_ir")
    nodes = read_nodes(ir.from_proto(graph))
    assert [n.version for n in nodes] == [1, 1, 1]
    assert nodes[0].inputs == ("uint8", "int64", "float16")
    assert nodes[2].attributes == {"K": 64, "N": 8, "bits": 4, "block_size": 32}
    assert check_graph(nodes, "cpu") == check_graph(nodes, "webgpu") == []
    [line] = check_graph(nodes, "dml")
    assert line == "GatherBlockQuantized (gather): no kernel in ONNX Runtime on DirectML (Windows)"


def test_the_runtime_takes_the_graph_that_the_list_allows(graph):
    """A list that is too narrow or too wide for the CPU shows here: the runtime itself has the last word."""
    runtime = pytest.importorskip("onnxruntime")

    def loads(model):
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        try:
            session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            session.run(None, {"ids": np.zeros((1, 2), np.int64)})
        except Exception as error:  # the runtime's errors share no class
            return str(error)
        return None

    assert loads(graph) is None
    bad = type(graph)()
    bad.CopyFrom(graph)
    for node in bad.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "bits":
                attribute.i = 3
    ir = pytest.importorskip("onnx_ir")
    assert check_graph(read_nodes(ir.from_proto(bad)), "cpu") == ["MatMulNBits (linear): bits is 3, kernels take 4, 8"]
    assert "bits" in str(loads(bad))
