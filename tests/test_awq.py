"""Channel scales: that folding them changes nothing, what the search finds, and what the method gains."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from _models import GROUPED, MHA, TIED, Shape, write_model
from test_calibrate import contents, divergence, logits, plan_of, spec_of, text_of
from typer.testing import CliRunner

from phi3edge import scaling
from phi3edge.calibrate import round_model
from phi3edge.checkpoint import open_checkpoint
from phi3edge.cli.app import app
from phi3edge.codecs import codec, codec_names, is_float
from phi3edge.errors import UnsupportedError
from phi3edge.forward import Decoder, load_block, load_outer
from phi3edge.methods import awq
from phi3edge.proof import Protocol, validate_artifact
from phi3edge.scaling import channels, find_scales, fold
from phi3edge.types import Statistics
from phi3edge.validate import Windows

COLUMNS, ROWS, TOKENS = 512, 24, 1024
QUANTIZERS = [name for name in codec_names() if not is_float(name)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def block_plan(spec, codec_name="q4_0", method="awq"):
    return {t.tensor.role: t for t in plan_of(spec, codec_name, method).tensors if t.tensor.layer == 0}


# ---- folding


@pytest.mark.parametrize("shape", [MHA, GROUPED, TIED, Shape(hidden=192, heads=6, kv_heads=2)])
def test_folded_scales_leave_a_block_as_it_was(tmp_path: Path, shape: Shape) -> None:
    rng = np.random.default_rng(0)
    with torch.inference_mode(), open_checkpoint(write_model(tmp_path / "model", shape)) as checkpoint:
        spec = spec_of(checkpoint)
        weights, decoder = load_block(checkpoint, spec, 0), Decoder(spec)
        kept = {role: weight.clone() for role, weight in weights.items()}
        sizes = {
            "attn_qkv": spec.hidden_size,
            "attn_output": spec.kv_heads * spec.head_dim,
            "ffn_gate_up": spec.hidden_size,
            "ffn_down": spec.intermediate_size,
        }
        scales = {role: np.exp(rng.normal(0, 1, size)).astype(np.float32) for role, size in sizes.items()}
        folded = fold(spec, block_plan(spec), weights, scales)
        h = load_outer(checkpoint, spec, "embedding")[torch.from_numpy(text_of(spec, 2).ids)]
        torch.testing.assert_close(decoder.block(h, folded), decoder.block(h, weights), rtol=0, atol=2e-5)
    for role, weight in weights.items():
        assert torch.equal(weight, kept[role])
        assert not torch.equal(weight, folded[role])


def test_query_heads_that_share_values_share_their_scales(tmp_path: Path) -> None:
    with open_checkpoint(write_model(tmp_path / "model", GROUPED)) as checkpoint:
        spec = spec_of(checkpoint)
    columns = np.arange(spec.heads * spec.head_dim)
    head, channel = columns // spec.head_dim, columns % spec.head_dim
    expected = head // (spec.heads // spec.kv_heads) * spec.head_dim + channel
    np.testing.assert_array_equal(channels(spec, "attn_output", len(columns)), expected)


def test_values_and_imported_weights_stay_as_they_are(tmp_path: Path) -> None:
    from dataclasses import replace

    with torch.inference_mode(), open_checkpoint(write_model(tmp_path / "model", GROUPED)) as checkpoint:
        spec = spec_of(checkpoint)
        planned, weights = block_plan(spec), load_block(checkpoint, spec, 0)
        h = load_outer(checkpoint, spec, "embedding")[torch.from_numpy(text_of(spec, 2).ids)]
        every = {"attn_qkv", "attn_output", "ffn_gate_up", "ffn_down"}
        assert set(find_scales(Decoder(spec), planned, weights, [h], keep_values=False)) == every
        assert set(find_scales(Decoder(spec), planned, weights, [h], keep_values=True)) == every - {"attn_output"}
        planned["ffn_gate_up"] = replace(planned["ffn_gate_up"], method="imported")
        found = find_scales(Decoder(spec), planned, weights, [h], keep_values=False)
        assert set(found) == {"attn_qkv", "attn_output"}


# ---- the search


def inputs_of(scale: np.ndarray, seed: int = 0) -> Statistics:
    x = np.random.default_rng(seed).standard_normal((TOKENS, len(scale))) * scale
    moments = (x.T @ x / TOKENS).astype(np.float32)
    return Statistics(TOKENS, moments.diagonal().copy(), np.abs(x).mean(0).astype(np.float32), moments)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_few_strong_inputs_get_finer_steps(name: str) -> None:
    rng = np.random.default_rng(1)
    scale, strong = np.ones(COLUMNS), rng.permutation(COLUMNS)[:32]
    scale[strong] = 30
    weight = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    found = awq.search(weight, codec(name), inputs_of(scale), np.arange(COLUMNS))
    weak = np.delete(found.values, strong)
    assert np.median(found.values[strong]) > 1.2 * np.median(weak)
    assert found.error < 0.9


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "uint4_b32"])
def test_columns_of_unlike_size_are_made_alike(name: str) -> None:
    rng = np.random.default_rng(2)
    size = np.exp(rng.normal(0, 1, COLUMNS))
    weight = (rng.standard_normal((ROWS * 8, COLUMNS)) * size).astype(np.float32)
    found = awq.search(weight, codec(name), inputs_of(1 / size), np.arange(COLUMNS))
    # inputs that undo the sizes: every channel matters alike, and one scale for all columns of a block fits
    assert np.corrcoef(np.log(found.values), np.log(size))[0, 1] < -0.99
    assert found.error < 0.7


def test_nothing_is_scaled_where_nothing_helps() -> None:
    weight = np.random.default_rng(3).choice([-8, -4, 2, 5, 7], (ROWS, COLUMNS)).astype(np.float32)
    weight[:, ::32] = -8  # on the grid already: rounding loses nothing, but scaled columns would leave the grid
    statistics = inputs_of(np.exp(np.random.default_rng(4).normal(0, 1, COLUMNS)))
    found = awq.search(weight, codec("q4_0"), statistics, np.arange(COLUMNS))
    assert (found.values == 1).all()
    assert found.error == 1


def test_silent_inputs_and_columns_of_zeros_get_finite_scales() -> None:
    rng = np.random.default_rng(5)
    scale = np.exp(rng.normal(0, 1, COLUMNS))
    scale[7] = 0
    weight = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    weight[:, 9] = 0
    found = awq.search(weight, codec("q4_0"), inputs_of(scale), np.arange(COLUMNS))
    assert np.isfinite(found.values).all()
    assert (found.values > 0).all()
    none = awq.search(weight, codec("q4_0"), inputs_of(0 * scale), np.arange(COLUMNS))
    assert (none.values == 1).all()


def test_moments_that_are_not_finite_are_refused() -> None:
    weight = np.ones((ROWS, COLUMNS), np.float32)
    with pytest.raises(UnsupportedError, match="not finite"):
        awq.search(weight, codec("q4_0"), inputs_of(np.full(COLUMNS, np.nan)), np.arange(COLUMNS))


# ---- the method


@pytest.mark.parametrize(("method", "at_most"), [("awq", 0.9), ("awq+gptq", 0.7)])
@pytest.mark.parametrize("linear", ["q4_0", "q4_k", "uint4_b32"])
def test_it_loses_less_than_rounding_to_nearest(tmp_path: Path, method: str, at_most: float, linear: str) -> None:
    with torch.inference_mode(), open_checkpoint(write_model(tmp_path / "model", GROUPED)) as model:
        spec = spec_of(model)
        plan, text = plan_of(spec, linear, method), text_of(spec)
        ids = text_of(spec, seed=1).ids
        exact = logits(model, plan_of(spec, "f32"), None, ids)
        found = round_model(model, plan, text)
        calibrated = divergence(exact, logits(model, plan, found, ids))
        nearest = divergence(exact, logits(model, plan, None, ids))
    assert calibrated < at_most * nearest
    scaled = [row.scaled for row in found.figures]
    assert all(0 < value <= 1 for value in scaled if value is not None)
    assert sum(value is not None for value in scaled) == 4 * spec.layers


@pytest.mark.parametrize("shape", [MHA, TIED])
def test_every_shape_of_model_is_scaled(tmp_path: Path, shape: Shape) -> None:
    with torch.inference_mode(), open_checkpoint(write_model(tmp_path / "model", shape)) as model:
        spec = spec_of(model)
        plan = plan_of(spec, "q4_0", "awq", head="q8_0")
        found = round_model(model, plan, text_of(spec))
        for t in plan.tensors:
            rows = found.rows(t, 0, 1)
            assert (rows is not None) == (t.tensor.layer is not None or t.tensor.role == "head")
            if t.codec == "f32" and rows is not None:
                assert not np.array_equal(rows.view(np.float32)[0], model.read(t.tensor.name))
        assert all(0 < row.error < 0.1 for row in found.figures)


def test_values_keep_their_scale_for_an_8_bit_cache(tmp_path: Path) -> None:
    with open_checkpoint(write_model(tmp_path / "model", GROUPED)) as model:
        spec = spec_of(model)
        plan, text = plan_of(spec, "q4_0", "awq"), text_of(spec)
        figures = round_model(model, plan, text, keep_values=True).figures
        assert {row.role for row in figures if row.scaled is None} == {"attn_output"}
        assert not [row for row in round_model(model, plan, text).figures if row.scaled is None]


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(write_model(tmp_path / "model", GROUPED)) as model:
        spec = spec_of(model)
        plan, text = plan_of(spec, "q4_0", "awq"), text_of(spec)
        whole = contents(round_model(model, plan, text).folder)
        monkeypatch.setenv("PHI3EDGE_CACHE", str(own_cache.with_name("second")))
        calls: list[str] = []

        def interrupted(*args: object) -> awq.Scales:
            calls.append("linear")
            if len(calls) == 6:  # in the middle of the second block
                raise KeyboardInterrupt
            return awq.search(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(scaling, "search", interrupted)
        with pytest.raises(KeyboardInterrupt):
            round_model(model, plan, text)
        resumed = round_model(model, plan, text)
    assert len(calls) == 6 + 4, "the first block is not scaled again"
    assert contents(resumed.folder) == whole
    assert sorted(whole) == sorted(["finished.json", *(t.name for t in spec.tensors if t.layer is not None)])


# ---- from the command line


def test_exported_norms_hold_the_scales_and_llama_cpp_computes_with_them(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", GROUPED)
    text = tmp_path / "words.txt"
    text.write_text(" ".join(np.random.default_rng(0).choice(["the", "quick", "brown", "fox", "sleeps"], 4000)))
    kl = {}
    for method in ("rtn", "awq", "awq+gptq"):
        out = tmp_path / method
        options = ["export", str(model), "--target", "cpu", "--format", "gguf", "--recipe", "q4_0", "--method", method]
        if method != "rtn":
            options += ["--calibration", str(text), "--sequences", "8"]
        done = CliRunner().invoke(app, [*options, "--no-validate", "--out", str(out)])
        assert done.exit_code == 0, done.output
        kl[method] = validate_artifact(out, protocol=Protocol(windows=Windows(2)))[0].metrics["kl_mean"].value
    assert kl["awq"] < kl["rtn"]
    assert kl["awq+gptq"] < kl["awq"]
    said = json.loads((tmp_path / "awq" / "phi3edge.json").read_text())["calibration"]
    assert sum(row["scaled"] is not None for row in said["linears"]) == 2 * 4
