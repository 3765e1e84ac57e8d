"""Phi-3.5-MoE rounded block by block: what each expert is calibrated on, exact scales, resuming, and memory."""

import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _moe import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    basis_of,
    packed_model,
    plan_of,
    text_of,
    write_phimoe,
    write_with_rare,
)

from phi3edge import calibrate, calibrate_mixture
from phi3edge.calibrate import round_model
from phi3edge.calibrate_mixture import TOKENS_PER_COLUMN, MixtureRun
from phi3edge.centring import Centred
from phi3edge.checkpoint import Checkpoint, open_checkpoint
from phi3edge.codecs import is_float
from phi3edge.methods.awq import Scales
from phi3edge.mixture import load_mixture


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_with_rare(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def checkpoint(model: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(model) as opened:
        yield opened


@pytest.mark.parametrize("format_", ["gguf", "onnx"])
def test_an_expert_sees_what_the_rounded_router_sends_to_it_and_others_where_that_is_few(
    checkpoint: Checkpoint, format_: str
) -> None:
    plan, text = plan_of(checkpoint, format_), text_of(6, 256)
    with torch.inference_mode():
        found = round_model(basis_of(checkpoint, plan, format_), plan, text, run_class=MixtureRun)
        made = packed_model(checkpoint, plan, format_, found)
        h = made.embed(torch.from_numpy(text.ids))
        for layer in range(LAYERS):
            counts: Counter[int] = Counter()
            h, _ = made.block(
                h, layer, lambda role, n, x, c=counts: c.update({n: len(x)} if role == "ffn_gate" else {})
            )
            seen = np.array([counts[n] for n in range(EXPERTS)])
            np.testing.assert_allclose(found.expert_tokens[layer], seen, atol=1)
    assert np.sum(found.expert_tokens, 1).tolist() == [2 * text.ids.size] * LAYERS
    rows = {(row.role, row.name): row.tokens for row in found.figures if "experts" in row.name}
    for (_, name), tokens in rows.items():
        layer, expert = int(name.split(".")[2]), int(name.split(".")[5])
        columns = HIDDEN if ".w2." not in name else INTERMEDIATE
        assert tokens == min(max(found.expert_tokens[layer][expert], TOKENS_PER_COLUMN * columns), text.ids.size)


@pytest.mark.parametrize("format_", ["gguf", "onnx"])
@pytest.mark.parametrize(("method", "attention"), [("gptq", True), ("awq", True), ("awq", False)])
def test_what_is_not_rounded_stays_the_model_whatever_the_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str, method: str, attention: bool
) -> None:
    """With scales from a random generator, and a router that never shares a weight, which llama.cpp cannot."""
    folder = write_phimoe(tmp_path / "sharp", router_jitter_noise=1e-9)
    random = np.random.default_rng(0)

    def scales(spec, planned, weight, sums, role) -> Scales:
        size = spec.kv_heads * spec.head_dim if role == "attn_output" else weight.shape[1]
        return Scales(np.exp(random.normal(0, 1, size)).astype(np.float32), 0.5)

    kept: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(calibrate_mixture, "find_scale", scales)
    monkeypatch.setattr(MixtureRun, "_round_alone", lambda self, planned, weight: weight)
    monkeypatch.setattr(MixtureRun, "_round_head", lambda self: kept.update(states(self)) or [])
    monkeypatch.setattr(
        MixtureRun,
        "_round",
        lambda self, planned, weight, moments: kept.update({planned.tensor.name: weight}) or (weight, []),
    )
    text = text_of(2, 128)

    def states(run: MixtureRun) -> dict[str, torch.Tensor]:
        return {n: run._states(f"hidden-{LAYERS}-{n}", HIDDEN).read(slice(0, 2)) for n in ("float", "rounded")}

    with open_checkpoint(folder) as checkpoint, torch.inference_mode():
        plan = plan_of(checkpoint, format_, method)
        if not attention:  # its linears stay float
            as_they_are = {"codec": "f32", "method": "cast"}
            tensors = (replace(t, **as_they_are if "self_attn" in t.tensor.name else {}) for t in plan.tensors)
            plan = replace(plan, tensors=tuple(tensors))
        found = round_model(basis_of(checkpoint, plan, format_), plan, text, run_class=MixtureRun)
        model = load_mixture(folder)
        expected = model(torch.from_numpy(text.ids)).logits
        for name in ("float", "rounded"):
            logits = model._linear(model.last_norm(kept[name]), "head")
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)
        for role in ("attn_q", "attn_v", "attn_output", "ffn_up", "ffn_down"):
            name = next(t.name for t in plan.model.tensors if t.role == role)
            changed = not torch.equal(kept[name], torch.from_numpy(basis_of(checkpoint, plan, format_).read(name)))
            assert changed == (method == "awq" and (attention or role.startswith("ffn")))
        written = {path.name for path in found.folder.iterdir()}
    floats = {t.tensor.name for t in plan.tensors if t.tensor.layer is not None and is_float(t.codec)}
    assert written - {"finished.json"} == (floats if method == "awq" else set())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    checkpoint: Checkpoint, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, text = plan_of(checkpoint, "gguf", "awq+gptq"), text_of(4, 128)
    whole = contents(round_model(Centred(checkpoint, plan.model), plan, text, run_class=MixtureRun).folder)
    monkeypatch.setenv("PHI3EDGE_CACHE", str(own_cache.with_name("second")))
    calls: list[int] = []
    real, block = calibrate.Moments.aim, 4 + 3 * EXPERTS

    def interrupted(self: calibrate.Moments, weight: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == block + 10:  # among the second layer's experts
            raise KeyboardInterrupt
        return real(self, weight)

    monkeypatch.setattr(calibrate.Moments, "aim", interrupted)
    with pytest.raises(KeyboardInterrupt):
        round_model(Centred(checkpoint, plan.model), plan, text, run_class=MixtureRun)
    resumed = round_model(Centred(checkpoint, plan.model), plan, text, run_class=MixtureRun)
    assert len(calls) == block + 10 + block + 1, "the first block is not rounded again; the head is"
    assert contents(resumed.folder) == whole
    assert len(resumed.expert_tokens) == LAYERS


@pytest.fixture
def only_new() -> Iterator[None]:
    """The garbage collector knows only of what is made from here on."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes() -> int:
    """Of all tensors that there are, and that the garbage collector knows of."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.usefixtures("only_new")
def test_memory_is_an_expert_and_its_moments_whatever_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors that are alive when a linear is rounded; what is made and gone within that depends on it alone."""
    found: list[int] = []
    real, peaks = calibrate.Moments.aim, []

    def watched(self: calibrate.Moments, weight: torch.Tensor) -> torch.Tensor:
        found.append(live_bytes())
        return real(self, weight)

    monkeypatch.setattr(calibrate.Moments, "aim", watched)
    for experts in (2, 10):
        found.clear()
        with open_checkpoint(write_phimoe(tmp_path / str(experts), num_local_experts=experts)) as checkpoint:
            plan = plan_of(checkpoint, "gguf", "awq+gptq")
            round_model(Centred(checkpoint, plan.model), plan, text_of(2, 128), run_class=MixtureRun)
        assert len(found) == LAYERS * (4 + 3 * experts) + 1
        peaks.append(max(found))
    matrix = 4 * INTERMEDIATE * HIDDEN
    assert peaks[1] - peaks[0] < matrix / 4  # rows of the router
    assert peaks[1] < 10 * 3 * matrix / 2
