"""Phi-3.5-MoE exported with calibrated rounding: what it gains, what the artifact holds, and what is said of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from _moe import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    ORIGINAL,
    RARE,
    RECIPES,
    basis_of,
    packed_model,
    text_of,
    write_with_rare,
)
from _tokenizers import corpus

from phi3edge.build import export
from phi3edge.calibrate import round_model
from phi3edge.calibrate_mixture import TOKENS_PER_COLUMN, MixtureRun
from phi3edge.calibration import CalibrationText
from phi3edge.checkpoint import open_checkpoint
from phi3edge.gguf_names import tensor_name
from phi3edge.mixture import load_mixture
from phi3edge.reference import load_tokenizer
from phi3edge.rounding import Rounding
from phi3edge.runners import llama_cpp, ort_genai
from phi3edge.statistics import LEAST_TOKENS


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_with_rare(tmp_path_factory.mktemp("model") / "tiny")


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL of logits, in nats per token."""
    p, q = (x.log_softmax(-1) for x in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format_", "methods"), [("gguf", {"gptq": 0.6, "awq+gptq": 0.6}), ("onnx", {"gptq": 0.6, "awq": 0.8})]
)
def test_calibrated_methods_are_nearer_to_the_reference_on_other_text(
    model: Path, tmp_path: Path, format_: str, methods: dict[str, float]
) -> None:
    text = "".join(corpus())
    halves = tmp_path / "text.txt"
    halves.write_text(text[: len(text) // 2])
    ids = np.array(load_tokenizer(model)(text[len(text) // 2 :])["input_ids"])[:200]
    with torch.inference_mode():
        expected = load_mixture(model)(torch.from_numpy(ids)[None]).logits[0]
    kl = {}
    for method in ("rtn", *methods):
        made = export(
            str(model),
            "cpu",
            format_=format_,
            recipe=RECIPES[format_],
            out=tmp_path / method,
            context=ORIGINAL,
            rounding=Rounding(method, None if method == "rtn" else str(halves), sequences=8),
        )
        opened = (
            llama_cpp.open(made.artifact, context=ORIGINAL, threads=1, kv_type="f32", plain=True)
            if format_ == "gguf"
            else ort_genai.open(made.folder, context=ORIGINAL, threads=1)
        )
        with opened as runner:
            kl[method] = divergence(expected, torch.from_numpy(runner.logits(ids)))
    assert all(kl[method] < most * kl["rtn"] for method, most in methods.items())


@pytest.mark.parametrize("format_", ["gguf", "onnx"])
def test_an_artifact_holds_and_computes_what_was_rounded(model: Path, tmp_path: Path, format_: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(corpus())[:60000])
    made = export(
        str(model),
        "cpu",
        format_=format_,
        recipe=RECIPES[format_],
        out=tmp_path / "out",
        context=ORIGINAL,
        rounding=Rounding("gptq", str(text), sequences=8),
    )
    ids = text_of(1, 200, seed=1).ids
    calibrated = CalibrationText(np.load(made.folder / "calibration.npy").astype(np.int64), text.name)
    with open_checkpoint(model) as checkpoint, torch.inference_mode():
        plan = made.prepared.plan
        basis = basis_of(checkpoint, plan, format_)
        found = round_model(basis, plan, calibrated, run_class=MixtureRun)
        packed = packed_model(checkpoint, plan, format_, found)(torch.from_numpy(ids)).logits[0]
        reference = load_mixture(model)(torch.from_numpy(ids)).logits[0]
    if format_ == "gguf":
        from gguf import GGUFReader

        held = {t.name: t.data for t in GGUFReader(made.artifact).tensors}
        for planned in plan.tensors:
            if (expert := planned.tensor.expert) is not None:
                rows = found.rows(planned, 0, planned.tensor.shape[0])
                np.testing.assert_array_equal(held[tensor_name(planned.tensor)][expert], rows)
        opened = llama_cpp.open(made.artifact, context=ORIGINAL, threads=1, kv_type="f32", plain=True)
    else:
        opened = ort_genai.open(made.folder, context=ORIGINAL, threads=1)
    with opened as runner:
        logits = torch.from_numpy(runner.logits(ids[0]))
    # what is left is the runtimes' 8-bit activations
    assert divergence(packed, logits) < 0.25 * divergence(reference, logits)
    said = json.loads((made.folder / "phi3edge.json").read_text())["calibration"]
    assert said["expert_tokens"] == [list(row) for row in found.expert_tokens]
    assert len(said["linears"]) == LAYERS * (4 + 3 * EXPERTS) + 1
    assert "Each expert was chosen by" in (made.folder / "README.md").read_text()


def test_other_tokens_make_up_for_those_that_an_expert_lacks(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog " * 600)
    made = export(
        str(model), "cpu", format_="gguf", recipe="q4_0", out=tmp_path / "out", rounding=Rounding("gptq", str(text), 8)
    )
    said = json.loads((made.folder / "phi3edge.json").read_text())["calibration"]
    few = sum(count < 2 * INTERMEDIATE for row in said["expert_tokens"] for count in row)
    assert said["expert_tokens"][0][RARE] < LEAST_TOKENS
    assert any(f"{few} of {LAYERS * EXPERTS} experts were chosen by fewer than 1,024" in note for note in made.notes)
    rows = {row["name"]: row for row in said["linears"]}
    for part, columns in (("w1", HIDDEN), ("w2", INTERMEDIATE), ("w3", HIDDEN)):
        rare = rows[f"model.layers.0.block_sparse_moe.experts.{RARE}.{part}.weight"]
        assert rare["tokens"] == TOKENS_PER_COLUMN * columns
        assert 0 < rare["error"] < 0.05
