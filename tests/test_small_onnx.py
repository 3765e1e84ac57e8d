"""Phi-3-small as an ONNX folder on the CPU computes what the float reference does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _small import (
    CONTEXT,
    NARROW,
    ORIGINAL,
    ORIGINAL_PATTERN,
    SMALL,
    Small,
    longrope,
    train_ranks,
    write_ranks,
    write_small,
)

from phi3edge.build import export
from phi3edge.errors import UnsupportedError
from phi3edge.proof import Protocol, validate_artifact
from phi3edge.reference import load_model
from phi3edge.runners import ort_genai
from phi3edge.validate import Windows

og = pytest.importorskip("onnxruntime_genai")

KINDS: dict[str, tuple[Small, dict]] = {
    "8k": (SMALL, {}),
    "128k": (SMALL, longrope()),
    "one pattern, untied": (Small(tied=False), {"blocksparse_homo_head_pattern": True}),
    "a pattern a head": (SMALL, {"blocksparse_vert_stride": 13, "dense_attention_every_n_layers": 3}),
    "no muP, no limit": (SMALL, {"mup_use_scaling": False, "gegelu_limit": None}),
}
LENGTHS = (1, 31, 33, 100, ORIGINAL, ORIGINAL + 1, 600)


def ids(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SMALL.vocab, count)


def reference(model: Path, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return load_model(model)(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_f32_is_exact(kind: str, tmp_path: Path) -> None:
    shape, changes = KINDS[kind]
    model = write_small(tmp_path / "in", shape, **changes)
    made = export(str(model), "cpu", format_="onnx", recipe="f32", out=tmp_path / "out", context=CONTEXT)
    with ort_genai.open(made.folder, context=CONTEXT, threads=1) as runner:
        for length in LENGTHS:
            found, expected = runner.logits(ids(length)), reference(model, ids(length))
            np.testing.assert_allclose(found, expected, atol=2e-4, err_msg=str(length))


def greedy_is_the_references(runner, model: Path, prompt: list[int], count: int) -> int:
    """Every token that is generated is the most likely one of the whole sequence before it; how many there are."""
    found = runner.generate(prompt, count)
    loaded, feed, past = load_model(model), prompt, None
    for n, token in enumerate(found):
        with torch.inference_mode():
            step = loaded(torch.tensor([feed]), past_key_values=past, use_cache=True, logits_to_keep=1)
        row, feed, past = step.logits[0, -1], [token], step.past_key_values
        assert row[token] == pytest.approx(float(row.max()), abs=1e-4), n
    return len(found)


def test_the_original_pattern_is_exact_below_and_above_1024_tokens(tmp_path: Path) -> None:
    model = write_small(tmp_path / "in", NARROW, **ORIGINAL_PATTERN, max_position_embeddings=2048, eos_token_id=0)
    (model / "generation_config.json").unlink()
    made = export(str(model), "cpu", format_="onnx", recipe="f32", out=tmp_path / "out", context=2048)
    with ort_genai.open(made.folder, context=2048, threads=1) as runner:
        for length in (1023, 1024, 1025, 1600):
            np.testing.assert_allclose(runner.logits(ids(length)), reference(model, ids(length)), atol=2e-4)
        assert greedy_is_the_references(runner, model, ids(1020).tolist(), 10) > 3


def test_sparse_layers_are_not_dense(tmp_path: Path) -> None:
    found = []
    for every in (1, 2):
        model = write_small(tmp_path / f"in{every}", SMALL, dense_attention_every_n_layers=every)
        found.append(reference(model, ids(100)))
    apart = np.abs(found[0] - found[1]).max(1)
    assert apart[:32].max() < 1e-4  # two blocks of 16
    assert apart[64:].min() > 1e-2


def test_prompts_in_pieces_and_token_by_token(tmp_path: Path) -> None:
    model = write_small(tmp_path / "in")
    made = export(str(model), "cpu", format_="onnx", recipe="f32", out=tmp_path / "out", context=CONTEXT)
    expected = reference(model, ids(200))
    for batch in (1, 50):
        with ort_genai.open(made.folder, context=CONTEXT, threads=1, batch=batch) as runner:
            np.testing.assert_allclose(runner.logits(ids(200)), expected, atol=2e-4)


def test_greedy_answers_cross_the_original_context(tmp_path: Path) -> None:
    """The runtime goes back and rotates all keys anew at 8,193 tokens, for phi3small as it is."""
    lengths = {"max_position_embeddings": 16384, "original_max_position_embeddings": 8192}
    changes = longrope(pairs=8) | ORIGINAL_PATTERN | lengths
    model = write_small(tmp_path / "in", replace(NARROW, layers=1), **changes, eos_token_id=0)
    (model / "generation_config.json").unlink()
    made = export(str(model), "cpu", format_="onnx", recipe="f32", out=tmp_path / "out", context=8300)
    with ort_genai.open(made.folder, context=8300, threads=1) as runner:
        assert greedy_is_the_references(runner, model, ids(8190).tolist(), 6) > 3


def test_an_artifact_is_proven_with_its_own_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "cache"))
    ranks = 900
    special = {"bos_token_id": ranks + 1, "eos_token_id": ranks + 1, "dummy_token_indices": [ranks, ranks + 2]}
    model = write_small(tmp_path / "in", Small(vocab=ranks + 96), **longrope(), **special)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (model / name).unlink()
    write_ranks(model, train_ranks(ranks))
    made = export(str(model), "cpu", format_="onnx", recipe="f32", out=tmp_path / "out", context=512)
    report, *_ = validate_artifact(made.folder, protocol=Protocol(windows=Windows(2, 64), threads=1))
    found = {name: metric.value for name, metric in report.metrics.items()}
    assert found["kl_mean"] < 1e-6
    assert found["ppl_ratio"] == pytest.approx(1, abs=1e-5)
    assert (found["tokenizer_mismatches"], found["eog_missing"], found["greedy_agreement"]) == (0, 0, 1)
    bands = {(band.first, band.tokens, band.allocated): band.kl.value for band in report.positions}
    assert {(16, 256), (32, 256), (240, 256), (256, 512), (495, 512)} == {place[:2] for place in bands}
    assert max(bands.values()) < 1e-6


@pytest.mark.parametrize(
    ("target", "options", "says"),
    [
        ("directml", {}, "runs on the CPU only: provider dml has no block-sparse attention"),
        ("cpu", {"kv_cache": "int8"}, "SparseAttention has none of 8 bits"),
    ],
)
def test_what_no_runtime_does_is_refused(target: str, options: dict, says: str, tmp_path: Path) -> None:
    model = write_small(tmp_path / "in")
    with pytest.raises(UnsupportedError, match=says):
        export(str(model), target, format_="onnx", out=tmp_path / "out", context=CONTEXT, **options)


def test_blocks_that_the_runtime_does_not_take_are_refused(tmp_path: Path) -> None:
    model = write_small(tmp_path / "in", blocksparse_block_size=48)
    with pytest.raises(UnsupportedError, match=r"blocksparse_block_size is 48; .* takes 16, 32, 64, 128"):
        export(str(model), "cpu", format_="onnx", out=tmp_path / "out", context=CONTEXT)
