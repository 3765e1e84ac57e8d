"""Phi-3.5-MoE under a byte budget: gradients, predicted losses against what rounding does, and exports that keep it."""

import itertools
import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from _moe import EXPERTS, HIDDEN, INTERMEDIATE, LAYERS, ORIGINAL, VOCAB, phimoe_config, phimoe_tensors, write_phimoe
from torch import Tensor

from phi3edge.budget import Budget
from phi3edge.build import export, prepare
from phi3edge.centring import Centred
from phi3edge.checkpoint import Checkpoint, open_checkpoint
from phi3edge.codecs import codec
from phi3edge.errors import UnsupportedError
from phi3edge.families import parse_config
from phi3edge.forward import Readable
from phi3edge.mixture import LlamaCppDecoder, Mixture, MixtureDecoder
from phi3edge.mixture_backward import Backward
from phi3edge.rounding import Rounding
from phi3edge.sensitivity import predict_losses
from phi3edge.types import ModelSpec
from phi3edge.validate import Windows, validate

SEQUENCES, TOKENS, UNSEEN = 16, 32, 5
JITTER = 0.1  # then every third token's experts share a weight
WORDS = ["rivers", "stones", "letters", "engines", "gardens", "winters", "markets", "ladders"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with one expert that no token of layer 0 chooses."""
    from safetensors.torch import load_file, save_file

    folder = write_phimoe(tmp_path_factory.mktemp("model") / "tiny", router_jitter_noise=JITTER)
    tensors = load_file(folder / "model.safetensors")
    bias = tensors["model.layers.0.post_attention_layernorm.bias"]
    bias *= 3
    tensors["model.layers.0.block_sparse_moe.gate.weight"][UNSEEN] = -bias
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(". ".join(" ".join(words) for words in itertools.permutations(WORDS, 4)))
    return str(path)


def spec_of(checkpoint: Checkpoint) -> ModelSpec:
    return parse_config(checkpoint.config, checkpoint.generation_config, "tiny")


def some_ids(seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (SEQUENCES, TOKENS))


class Changed:
    """A source with some tensors of its own."""

    def __init__(self, source: Readable, changes: Mapping[str, np.ndarray]) -> None:
        self._source, self._changes = source, changes

    def read(self, name: str) -> np.ndarray:
        return self._changes[name] if name in self._changes else self._source.read(name)


class Held(MixtureDecoder):
    """Keeps to the experts that each token chose in the first pass, and to their weights."""

    def __init__(self, inner: MixtureDecoder) -> None:
        super().__init__(inner.spec)
        self._inner, self._seen, self._calls = inner, [], 0

    def layer_norm(self, h: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return self._inner.layer_norm(h, gain, bias)

    def route(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        if self._calls < LAYERS:
            self._seen.append(self._inner.route(scores))
        self._calls += 1
        return self._seen[(self._calls - 1) % LAYERS]


@pytest.mark.parametrize("for_file", [False, True], ids=["as the checkpoint means it", "as llama.cpp computes it"])
def test_gradients_are_those_of_the_whole_block(model: Path, for_file: bool) -> None:
    with open_checkpoint(model) as checkpoint:
        spec, layer = spec_of(checkpoint), 1
        source = Centred(checkpoint, spec) if for_file else checkpoint
        decoder = (LlamaCppDecoder if for_file else MixtureDecoder)(spec)
        forward = Mixture(source, spec, True, decoder)
        generator = torch.Generator().manual_seed(0)
        h, after = (torch.randn(2, 24, HIDDEN, generator=generator) for _ in range(2))
        if for_file:
            h -= h.mean(-1, keepdim=True)
        seen = {}

        def watch(role: str, expert: int | None, *found: Tensor) -> None:
            seen[role, expert] = found

        gradient = Backward(source, spec, decoder).block(h, layer, after, watch)
        whole = h.clone().requires_grad_()
        out, weights = forward.block(whole, layer)
        out.backward(after)
        torch.testing.assert_close(gradient, whole.grad, rtol=1e-4, atol=1e-4)
        assert for_file or 0.1 < (weights < 1).any(-1).float().mean() < 0.9  # the router has a gradient
        names = {(t.role, t.expert): t.name for t in spec.tensors if t.layer == layer}
        assert set(seen) == {
            (role, n)
            for role, n in names
            if role.startswith(("attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down"))
            and not role.endswith("bias")
        }
        for (role, expert), (weight, x, g, sequences) in seen.items():
            assert x.shape == (len(sequences), weight.shape[1])
            assert g.shape == (len(sequences), weight.shape[0])
            change, step = torch.randn(weight.shape, generator=generator), 3e-5  # too small to change a choice
            moved = [
                Mixture(
                    Changed(source, {names[role, expert]: (weight + sign * step * change).numpy()}), spec, True, decoder
                )
                for sign in (1, -1)
            ]
            with torch.inference_mode():
                ends = [float((one.block(h, layer)[0].double() * after).sum()) for one in moved]
            expected = (ends[0] - ends[1]) / (2 * step)
            assert float((g * (x @ change.T)).sum()) == pytest.approx(expected, rel=0.03, abs=0.3), (role, expert)


@pytest.mark.parametrize("for_file", [False, True], ids=["as the checkpoint means it", "as llama.cpp computes it"])
def test_predictions_are_near_what_rounding_does_while_choices_stay(model: Path, for_file: bool) -> None:
    with open_checkpoint(model) as checkpoint:
        spec, ids = spec_of(checkpoint), some_ids()
        source = Centred(checkpoint, spec) if for_file else checkpoint
        held = Held((LlamaCppDecoder if for_file else MixtureDecoder)(spec))
        names = [t.name for t in spec.tensors if len(t.shape) == 2 and t.role != "router"]
        found = predict_losses(source, spec, ids, dict.fromkeys(names, ("q4_k",)))
        assert set(found) == set(names)

        @torch.inference_mode()
        def log_probs(which: list[str]) -> Tensor:
            module = codec("q4_k")
            changes = {name: module.dequantize(module.quantize(source.read(name))) for name in which}
            model = Mixture(Changed(source, changes), spec, False, held)
            return model(torch.from_numpy(ids)).logits.log_softmax(-1)

        exact = log_probs([])
        for t in spec.tensors:
            if t.name not in names or t.expert not in (None, 1, UNSEEN):
                continue
            truth = float((exact.exp() * (exact - log_probs([t.name]))).sum(-1).mean())
            predicted = found[t.name]["q4_k"]
            if (t.layer, t.expert) == (0, UNSEEN):  # no token chose it: its siblings' losses are of all tokens
                assert predicted == truth == 0
            else:
                assert truth / 2 < predicted < truth * 2, t.name


@pytest.mark.parametrize(("format_", "recipe"), [("gguf", "q4_0"), ("onnx", "int4")])
def test_an_export_keeps_its_budget_and_is_better_than_one_codec(
    model: Path, text: str, tmp_path: Path, format_: str, recipe: str
) -> None:
    pytest.importorskip("onnxruntime_genai" if format_ == "onnx" else "llama_cpp")
    options = {"format_": format_, "context": ORIGINAL}
    plain = export(str(model), "cpu", recipe=recipe, out=tmp_path / "plain", **options)
    budget = sum(path.stat().st_size for path in plain.files)
    rounding = Rounding(calibration=text)
    made = export(str(model), "cpu", budget=Budget(bytes=budget), rounding=rounding, out=tmp_path / "out", **options)
    assert 0.97 * budget < sum(path.stat().st_size for path in made.files) <= budget
    plan = made.prepared.plan
    codecs: dict[tuple[str, int | None], set[str]] = {}
    for t in plan.tensors:
        codecs.setdefault((t.tensor.role, t.tensor.layer), set()).add(t.codec)
    assert all(len(taken) == 1 for taken in codecs.values())  # of all experts
    assert len(set().union(*codecs.values())) > 3  # a mix indeed
    assert any("no changed choice of experts" in note for note in made.notes)
    assert plan.predicted_kl == pytest.approx(sum(t.predicted_kl or 0 for t in plan.tensors))
    kl = [
        validate(one.artifact, model, windows=Windows(2), threads=1)[0].metrics["kl_mean"].value
        for one in (made, plain)
    ]
    assert kl[0] < 0.7 * kl[1]


def test_its_own_text_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(phimoe_config()))  # there is nothing else
    for calibration in (None, "self", "self+python"):
        rounding = Rounding(calibration=calibration)
        for limit in ({"budget": Budget(bytes=10**6)}, {"budget": Budget(bits_per_weight=4.5)}):
            with pytest.raises(UnsupportedError, match="does not write its own text") as error:
                prepare(str(tmp_path), "cpu", format_="gguf", rounding=rounding, **limit)
            assert error.value.hint == "--calibration python, or a FILE"
    rounding = Rounding(calibration="python", device="cuda")
    with pytest.raises(UnsupportedError, match="--device cuda"):
        prepare(str(tmp_path), "cpu", format_="gguf", rounding=rounding, budget=Budget(bytes=10**7))


def test_weights_of_a_few_experts_are_in_memory(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    experts = 32
    folder = write_phimoe(tmp_path / "model", num_local_experts=experts)
    tensors, generator = phimoe_tensors(), torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{block}.gate.weight"] = torch.randn(experts, HIDDEN, generator=generator) / 16
        for expert in range(EXPERTS, experts):
            for part in ("w1", "w2", "w3"):
                tensors[f"{block}.experts.{expert}.{part}.weight"] = tensors[f"{block}.experts.0.{part}.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(folder) as checkpoint:
        spec = spec_of(checkpoint)
        tried = {t.name: ("q4_0",) for t in spec.tensors if t.expert is not None}
        predict_losses(checkpoint, spec, some_ids()[:2], tried)  # compiles
        tracemalloc.start()
        predict_losses(checkpoint, spec, some_ids()[:2], tried)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    expert = 3 * HIDDEN * INTERMEDIATE * 4
    assert peak < 5 * expert < experts * expert / 6
