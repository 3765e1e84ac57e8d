"""Checkpoints of AutoAWQ and GPTQ: whatever is written must be the same weights, bit for bit; else nothing is."""

import json
from pathlib import Path

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from _models import write_weights
from _prequantized import AWQ, GPTQ, GPTQ_V2, HALF, change_tensors, dequantized, write_prequantized
from safetensors.torch import load_file
from typer.testing import CliRunner

from phi3edge import manifest, reference
from phi3edge.build import export
from phi3edge.checkpoint import open_checkpoint
from phi3edge.cli.app import app
from phi3edge.codecs import codec
from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.families import parse_config
from phi3edge.gates import Limit
from phi3edge.methods import imported
from phi3edge.plan import make_plan
from phi3edge.prequantized import exact_codec
from phi3edge.quantize import quantize
from phi3edge.recipes import load_recipe
from phi3edge.types import Quantized
from phi3edge.validate import Windows, validate

# quantization_config, the affine codec that is the same grid, the ggml type that holds it
CASES = {
    "awq": (AWQ, "uint4_b64", "q5_0"),
    "awq-32": (AWQ | {"group_size": 32}, "uint4_b32", "q5_0"),
    "awq-symmetric": (AWQ | {"zero_point": False}, "int4_b64", "q4_0"),
    "gptq": (GPTQ, "int4_b64", "q4_0"),
    "gptq-128": (GPTQ | {"group_size": 128}, "int4_b128", "q4_0"),
    "gptq-256": (GPTQ | {"group_size": 256}, "int4_b128", "q4_0"),
    "gptq-rows": (GPTQ | {"group_size": -1}, "int4_b128", "q4_0"),
    "gptq-zeros": (GPTQ | {"sym": False}, "uint4_b64", "q5_0"),
    "gptq-8": (GPTQ | {"bits": 8}, "int8_b64", "q8_0"),
    "gptq_v2": (GPTQ_V2, "uint4_b64", "q5_0"),
    "gptq_v2-8": (GPTQ_V2 | {"bits": 8}, "uint8_b64", None),
    "gptq_v2-16": (GPTQ_V2 | {"group_size": 16}, "uint4_b16", None),
}
QKV = "model.layers.0.self_attn.qkv_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By case: the folder, and its linears."""
    root = tmp_path_factory.mktemp("models")
    return {name: (root / name, write_prequantized(root / name, said)) for name, (said, *_) in CASES.items()}


def read_spec(checkpoint):
    return parse_config(checkpoint.config, checkpoint.generation_config, checkpoint.name)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_what_their_definition_says(models, case):
    folder, linears = models[case]
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check(read_spec(checkpoint))
        for module, linear in linears.items():
            expected = dequantized(linear)
            assert np.array_equal(checkpoint.read(f"{module}.weight"), expected)
            for start, stop in ((0, 1), (3, 77), (8, 16), (250, 256)):  # words hold several outputs
                assert np.array_equal(checkpoint.rows(f"{module}.weight", start, stop), expected[start:stop])


@pytest.mark.parametrize("case", CASES)
def test_onnx_gets_the_checkpoints_own_numbers(models, case):
    folder, linears = models[case]
    grid = CASES[case][1]
    with open_checkpoint(folder) as checkpoint:
        plan = make_plan(read_spec(checkpoint), *load_recipe("int4"))
        with checkpoint.each_read_once(plan.model):
            packed = {t.tensor.name: (t, np.concatenate(list(rows))) for t, rows in quantize(checkpoint, plan)}
    for module, linear in linears.items():
        planned, data = packed[f"{module}.weight"]
        assert (planned.codec, planned.method) == (grid, "imported")
        assert data.nbytes == planned.bytes
        q = codec(grid).unpack(data)
        groups = linear["g_idx"][:: codec(grid).BLOCK_SIZE]
        assert np.array_equal(q.codes, linear["codes"])
        assert np.array_equal(q.scales, linear["scales"].astype(np.float32)[:, groups])
        if q.zero_points is None:
            assert (linear["zero_points"] == 2 ** (CASES[case][0]["bits"] - 1)).all()
        else:
            assert np.array_equal(q.zero_points, linear["zero_points"][:, groups])
    assert {t.method for t, _ in packed.values()} == {"imported", "rtn", "cast"}


