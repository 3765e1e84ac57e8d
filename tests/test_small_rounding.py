"""Phi-3-small's linears, rounded: recipes, statistics, and every method; measured in the runtime."""

from pathlib import Path

import numpy as np
import pytest
import torch
from _small import write_small
from _tokenizers import corpus

from phi3edge.build import export
from phi3edge.checkpoint import open_checkpoint
from phi3edge.collect import calibrate
from phi3edge.families import parse_config
from phi3edge.forward import load_block, load_outer
from phi3edge.phi3small import decoder_of
from phi3edge.plan import make_plan
from phi3edge.recipes import load_recipe, with_method
from phi3edge.reference import load_model, load_tokenizer
from phi3edge.rounding import Rounding
from phi3edge.runners import ort_genai
from phi3edge.scaling import find_scales, fold

pytest.importorskip("onnxruntime_genai")

CONTEXT = 256


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file of half a text, to calibrate on, and the other half, to measure on."""
    text = "".join(corpus())
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text[: len(text) // 2])
    return path, text[len(text) // 2 :]


class Measure:
    """Mean KL of an export from the reference, on one text."""

    def __init__(self, model: Path, text: str) -> None:
        self._model = model
        self._ids = np.array(load_tokenizer(model)(text)["input_ids"][:CONTEXT])
        with torch.inference_mode():
            self._expected = load_model(model)(torch.from_numpy(self._ids)[None]).logits[0].log_softmax(-1)

    def __call__(self, out: Path, recipe: str, rounding: Rounding) -> float:
        made = export(
            str(self._model), "cpu", format_="onnx", recipe=recipe, out=out, context=CONTEXT, rounding=rounding
        )
        codecs = {t.codec for t in made.prepared.plan.tensors if not t.tensor.role.endswith(("norm", "bias"))}
        assert not codecs & {"f32", "f16"}
        with ort_genai.open(made.folder, context=CONTEXT, threads=1) as runner:
            found = torch.from_numpy(runner.logits(self._ids)).log_softmax(-1)
        return float((self._expected.exp() * (self._expected - found)).sum(-1).mean())


@pytest.fixture(scope="module")
def measure(model: Path, halves: tuple[Path, str]) -> Measure:
    return Measure(model, halves[1])


@pytest.mark.parametrize(("recipe", "worst"), [("int4", 0.05), ("int4-mixed", 0.05), ("int8", 1e-3)])
def test_recipes(measure: Measure, recipe: str, worst: float, tmp_path: Path) -> None:
    assert 1e-7 < measure(tmp_path / "out", recipe, Rounding()) < worst


@pytest.mark.slow
def test_calibrated_methods_are_nearer_than_plain_rounding(
    model: Path, measure: Measure, halves: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "cache"))
    text = str(halves[0])
    found = {"rtn": measure(tmp_path / "rtn", "int4", Rounding("rtn"))}
    for method in ("awq", "gptq", "awq+gptq"):
        found[method] = measure(tmp_path / method, "int4", Rounding(method, text, sequences=8))
    calibrate(str(model), calibration=text, sequences=8, tokens=CONTEXT, out=tmp_path / "statistics")
    found["statistics"] = measure(tmp_path / "weighed", "int4", Rounding("rtn", statistics=tmp_path / "statistics"))
    assert found["statistics"] < found["rtn"]
    assert found["awq"] < found["rtn"]
    assert max(found["gptq"], found["awq+gptq"]) < 0.8 * found["rtn"]


def test_folded_scales_leave_a_block_as_it_was(model: Path) -> None:
    """Of all linears that are scaled; up's channels are not, for gegelu holds them within limits and adds 1."""
    with torch.inference_mode(), open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        decoder, weights = decoder_of(spec), load_block(checkpoint, spec, 0)
        recipe = with_method(load_recipe("int4")[1], "awq")
        planned = {t.tensor.role: t for t in make_plan(spec, "int4", recipe).tensors if t.tensor.layer == 0}
        h = decoder.embed(load_outer(checkpoint, spec, "embedding")[torch.arange(200)][None])
        found = find_scales(decoder, planned, weights, [h], keep_values=False)
        assert set(found) == {"attn_qkv", "attn_output", "ffn_gate_up"}
        random = np.random.default_rng(0)
        scales = {role: np.exp(random.normal(0, 1, s.values.shape)).astype(np.float32) for role, s in found.items()}
        folded = fold(spec, planned, weights, scales)
        torch.testing.assert_close(decoder.block(h, folded), decoder.block(h, weights), rtol=0, atol=1e-4)
    changed = {role for role in weights if not torch.equal(weights[role], folded[role])}
    biases = {"attn_norm_bias", "attn_qkv_bias", "ffn_norm_bias"}
    assert changed == biases | {"attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_gate_up"}
