"""ONNX Runtime GenAI folders: the same logits as transformers, bytes where they should be, nothing left on errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _models import GROUPED, MHA, TIED, Shape, write_model
from _onnx_graphs import logits, transformers_logits

from phi3edge.build import Exported, export
from phi3edge.checkpoint import open_checkpoint
from phi3edge.codecs import _affine, codec, is_float
from phi3edge.emitters import ort_genai
from phi3edge.quantize import quantize
from phi3edge.types import QuantPlan

pytest.importorskip("onnxruntime_genai")

from phi3edge.runners import ort_genai as runner

KIB64 = 65536
IDS = [(7919 * n + 13) % 300 for n in range(60)]
TINY = Shape(layers=1)
WIDE = Shape(layers=1, hidden=512, intermediate=1024)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Shape, Path]:
    """Checkpoints, written once."""
    shapes = (MHA, GROUPED, TIED, TINY, WIDE)
    return {shape: write_model(tmp_path_factory.mktemp("models") / "tiny", shape) for shape in shapes}


def write_recipe(folder: Path, linear: str, **codecs: str) -> str:
    path = folder / f"{'-'.join([linear, *codecs.values()])}.toml"
    lines = {"linear": linear, "norm": "f32", **codecs}
    path.write_text(
        "\n".join(['summary = "test"', 'formats = ["onnx"]', "[codecs]", *(f'{k} = "{v}"' for k, v in lines.items())])
    )
    return str(path)


def make(checkpoint: Path, out: Path, linear: str, target: str = "cpu", **codecs: Any) -> Exported:
    options = {key: codecs.pop(key) for key in ("threads", "split_max_size", "context") if key in codecs}
    recipe = write_recipe(out.parent, linear, **codecs)
    return export(str(checkpoint), target, recipe=recipe, format_="onnx", out=out, **options)


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
