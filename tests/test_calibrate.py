"""Rounding block by block: what it gains over plain rounding, how it resumes, and what it refuses."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _models import GROUPED, MHA, TIED, Shape, write_model

from phi3edge import calibrate
from phi3edge.calibrate import round_model
from phi3edge.calibration import CalibrationText
from phi3edge.checkpoint import Checkpoint, open_checkpoint
from phi3edge.codecs import codec, is_float, row_bytes
from phi3edge.errors import OutputError, UnsupportedError
from phi3edge.families import parse_config
from phi3edge.forward import LINEARS, Decoder
from phi3edge.progress import Advance
from phi3edge.rewrite import Rewritten
from phi3edge.types import ModelSpec, QuantPlan, TensorPlan


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(write_model(tmp_path / "model", GROUPED)) as opened:
        yield opened


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def spec_of(checkpoint: Checkpoint) -> ModelSpec:
    return parse_config(checkpoint.config, checkpoint.generation_config, "tiny")


def plan_of(spec: ModelSpec, linear: str, method: str = "gptq", head: str = "f32") -> QuantPlan:
    """The codec for the blocks' linears, another for the head, floats for the rest."""

    def planned(role: str) -> tuple[str, str]:
        chosen = linear if role in LINEARS else head if role == "head" else "f32"
        return chosen, "cast" if is_float(chosen) else method

    tensors = (TensorPlan(t, *planned(t.role), row_bytes(planned(t.role)[0], t.shape[-1])) for t in spec.tensors)
    return QuantPlan(spec, "test", tuple(tensors))


def text_of(spec: ModelSpec, sequences: int = 48, tokens: int = 32, seed: int = 0) -> CalibrationText:
    """Tokens of which a few are much more frequent than others."""
    rng = np.random.default_rng(seed)
    return CalibrationText((rng.random((sequences, tokens)) ** 3 * spec.vocab_size).astype(np.int64), "random tokens")


def logits(
    source: Checkpoint | Rewritten, plan: QuantPlan, rows: calibrate.Rounded | None, ids: np.ndarray
) -> torch.Tensor:
    """Of the model with its planned tensors as they were rounded: calibrated, to nearest, or not at all."""
    weights = {}
    for t in plan.tensors:
        weight = source.read(t.tensor.name)
        if rows is not None and (packed := rows.rows(t, 0, t.tensor.shape[0])) is not None:
            module = codec(t.codec)
            weight = module.dequantize(module.unpack(packed)).reshape(t.tensor.shape)
        elif not is_float(t.codec):
            module = codec(t.codec)
            weight = module.dequantize(module.quantize(weight))
        weights[t.tensor.role, t.tensor.layer] = torch.from_numpy(weight)
    decoder = Decoder(plan.model)
    h = weights["embedding", None][torch.from_numpy(ids)]
    for layer in range(plan.model.layers):
        h = decoder.block(h, {role: w for (role, n), w in weights.items() if n == layer})
    head = weights.get(("head", None), weights["embedding", None])
    return decoder.norm(h, weights["output_norm", None]) @ head.T


def divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL, in nats per token."""
    p, q = (torch.log_softmax(x, -1) for x in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("linear", ["q4_0", "q4_k", "uint4_b32", "iq4_nl"])
def test_it_loses_less_than_rounding_to_nearest(model: Checkpoint, linear: str) -> None:
    spec = spec_of(model)
    plan, text = plan_of(spec, linear, head="q8_0" if codec(linear).FORMATS == ("gguf",) else "int8_b32"), text_of(spec)
    ids = text_of(spec, seed=1).ids  # other sequences of the same kind
    with torch.inference_mode():
        basis = Rewritten(model, spec)
        exact = logits(model, plan_of(spec, "f32"), None, ids)
        calibrated = divergence(exact, logits(basis, plan, round_model(basis, plan, text), ids))
        nearest = divergence(exact, logits(model, plan, None, ids))
    assert calibrated < 0.8 * nearest


@pytest.mark.parametrize("shape", [MHA, TIED, Shape(dtype="float32")])
def test_every_shape_of_model_is_rounded(tmp_path: Path, shape: Shape) -> None:
    with open_checkpoint(write_model(tmp_path / "other", shape)) as other:
        spec = spec_of(other)
        plan = plan_of(spec, "q4_0", head="q8_0")
        found = round_model(Rewritten(other, spec), plan, text_of(spec))
        assert [row.name for row in found.figures] == [t.tensor.name for t in plan.tensors if t.method == "gptq"]
        for t in plan.tensors:
            if t.method == "gptq":
                assert found.rows(t, 1, 3).shape == (2, row_bytes(t.codec, t.tensor.shape[1]))
        assert all(0 < row.error < 0.1 for row in found.figures)


def test_a_weight_is_aimed_alike_whether_it_is_tall_or_wide() -> None:
    """And its output on the rounded model's inputs is nearer to what the float model's inputs gave."""
    generator = torch.Generator().manual_seed(0)
    x, other, weight = (torch.randn(*shape, generator=generator) for shape in ((400, 32), (400, 32), (96, 32)))
    y = x @ (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)) + 0.1 * other
    moments = calibrate.Moments(32, torch.device("cpu"))
    moments.add(x, y)
    aimed = moments.aim(weight)
    torch.testing.assert_close(aimed[:16], moments.aim(weight[:16]), rtol=0, atol=1e-4)
    lost, before = ((y @ w.T - x @ weight.T).square().mean() for w in (aimed, weight))
    assert lost < 0.3 * before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    model: Checkpoint, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(model)
    plan, text = plan_of(spec, "q4_0"), text_of(spec)
    whole = contents(round_model(Rewritten(model, spec), plan, text).folder)
    monkeypatch.setenv("PHI3EDGE_CACHE", str(own_cache.with_name("second")))
    calls: list[str] = []
    real = calibrate.Moments.aim

    def interrupted(self: calibrate.Moments, weight: torch.Tensor) -> torch.Tensor:
        calls.append("linear")
        if len(calls) == 6:  # in the middle of the second block
            raise KeyboardInterrupt
        return real(self, weight)

    monkeypatch.setattr(calibrate.Moments, "aim", interrupted)
    with pytest.raises(KeyboardInterrupt):
        round_model(Rewritten(model, spec), plan, text)
    resumed = round_model(Rewritten(model, spec), plan, text)
    assert len(calls) == 6 + 4, "the first block is not rounded again"
    assert contents(resumed.folder) == whole
    assert sorted(whole) == sorted(["finished.json", *(t.tensor.name for t in plan.tensors if t.method == "gptq")])


def test_a_finished_rounding_is_used_again_and_another_text_is_another(
    model: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(model)
    plan, basis = plan_of(spec, "q4_0"), Rewritten(model, spec)
    first = round_model(basis, plan, text_of(spec))
    other = round_model(basis, plan, text_of(spec, seed=5))
    assert other.folder != first.folder
    monkeypatch.setattr(calibrate.Run, "step", lambda self: pytest.fail("it was finished"))
    again = round_model(basis, plan, text_of(spec))
    assert again == first
    assert json.loads((again.folder / "finished.json").read_text())["steps"] == spec.layers + 1


def test_two_that_would_round_the_same_do_it_once(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(model)
    plan, basis, text = plan_of(spec, "q4_0"), Rewritten(model, spec), text_of(spec)
    told: list[str] = []
    waits, steps, step = threading.Event(), [], calibrate.Run.step

    @contextmanager
    def stages(name: str, total: int | None = None) -> Iterator[Advance]:
        told.append(name)
        if name.startswith("wait"):
            waits.set()
        yield lambda units: None

    def counted(self: calibrate.Run) -> None:
        assert steps or len(told) == 1  # in the first step of the first one, the second one comes
        if not steps:
            second.start()
            assert waits.wait(60)
        steps.append(self.finished)
        step(self)

    monkeypatch.setattr(calibrate.Run, "step", counted)
    found: list[calibrate.Rounded] = []
    second = threading.Thread(target=lambda: found.append(round_model(basis, plan, text, stages=stages)))
    first = round_model(basis, plan, text, stages=stages)
    second.join()
    assert found == [first]
    assert steps == list(range(spec.layers + 1))
    assert told == ["calibrate", "wait for another process that rounds the same", "calibrate"]


def test_what_is_at_work_is_not_pruned(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(model)
    plan, basis = plan_of(spec, "q4_0"), Rewritten(model, spec)
    monkeypatch.setattr(calibrate, "KEPT_BYTES", 1)
    first = round_model(basis, plan, text_of(spec))
    os.utime(first.folder, (0, 0))
    with calibrate._lock(first.folder):
        second = round_model(basis, plan, text_of(spec, seed=5))
        assert first.folder.exists()
    (second.folder / "hidden-0-float").touch()  # as if it had been interrupted
    os.utime(second.folder, (time.time() - 2 * calibrate.FRESH,) * 2)
    (first.folder.parent / "no folder").touch()
    third = round_model(basis, plan, text_of(spec, seed=6))
    assert not first.folder.exists()
    assert second.folder.exists()
    os.utime(second.folder, (0, 0))
    round_model(basis, plan, text_of(spec, seed=7))
    assert not second.folder.exists()
    assert third.folder.exists(), "an export may be reading it"


def test_weights_that_give_no_numbers_are_refused_by_name(model: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(spec_of(model), norm_eps=float("nan"))
    plan = replace(plan_of(spec, "q4_0"), model=spec)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0\.self_attn\.qkv_proj\.weight.*not finite"):
        round_model(Rewritten(model, spec), plan, text_of(spec))


def test_a_cache_that_cannot_be_written_is_one_clear_line(model: Checkpoint, own_cache: Path) -> None:
    spec = spec_of(model)
    own_cache.mkdir()
    (own_cache / "rounded").write_text("a file in the way")
    with pytest.raises(OutputError, match="cannot keep the rounded model"):
        round_model(Rewritten(model, spec), plan_of(spec, "q4_0"), text_of(spec))