@pytest.mark.parametrize("case", CASES)
def test_gguf_holds_the_same_weights_or_is_refused(models, tmp_path, case):
    folder, linears = models[case]
    if CASES[case][2] is None:
        with pytest.raises(UnsupportedError, match="no type that holds"):
            export(str(folder), "cpu", format_="gguf", out=tmp_path / "out")
        assert not list(tmp_path.iterdir())
        return
    made = export(str(folder), "cpu", format_="gguf", out=tmp_path / "out")
    written = gguf.GGUFReader(made.artifact).tensors
    for planned, tensor in zip(made.prepared.plan.tensors, written, strict=True):
        if linear := linears.get(planned.tensor.name.removesuffix(".weight")):
            assert tensor.tensor_type.name.lower() == CASES[case][2]
            decoded = gguf.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(decoded, dequantized(linear))
    assert any(f"as {CASES[case][2]}: nothing is rounded again" in note for note in made.notes)
    assert "general.file_type" not in gguf.GGUFReader(made.artifact).fields
    roles = manifest.read_manifest(made.folder)["plan"]["roles"]
    assert sum(r["tensors"] for r in roles if r["method"] == "imported") == len(linears)


@pytest.fixture
def exact(tmp_path):
    """A recipe that rounds nothing of a checkpoint whose linears are integers."""
    path = tmp_path / "exact.toml"
    codecs = {"linear": "int4_b32", "embedding": "f32", "head": "f32", "norm": "f32"}
    lines = ['summary = "exact"', 'formats = ["onnx"]', "[codecs]", *(f'{role} = "{c}"' for role, c in codecs.items())]
    path.write_text("\n".join(lines))
    return path


def matmuls(model: onnx.ModelProto):
    """Attributes, packed codes, scales and zero points (or None) of every MatMulNBits."""
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    held |= {n.output[0]: held[n.input[0]] for n in model.graph.node if n.op_type == "Cast" and n.input[0] in held}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            inputs = [held[name] if name else None for name in node.input[1:4]]
            yield attributes, *inputs, *[None] * (3 - len(inputs))


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name][1].endswith(("b64", "b128"))])
def test_an_onnx_folder_holds_the_checkpoints_own_numbers(models, tmp_path, exact, case):
    pytest.importorskip("onnxruntime_genai")
    folder, linears = models[case]
    made = export(str(folder), "cpu", format_="onnx", recipe=str(exact), out=tmp_path / "out")
    bits = CASES[case][0]["bits"]
    middle = np.uint8(2 ** (bits - 1))
    block = codec(CASES[case][1]).BLOCK_SIZE
    rows = {}
    for linear in linears.values():
        groups = linear["g_idx"][::block]
        numbers = linear["codes"], linear["scales"][:, groups], linear["zero_points"][:, groups]
        rows |= {codes.tobytes(): (scales, zeros) for codes, scales, zeros in zip(*numbers, strict=True)}
    seen = 0
    for attributes, codes, scales, zeros in matmuls(onnx.load(made.artifact)):
        outputs = attributes["N"]
        assert (attributes["bits"], attributes["block_size"]) == (bits, block)
        codes = unpacked(codes.reshape(outputs, -1), bits)
        scales = scales.reshape(outputs, -1)
        if zeros is not None:
            zeros = unpacked(zeros.reshape(outputs, -1), bits)[:, : scales.shape[1]]
        for n in range(outputs):
            expected_scales, expected_zeros = rows[codes[n].tobytes()]
            assert np.array_equal(scales[n], expected_scales)
            assert ((middle if zeros is None else zeros[n]) == expected_zeros).all()
        seen += outputs
    assert seen == sum(len(linear["codes"]) for linear in linears.values())


def unpacked(data, bits):
    """uint8 (rows, bytes) as codes, the first of two in the low half."""
    return data if bits == 8 else np.stack([data & 15, data >> 4], -1).reshape(len(data), -1)


