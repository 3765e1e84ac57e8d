"""Phi-3-small under a byte budget: predicted losses against what rounding does to the reference, and an export."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _small import SMALL, Small, longrope, write_small

from phi3edge import manifest
from phi3edge.budget import Budget
from phi3edge.build import export
from phi3edge.checkpoint import open_checkpoint
from phi3edge.codecs import codec
from phi3edge.families import parse_config
from phi3edge.phi3small import Phi3Small
from phi3edge.rounding import Rounding
from phi3edge.sensitivity import predict_losses
from phi3edge.validate import Windows, validate

SEQUENCES, TOKENS, CODEC = 16, 96, "uint4_b32"
WORDS = ["rivers", "stones", "letters", "engines", "gardens", "winters", "markets", "ladders"]
UNTIED = Small(tied=False)


def rounded(weight: np.ndarray) -> np.ndarray:
    module = codec(CODEC)
    return module.dequantize(module.quantize(weight))


@pytest.mark.parametrize(
    ("shape", "changes"),
    [(SMALL, {}), (UNTIED, longrope(original_max_position_embeddings=64) | {"original_max_position_embeddings": 64})],
    ids=["tied", "untied, beyond its original context"],
)
def test_predictions_are_near_what_rounding_each_tensor_does(tmp_path: Path, shape: Small, changes: dict) -> None:
    """Of block-sparse layers and dense ones, on sequences of more blocks than a query sees."""
    folder = write_small(tmp_path / "model", shape, **changes)
    with open_checkpoint(folder) as checkpoint, torch.inference_mode():
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        assert spec.block_sparse
        assert {spec.block_sparse.is_sparse(layer) for layer in range(spec.layers)} == {True, False}
        assert spec.block_sparse.block * spec.block_sparse.local < TOKENS / 2
        ids = np.random.default_rng(5).integers(0, spec.vocab_size, (SEQUENCES, TOKENS))
        names = [t.name for t in spec.tensors if len(t.shape) == 2]
        with torch.inference_mode(False):
            found = predict_losses(checkpoint, spec, ids, dict.fromkeys(names, (CODEC,)))

        def log_probs(which: list[str]) -> torch.Tensor:
            def read(name: str) -> np.ndarray:
                return rounded(checkpoint.read(name)) if name in which else checkpoint.read(name)

            model = Phi3Small(SimpleNamespace(read=read), spec)
            return model(torch.from_numpy(ids)).logits.log_softmax(-1)

        exact = log_probs([])

        def measured(which: list[str]) -> float:
            return float((exact.exp() * (exact - log_probs(which))).sum(-1).mean())

        assert set(found) == set(names)
        for name in names:
            truth = measured([name])
            assert truth / 2 < found[name][CODEC] < truth * 2, name
        total = measured(names)
    assert total / 1.6 < sum(by_codec[CODEC] for by_codec in found.values()) < total * 1.6


def test_an_export_keeps_its_budget_and_is_as_good_as_predicted(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    model, text = write_small(tmp_path / "model"), tmp_path / "words.txt"
    text.write_text(". ".join(" ".join(words) for words in itertools.permutations(WORDS, 4)))
    whole = export(str(model), "cpu", format_="onnx", recipe="int8", out=tmp_path / "int8")
    taken, predicted = sum(f.stat().st_size for f in whole.files), []
    for budget in (taken - 140_000, taken - 70_000):
        made = export(
            str(model),
            "cpu",
            format_="onnx",
            budget=Budget(bytes=budget),
            rounding=Rounding(calibration=str(text)),
            out=tmp_path / str(budget),
        )
        files = manifest.read_manifest(made.folder)["files"]
        assert 0.97 * budget < sum(entry["bytes"] for entry in files) <= budget
        assert sum(path.stat().st_size for path in made.files) == sum(entry["bytes"] for entry in files)
        assert len({t.codec for t in made.prepared.plan.tensors}) > 2  # a mix indeed
        predicted.append(made.prepared.plan.predicted_kl)
    assert predicted[0] > predicted[1] > 0
    report, _ = validate(made.artifact, model, windows=Windows(2), predicted_kl=predicted[1], threads=1)
    assert predicted[1] / 3 < report.metrics["kl_mean"].value < predicted[1] * 3
