"""Phi-3.5-MoE as an ONNX Runtime GenAI folder: SparseMixer in the graph, exact on the CPU for every token."""

from pathlib import Path

import numpy as np
import pytest
import torch
from _moe import CONTEXT, EXPERTS, LAYERS, ORIGINAL, write_phimoe

from phi3edge.build import export, prepare
from phi3edge.errors import UnsupportedError
from phi3edge.mixture import load_mixture
from phi3edge.proof import Protocol, validate_artifact
from phi3edge.providers import load_provider
from phi3edge.runners import ort_genai
from phi3edge.validate import Windows

LENGTHS = (1, 40, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 400)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_phimoe(tmp_path_factory.mktemp("model") / "tiny")


def ids(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 320, count)


def reference(model: Path, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return load_mixture(model)(torch.from_numpy(tokens)[None]).logits[0].numpy()


def kl(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    p, q = (torch.from_numpy(x.copy()).log_softmax(-1) for x in (expected, found))
    return (p.exp() * (p - q)).sum(-1).numpy()


@pytest.mark.parametrize("jitter", [0.01, 0.3])
def test_it_is_exact_below_at_and_above_the_original_context(model: Path, tmp_path: Path, jitter: float) -> None:
    """Also where most tokens have experts that share a weight."""
    checkpoint = model if jitter == 0.01 else write_phimoe(tmp_path / "in", router_jitter_noise=jitter)
    made = export(str(checkpoint), "cpu", format_="onnx", recipe="f32", out=tmp_path / "out", context=CONTEXT)
    with ort_genai.open(made.folder, context=CONTEXT, threads=1) as runner:
        for length in LENGTHS:
            found, expected = runner.logits(ids(length)), reference(checkpoint, ids(length))
            np.testing.assert_allclose(found, expected, atol=3e-4)
            assert kl(expected, found).mean() < 1e-6


def test_greedy_answers_cross_the_original_context(tmp_path: Path) -> None:
    """Each next token is that of the whole sequence, rotated for its length; the runtime knows 4,096 only."""
    from _moe import phimoe_config

    scaling = phimoe_config()["rope_scaling"] | {"original_max_position_embeddings": 4096}
    lengths = {"max_position_embeddings": 8192, "original_max_position_embeddings": 4096, "sliding_window": 8192}
    checkpoint = write_phimoe(tmp_path / "in", rope_scaling=scaling, **lengths)
    (checkpoint / "generation_config.json").unlink()
    made = export(str(checkpoint), "cpu", format_="onnx", recipe="f32", out=tmp_path / "out", context=4200)
    sequence = ids(4094).tolist()
    with ort_genai.open(made.folder, context=4200, threads=1) as runner:
        found = runner.generate(sequence, 5)
    assert len(found) > 3
    ours = load_mixture(checkpoint)
    for token in found:
        with torch.inference_mode():
            logits = ours(torch.tensor([sequence]), logits_to_keep=1).logits[0, 0]
        assert logits[token] == pytest.approx(float(logits.max()), abs=1e-4)
        sequence.append(token)


@pytest.mark.parametrize(("recipe", "limit"), [("int4", 0.3), ("int4-mixed", 0.3), ("int8", 0.02)])
def test_experts_are_quantized_and_what_is_compared_is_not(
    model: Path, tmp_path: Path, recipe: str, limit: float
) -> None:
    import onnx

    made = export(str(model), "cpu", format_="onnx", recipe=recipe, out=tmp_path / "out", context=ORIGINAL)
    graph = onnx.load(made.artifact, load_external_data=False).graph
    linears = [node.name for node in graph.node if node.op_type == "MatMulNBits"]
    assert sum(".experts." in name or "/experts." in name for name in linears) == LAYERS * EXPERTS * 3
    assert [n.name for n in graph.node if n.op_type == "MatMul"] == [
        f"/model/layers.{n}/moe/router/MatMul" for n in range(LAYERS)
    ]
    with ort_genai.open(made.folder, context=ORIGINAL, threads=1) as runner:
        found = kl(reference(model, ids(200)), runner.logits(ids(200)))
        assert len(runner.generate([5, 6, 7], 8)) <= 8
    assert 1e-6 < found.mean() < limit


def test_a_report_has_no_tokens_that_stay_different(model: Path, tmp_path: Path) -> None:
    made = export(str(model), "cpu", format_="onnx", recipe="f32", out=tmp_path / "out", context=512)
    report, *_ = validate_artifact(made.folder, protocol=Protocol(windows=Windows(2, 128), threads=1))
    assert report.metrics["kl_mean"].value < 1e-6
    assert report.metrics["experts_shared"].value > 0.01
    assert report.metrics["greedy_agreement"].value == 1
    assert all(band.kl.value < 1e-6 for band in report.positions)
    assert len(report.positions) >= 3


def operators(folder: Path) -> set[str]:
    import onnx

    return {node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node}


@pytest.mark.parametrize("jitter", [0.01, 0.3])
def test_where_rows_cannot_be_picked_all_experts_together_are_exact(
    model: Path, tmp_path: Path, jitter: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WebGPU's graph, here with float32 throughout, so that nothing but the form of the mixture could differ."""
    from phi3edge.emitters import ort_genai as emitter

    wide = load_provider("webgpu").model_copy(update={"io": "float32"})
    monkeypatch.setattr(emitter, "load_provider", lambda name: wide)
    checkpoint = model if jitter == 0.01 else write_phimoe(tmp_path / "in", router_jitter_noise=jitter)
    made = export(
        str(checkpoint), "webgpu", recipe="f32", kv_cache="f32", out=tmp_path / "out", context=CONTEXT, force=True
    )
    assert not {"NonZero", "ScatterND", "ArgMax", "Max"} & operators(made.folder)
    with ort_genai.open(made.folder, context=CONTEXT, threads=1) as runner:
        for length in LENGTHS:
            assert kl(reference(checkpoint, ids(length)), runner.logits(ids(length))).max() < 1e-6


def test_gpus_get_the_same_function_in_4_bits(model: Path, tmp_path: Path) -> None:
    """In 16-bit floats a score next to another may fall to its other side: a few tokens, none of them far off."""
    found = {}
    for target in ("cpu", "cuda", "webgpu"):
        made = export(str(model), target, format_="onnx", recipe="int4", out=tmp_path / target, context=ORIGINAL)
        with ort_genai.open(made.folder, context=ORIGINAL, threads=1) as runner:
            found[target] = runner.logits(ids(200))
            assert len(runner.generate([5, 6, 7], 8)) <= 8
        assert any("not run here" in note for note in made.notes) == (target != "cpu")
        assert any("each of a layer's experts" in note for note in made.notes) == (target == "webgpu")
        assert ("NonZero" in operators(made.folder)) == (target != "webgpu")
    for target in ("cuda", "webgpu"):
        differs = kl(found["cpu"], found[target])
        assert np.median(differs) < 1e-3  # the CPU rounds activations to 8 bits
        assert differs.mean() < 5e-3


def test_a_graph_that_reads_all_experts_has_a_lower_roofline(model: Path) -> None:
    fits = [prepare(str(model), target, format_="onnx", recipe="int4").fit for target in ("cuda", "webgpu")]
    picked, every = (fit.roofline_tokens_per_s / bandwidth for fit, bandwidth in zip(fits, (768, 102.4), strict=True))
    assert every < picked


def test_other_providers_are_refused(model: Path) -> None:
    with pytest.raises(UnsupportedError, match="for the CPU, CUDA and WebGPU; there is none for provider dml"):
        prepare(str(model), "directml", format_="onnx")


def test_a_calibrated_cache_is_refused(model: Path) -> None:
    with pytest.raises(UnsupportedError, match="int8 KV cache"):
        prepare(str(model), "cpu", format_="onnx", kv_cache="int8")