@pytest.mark.parametrize("case", ["awq", "gptq"])
def test_an_onnx_folder_computes_the_dequantized_model(models, tmp_path, exact, case):
    pytest.importorskip("onnxruntime_genai")
    folder, _ = models[case]
    made = export(str(folder), "cpu", format_="onnx", recipe=str(exact), out=tmp_path / "out")
    model = onnx.load(made.artifact)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # activations in float32: what is left is the order of sums
    ids = np.arange(300)[None]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    nothing = np.zeros((1, HALF.kv_heads, 0, HALF.hidden // HALF.heads), np.float32)
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": ids}
    feed = {value.name: known.get(value.name, nothing) for value in session.get_inputs()}
    got = session.run(["logits"], feed)[0]
    with torch.inference_mode():
        expected = reference._load(folder)(torch.from_numpy(ids)).logits.numpy()
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_float_recipe_writes_the_same_model(models, tmp_path):
    folder, _ = models["awq"]
    made = export(str(folder), "cpu", format_="gguf", recipe="f32", out=tmp_path / "out")
    gates = {"kl_mean": Limit(limit=1e-4)}
    report, _ = validate(made.artifact, folder, windows=Windows(1), gates=gates, kv_type="f32", threads=1)
    assert report.passed


@pytest.mark.parametrize("case", ["awq", "gptq"])
def test_the_reference_is_the_dequantized_model(models, tmp_path, case):
    transformers = pytest.importorskip("transformers")
    folder, linears = models[case]
    twin = tmp_path / "twin"
    twin.mkdir()
    floats = {n: t.float() for n, t in load_file(folder / "model.safetensors").items() if "_proj." not in n}
    floats |= {f"{name}.weight": torch.from_numpy(dequantized(linear)).float() for name, linear in linears.items()}
    write_weights(twin, floats)
    config = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"}
    del config["quantization_config"]
    (twin / "config.json").write_text(json.dumps(config))
    expected = transformers.AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32)
    got = reference._load(folder)
    ids = torch.arange(300)[None]
    with torch.inference_mode():
        assert torch.equal(got(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("format_", ["gguf", "onnx"])
def test_the_command_line_exports_one(models, tmp_path, format_):
    pytest.importorskip("onnxruntime_genai")
    folder, _ = models["awq"]
    arguments = ["export", str(folder), "--target", "cpu", "--format", format_, "--no-validate", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "nothing is rounded again" in result.stdout
    assert manifest.verify(tmp_path / "out") == []


def write_changed(tmp_path: Path, said: dict, **changes) -> Path:
    folder = tmp_path / "model"
    write_prequantized(folder, said)
    change_tensors(folder, **changes)
    return folder


def check(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check(read_spec(checkpoint))


def test_groups_that_moved_as_wholes_are_read(tmp_path):
    """As GPTQModel's act_group_aware leaves them: another order of groups, but no group torn apart."""
    folder, order = tmp_path / "model", np.array([2, 0, 3, 1])
    linear = write_prequantized(folder, GPTQ)[QKV]
    change_tensors(folder, **{f"{QKV}.g_idx": lambda old: torch.from_numpy(order[old.numpy()].astype(np.int32))})
    check(folder)
    with open_checkpoint(folder) as checkpoint:
        expected = dequantized(linear | {"g_idx": order[linear["g_idx"]]})
        assert np.array_equal(checkpoint.read(f"{QKV}.weight"), expected)


def test_biases_of_nothing_but_zeros_are_taken(tmp_path):
    check(write_changed(tmp_path, GPTQ, **{f"{QKV}.bias": lambda _: torch.zeros(768, dtype=torch.float16)}))


def test_bfloat16_scales_that_are_float16_too_are_taken(tmp_path):
    folder = write_changed(tmp_path, GPTQ, **{f"{QKV}.scales": lambda old: old.bfloat16()})
    check(folder)
    with open_checkpoint(folder) as checkpoint:
        scales = load_file(folder / "model.safetensors")[f"{QKV}.scales"].float().numpy()
        assert np.array_equal(checkpoint.codes(f"{QKV}.weight", 0, 768).scales, scales.T)


@pytest.mark.parametrize(
    ("said", "modules"),
    [
        (AWQ | {"modules_to_not_convert": ["self_attn"]}, ("gate_up_proj", "down_proj")),
        (
            GPTQ | {"modules_in_block_to_quantize": [["mlp.gate_up_proj"], ["mlp.down_proj"]]},
            ("mlp.gate_up_proj", "down_proj"),
        ),
        (GPTQ_V2 | {"lm_head": True}, ("_proj", "lm_head")),
    ],
    ids=["awq", "gptq", "head"],
)
def test_which_modules_are_integers_is_read(tmp_path, said, modules):
    linears = write_prequantized(tmp_path / "model", said, modules=modules)
    check(tmp_path / "model")
    made = export(str(tmp_path / "model"), "cpu", format_="gguf", out=tmp_path / "out")
    imported_names = [
        t.tensor.name.removesuffix(".weight") for t in made.prepared.plan.tensors if t.method == "imported"
    ]
    assert sorted(imported_names) == sorted(linears)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method"),
        ({"quant_method": None}, "quant_method"),
        ({"bits": 3}, "bits is 3"),
        ({"bits": 8}, "bits is 8"),
        ({"bits": True}, "bits"),
        ({"group_size": 8}, "group_size is 8"),
        ({"group_size": 48}, "whole groups of 48"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": "128"}, "group_size"),
        ({"version": "gemv"}, "gemv"),
        ({"version": "GEMM", "format": "marlin"}, "gemm, marlin"),
        ({"zero_point": None}, "zero_point"),
        ({"backend": "llm-awq"}, "llm-awq"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
        ({"w_bit": 4}, "w_bit"),
        ({"dynamic": {"-:.*down": {}}}, "dynamic"),
        ({"pack_dtype": "int16"}, "pack_dtype"),
        ({"rotation": "hadamard"}, "rotation"),
    ],
    ids=str,
)
def test_what_is_not_known_to_be_read_right_is_refused(models, change, says):
    config = json.loads((models["awq"][0] / "config.json").read_text())
    config["quantization_config"] |= change
    with pytest.raises(UnsupportedError, match=says) as error:
        parse_config(config, None, "tiny")
    assert "\n" not in error.value.message


@pytest.mark.parametrize("value", [[], "awq", 1, {}])
def test_whatever_the_object_is_the_answer_is_our_error(models, value):
    config = json.loads((models["awq"][0] / "config.json").read_text())
    with pytest.raises(UnsupportedError, match="quantization_config"):
        parse_config(config | {"quantization_config": value}, None, "tiny")


def scattered(g_idx):
    return g_idx[torch.randperm(len(g_idx), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize(
    ("said", "part", "change", "error", "says"),
    [
        (GPTQ | {"desc_act": True}, "g_idx", scattered, UnsupportedError, "act-order"),
        (GPTQ, "g_idx", lambda old: old + 1, CheckpointError, "group 4"),
        (GPTQ, "g_idx", lambda old: old.long(), CheckpointError, "I64"),
        (GPTQ, "g_idx", lambda _: None, CheckpointError, "missing"),
        (GPTQ, "qzeros", lambda old: old + 1, CheckpointError, "zero point 9"),
        (GPTQ | {"sym": False}, "qzeros", lambda old: torch.full_like(old, -1), UnsupportedError, "zero point 16"),
        (AWQ, "qzeros", lambda _: None, CheckpointError, "missing"),
        (AWQ, "qzeros", lambda old: old[:-1].clone(), CheckpointError, "shape"),
        (AWQ, "qweight", lambda _: None, CheckpointError, "missing"),
        (AWQ, "qweight", lambda old: old.T.contiguous(), CheckpointError, "shape"),
        (AWQ, "qweight", lambda old: old.view(torch.float32), CheckpointError, "F32"),
        (AWQ, "scales", lambda old: old.int(), CheckpointError, "I32"),
        (AWQ, "scales", lambda old: old.float() * 1.0001, UnsupportedError, "float16"),
        (AWQ, "scales", lambda old: old.float() * 1e9, UnsupportedError, "float16"),
        (AWQ, "scales", lambda old: old * torch.inf, CheckpointError, "infinity"),
        (AWQ, "weight", lambda _: torch.zeros(768, 256, dtype=torch.float16), CheckpointError, "both"),
        (AWQ, "bias", lambda _: torch.ones(768, dtype=torch.float16), UnsupportedError, "bias"),
        (AWQ, "g_idx", lambda _: torch.arange(256, dtype=torch.int32), CheckpointError, "unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_that_is_not_as_expected_is_named_before_anything_is_written(
    tmp_path, said, part, change, error, says
):
    folder = write_changed(tmp_path, said, **{f"{QKV}.{part}": change})
    with pytest.raises(error, match=says) as raised:
        export(str(folder), "cpu", format_="gguf", out=tmp_path / "out")
    assert QKV in raised.value.message
    assert "\n" not in raised.value.message
    assert not (tmp_path / "out").exists()


def test_integers_that_config_does_not_tell_of_are_refused(tmp_path):
    folder = tmp_path / "model"
    write_prequantized(folder, AWQ)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="missing") as error:
        check(folder)
    assert "quantization_config" in error.value.hint


def test_nothing_is_handed_over_that_a_codec_does_not_hold():
    codes, zero_points = np.zeros((2, 64), np.uint8), np.full((2, 1), 8, np.uint8)
    good = Quantized("uint4_b64", codes, np.full((2, 1), 0.5, np.float32), zero_points=zero_points)
    assert imported.quantize(good, codec("q4_0")).scales.shape == (2, 2)
    for bad in (
        Quantized("uint4_b64", codes, np.full((2, 1), 0.1, np.float32), zero_points=zero_points),
        Quantized("uint4_b64", codes, good.scales, zero_points=zero_points + 1),
    ):
        with pytest.raises(UnsupportedError, match="q4_0"):
            imported.quantize(bad, codec("q4_0"))


def test_grids_that_a_format_cannot_hold_say_where_they_could_go():
    assert exact_codec("uint8_b64", "onnx") == "uint8_b64"
    with pytest.raises(UnsupportedError) as error:
        exact_codec("uint8_b64", "gguf")
    assert "--format onnx" in error.value.hint
