"""ONNX Runtime GenAI folders compute what transformers does: floats, every grid, windows, other providers' graphs."""

import json
from pathlib import Path

import numpy as np
import pytest
from _models import GROUPED, MHA, TIED, Shape, write_model
from _onnx_folders import make
from _onnx_graphs import Decoder, logits, transformers_logits

from phi3edge.checkpoint import open_checkpoint
from phi3edge.codecs import _affine, codec, is_float
from phi3edge.emitters import ort_genai
from phi3edge.quantize import quantize
from phi3edge.runners import ort_genai as runner
from phi3edge.types import QuantPlan

og = pytest.importorskip("onnxruntime_genai")

IDS = [(7919 * n + 13) % 300 for n in range(60)]
WIDE = Shape(layers=1, hidden=512, intermediate=1024)
ODD = Shape(layers=1, vocab=301)
ODD_TIED = Shape(layers=1, vocab=301, tied=True)
WINDOW = 47


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Shape, Path]:
    """Checkpoints, written once."""
    shapes = (MHA, GROUPED, TIED, WIDE, ODD, ODD_TIED)
    return {shape: write_model(tmp_path_factory.mktemp("models") / "tiny", shape) for shape in shapes}


def dequantized(checkpoint: Path, plan: QuantPlan) -> dict[str, np.ndarray]:
    """The weights that the codecs' bytes stand for."""
    with open_checkpoint(checkpoint) as source:
        rows = {t: np.concatenate(list(chunks)) for t, chunks in quantize(source, plan, 1)}
    grids = {t: codec(t.codec) for t in rows if not is_float(t.codec)}
    return {t.tensor.name: grid.dequantize(grid.unpack(rows[t])) for t, grid in grids.items()}


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("shape", [MHA, GROUPED, TIED], ids=["plain", "grouped", "tied"])
@pytest.mark.parametrize(("recipe", "worst"), [("f32", 1e-5), ("f16", 2e-3)])
def test_float_weights_are_the_same_model(models, tmp_path, shape, recipe, worst):
    made = make(models[shape], tmp_path / "out", recipe)
    expected = transformers_logits(models[shape], IDS)
    assert distance(logits(made.artifact, IDS), expected) < worst
    with runner.open(made.folder, context=128, threads=1) as opened:
        assert distance(opened.logits(np.array(IDS)), expected) < worst


@pytest.mark.parametrize("name", list(_affine.CODECS))
def test_every_grid_computes_its_dequantized_model(models, tmp_path, monkeypatch, name):
    monkeypatch.setitem(ort_genai.ACCURACY_LEVELS, "cpu", 1)
    made = make(models[WIDE], tmp_path / "out", name)
    planned = {t.codec for t in made.prepared.plan.tensors}
    assert planned == {name, "f32"}
    expected = transformers_logits(models[WIDE], IDS, dequantized(models[WIDE], made.prepared.plan))
    assert distance(logits(made.artifact, IDS), expected) < 1e-5
    assert distance(transformers_logits(models[WIDE], IDS), expected) > 1e-3


@pytest.mark.parametrize("shape", [ODD, ODD_TIED], ids=["untied", "tied"])
def test_a_vocabulary_of_an_odd_number(models, tmp_path, monkeypatch, shape):
    monkeypatch.setitem(ort_genai.ACCURACY_LEVELS, "cpu", 1)
    made = make(models[shape], tmp_path / "out", "uint4_b32")
    weights = dequantized(models[shape], made.prepared.plan)
    assert distance(logits(made.artifact, IDS), transformers_logits(models[shape], IDS, weights)) < 1e-5


def test_activations_of_8_bits_stay_near(models, tmp_path):
    made = make(models[WIDE], tmp_path / "out", "uint8_b32")
    expected = transformers_logits(models[WIDE], IDS, dequantized(models[WIDE], made.prepared.plan))
    assert 1e-5 < distance(logits(made.artifact, IDS), expected) < 3e-2


@pytest.mark.parametrize("target", ["cuda", "directml", "webgpu"])
def test_graphs_of_other_providers_compute_the_same_on_the_cpu(models, tmp_path, target):
    made = make(models[GROUPED], tmp_path / "out", "f16", target)
    assert distance(logits(made.artifact, IDS), transformers_logits(models[GROUPED], IDS)) < 1e-2


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint whose window is shorter than its context, and its folder."""
    folder = tmp_path_factory.mktemp("windowed")
    checkpoint = write_model(folder / "tiny", GROUPED, sliding_window=WINDOW)
    return checkpoint, make(checkpoint, folder / "out", "f32").folder


def by_onnxruntime(folder: Path, parts: list[list[int]]) -> np.ndarray:
    decoder = Decoder(folder / "model.onnx")
    return np.concatenate([decoder.step(part) for part in parts])


def by_genai(folder: Path, parts: list[list[int]]) -> np.ndarray:
    model = og.Model(og.Config(str(folder)))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=200)
    generator = og.Generator(model, parameters)
    rows = []
    for part in parts:
        generator.append_tokens(np.array([part], np.int32))
        rows.append(generator.get_output("logits")[0].copy())
    return np.concatenate(rows)


@pytest.mark.parametrize("run", [by_onnxruntime, by_genai])
def test_attention_looks_back_as_far_as_the_checkpoints(windowed, run):
    checkpoint, folder = windowed
    ids = [(7919 * n + 13) % 300 for n in range(120)]
    expected = transformers_logits(checkpoint, ids)
    for prompt in (20, 40, WINDOW, WINDOW + 1, WINDOW + 2, 100, 120):
        got = run(folder, [ids[:prompt], *([n] for n in ids[prompt:])])
        assert np.abs(got - expected).max() < 1e-4, prompt


def test_the_window_matters(windowed, tmp_path):
    checkpoint, folder = windowed
    ids = [(7919 * n + 13) % 300 for n in range(120)]
    config = json.loads((checkpoint / "config.json").read_text())
    full = write_model(tmp_path / "full", GROUPED, sliding_window=None)
    assert config["sliding_window"] == WINDOW
    apart = np.abs(transformers_logits(full, ids) - by_onnxruntime(folder, [ids])).max(1)
    assert apart[:WINDOW].max() < 1e-4
    assert (apart[WINDOW:] > 1e-3).all()
