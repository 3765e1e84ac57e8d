"""Phi-3.5-MoE rounded on a text: what it gains, what each expert is calibrated on, resuming, and memory."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from _moe import EXPERTS, HIDDEN, LAYERS, ORIGINAL, write_phimoe
from _tokenizers import corpus
from safetensors.torch import load_file, save_file

from phi3edge import calibrate, calibrate_mixture
from phi3edge.build import export
from phi3edge.calibrate import Rounded, round_model
from phi3edge.calibrate_mixture import LlamaCppDecoder, MixtureRun
from phi3edge.calibration import CalibrationText
from phi3edge.centring import Centred
from phi3edge.checkpoint import Checkpoint, open_checkpoint
from phi3edge.codecs import codec, is_float
from phi3edge.families import parse_config
from phi3edge.gguf_names import tensor_name
from phi3edge.methods.awq import Scales
from phi3edge.mixture import Mixture, load_mixture
from phi3edge.plan import make_plan
from phi3edge.recipes import load_recipe, with_method
from phi3edge.reference import load_tokenizer
from phi3edge.rounding import Rounding
from phi3edge.runners import llama_cpp, ort_genai
from phi3edge.statistics import LEAST_TOKENS
from phi3edge.types import QuantPlan

RECIPES = {"gguf": "q4_0", "onnx": "int4"}
RARE = 5
"""An expert of the first layer that few tokens choose."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_phimoe(tmp_path_factory.mktemp("model") / "tiny")
    tensors = load_file(folder / "model.safetensors")
    always = tensors["model.layers.0.post_attention_layernorm.bias"]  # part of all that the router reads
    tensors["model.layers.0.block_sparse_moe.gate.weight"][RARE] = -0.1 * always
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def checkpoint(model: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(model) as opened:
        yield opened


def plan_of(checkpoint: Checkpoint, format_: str, method: str = "gptq") -> QuantPlan:
    spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
    return make_plan(spec, RECIPES[format_], with_method(load_recipe(RECIPES[format_])[1], method))


def basis_of(checkpoint: Checkpoint, plan: QuantPlan, format_: str) -> Checkpoint | Centred:
    return Centred(checkpoint, plan.model) if format_ == "gguf" else checkpoint


def text_of(sequences: int, tokens: int, seed: int = 0) -> CalibrationText:
    rng = np.random.default_rng(seed)
    return CalibrationText((rng.random((sequences, tokens)) ** 2 * 320).astype(np.int64), "random tokens")


class Packed:
    """What an artifact holds, as weights: rounded by calibration, to nearest, or floats."""

    def __init__(self, source: Checkpoint | Centred, plan: QuantPlan, found: Rounded) -> None:
        self._source, self._found = source, found
        self._planned = {t.tensor.name: t for t in plan.tensors}

    def read(self, name: str) -> np.ndarray:
        planned, weight = self._planned[name], self._source.read(name)
        module = codec(planned.codec)
        packed = self._found.rows(planned, 0, len(weight) if weight.ndim == 2 else 1)
        if packed is not None:
            return module.dequantize(module.unpack(packed)).reshape(weight.shape)
        return weight if is_float(planned.codec) else module.dequantize(module.quantize(weight))


def packed_model(checkpoint: Checkpoint, plan: QuantPlan, format_: str, found: Rounded) -> Mixture:
    """An artifact in torch, computed as its runtime does."""
    made = Mixture(Packed(basis_of(checkpoint, plan, format_), plan, found), plan.model)
    if format_ == "gguf":
        made._decoder = LlamaCppDecoder(plan.model)
    return made


def divergence(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean KL of logits, in nats per token."""
    p, q = (x.log_softmax(-1) for x in (expected, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["gguf", "onnx"])
def test_calibrated_methods_are_nearer_to_the_reference_on_other_text(
    model: Path, tmp_path: Path, format_: str
) -> None:
    text = "".join(corpus())
    halves = tmp_path / "text.txt"
    halves.write_text(text[: len(text) // 2])
    ids = np.array(load_tokenizer(model)(text[len(text) // 2 :])["input_ids"])[:200]
    with torch.inference_mode():
        expected = load_mixture(model)(torch.from_numpy(ids)[None]).logits[0]
    kl = {}
    for method in ("rtn", "awq", "gptq", "awq+gptq"):
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
    assert kl["awq"] < 0.8 * kl["rtn"]
    assert max(kl["gptq"], kl["awq+gptq"]) < 0.6 * kl["rtn"]


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


@pytest.mark.parametrize("format_", ["gguf", "onnx"])
def test_an_experts_tokens_are_those_that_the_rounded_router_sends_to_it(checkpoint: Checkpoint, format_: str) -> None:
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
        chosen = found.expert_tokens[layer][expert]
        assert tokens == (chosen if chosen >= LEAST_TOKENS else text.ids.size)


def test_an_expert_that_few_tokens_chose_is_calibrated_on_all(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over a lazy dog " * 600)
    made = export(
        str(model), "cpu", format_="gguf", recipe="q4_0", out=tmp_path / "out", rounding=Rounding("gptq", str(text), 8)
    )
    said = json.loads((made.folder / "phi3edge.json").read_text())["calibration"]
    few = sum(count < LEAST_TOKENS for row in said["expert_tokens"] for count in row)
    assert said["expert_tokens"][0][RARE] < LEAST_TOKENS
    assert any(note.startswith(f"{few} of {LAYERS * EXPERTS} experts got fewer than") for note in made.notes)
    rows = {row["name"]: row for row in said["linears"]}
    for part in ("w1", "w2", "w3"):
        rare = rows[f"model.layers.0.block_sparse_moe.experts.{RARE}.{part}.weight"]
        assert rare["tokens"] == said["sequences"] * said["tokens"]
        assert 0 < rare["error"] < 0.05


@pytest.mark.parametrize("format_", ["gguf", "onnx"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_is_not_rounded_stays_the_model_whatever_the_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str, method: str
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
        found = round_model(basis_of(checkpoint, plan, format_), plan, text, run_class=MixtureRun)
        model = load_mixture(folder)
        expected = model(torch.from_numpy(text.ids)).logits
        for name in ("float", "rounded"):
            logits = model._linear(model.last_norm(kept[name]), "head")
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)
        for role in ("attn_q", "attn_v", "attn_output", "ffn_up", "ffn_down"):
            name = next(t.name for t in plan.model.tensors if t.role == role)
            changed = not torch.equal(kept[name], torch.from_numpy(basis_of(checkpoint, plan, format_).read(name)))
            assert changed == (method == "awq")
        written = {path.name for path in found.folder.iterdir()}
    floats = {t.name for t in plan.model.tensors if t.layer is not None and t.role.endswith(("norm", "bias", "router"))}
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


MEASURED = """
import resource, sys
from pathlib import Path
from test_phimoe_rounding import Centred, MixtureRun, open_checkpoint, plan_of, round_model, text_of

with open_checkpoint(Path(sys.argv[1])) as checkpoint:
    plan = plan_of(checkpoint, "gguf")
    round_model(Centred(checkpoint, plan.model), plan, text_of(2, 128), run_class=MixtureRun)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_memory_is_an_expert_and_its_moments_whatever_there_are(tmp_path: Path, own_cache: Path) -> None:
    width, peaks = 1536, []
    for experts in (2, 10):
        folder = write_phimoe(tmp_path / str(experts), num_local_experts=experts, intermediate_size=width)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        command = [sys.executable, "-c", MEASURED, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    more = 4 * LAYERS * 8 * 3 * width * HIDDEN  # bytes of the eight experts more in each layer, as floats
    assert peaks[1] - peaks[0] < more / 3
