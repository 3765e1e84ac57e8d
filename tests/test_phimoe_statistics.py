"""Statistics of a mixture of experts: each expert's of the tokens that chose it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from _moe import EXPERTS, LAYERS, ORIGINAL, write_phimoe

from phi3edge import collect as collecting
from phi3edge.build import export
from phi3edge.checkpoint import open_checkpoint
from phi3edge.collect import calibrate, collect
from phi3edge.errors import UnsupportedError
from phi3edge.families import parse_config
from phi3edge.imatrix import linears, read_imatrix
from phi3edge.reference import _transformers
from phi3edge.rounding import Rounding
from phi3edge.statistics import IMATRIX_NAME, LEAST_TOKENS, finish_folder, load_statistics

IDS = np.random.default_rng(0).integers(0, 320, (6, 64))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint with one expert that few tokens choose: another one's score is twice its own."""
    folder = write_phimoe(tmp_path_factory.mktemp("model") / "tiny")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    gate = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    gate[5] = 0.4 * gate[4]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("statistics") / "out"
    with open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        collect(checkpoint, spec, IDS, out)
        finish_folder(out, spec, "random", IDS, False)
    return out


def spec_of(model: Path):
    return parse_config(json.loads((model / "config.json").read_text()), None, "tiny")


def test_they_are_the_means_of_what_transformers_experts_see(model: Path, folder: Path) -> None:
    theirs = _transformers().PhimoeForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}
    for n, layer in enumerate(theirs.model.layers):
        layer.self_attn.q_proj.register_forward_hook(lambda m, i, o, n=n: seen.__setitem__(f"attn.{n}", i[0]))
        layer.mlp.experts.register_forward_hook(lambda m, i, o, n=n: seen.__setitem__(f"experts.{n}", i))
    with torch.inference_mode():
        theirs(torch.from_numpy(IDS))
    found = load_statistics(folder, spec_of(model))
    for n in range(LAYERS):
        x, index, _ = seen[f"experts.{n}"]
        expected = seen[f"attn.{n}"].square().mean((0, 1)).numpy()
        for part in "qkv":
            np.testing.assert_allclose(found[f"model.layers.{n}.self_attn.{part}_proj.weight"].squares, expected, 1e-4)
        assert found.expert_tokens[n] == [int((index == e).any(-1).sum()) for e in range(EXPERTS)]
        for expert in range(EXPERTS):
            name = f"model.layers.{n}.block_sparse_moe.experts.{expert}."
            chose = x[(index == expert).any(-1)]
            if len(chose) < LEAST_TOKENS:
                assert name + "w1.weight" not in found
                continue
            assert found[name + "w1.weight"].tokens == len(chose)
            np.testing.assert_allclose(found[name + "w3.weight"].squares, chose.square().mean(0).numpy(), 1e-4)
            gate, up = (theirs.model.layers[n].mlp.experts.gate_up_proj[expert] @ chose.T).chunk(2)
            mixed = (torch.nn.functional.silu(gate) * up).detach()
            np.testing.assert_allclose(found[name + "w2.weight"].squares, mixed.square().mean(1).numpy(), 2e-4)


def test_an_expert_that_few_tokens_chose_is_rounded_without(model: Path, folder: Path) -> None:
    found = load_statistics(folder, spec_of(model))
    assert sum(found.expert_tokens[0]) == 2 * IDS.size
    few = sum(count < LEAST_TOKENS for counts in found.expert_tokens for count in counts)
    assert few >= 1
    assert any(f"{few} of {LAYERS * EXPERTS} experts saw too few tokens" in note for note in found.notes)
    assert not any("gate.weight" in name for name in found)  # the router is not rounded


def test_the_importance_matrix_has_a_row_for_each_expert(model: Path, folder: Path) -> None:
    from gguf import GGUFReader

    spec, found = spec_of(model), load_statistics(folder, spec_of(model))
    tensors = {t.name: t.data for t in GGUFReader(folder / IMATRIX_NAME).tensors}
    assert tensors["blk.1.ffn_down_exps.weight.in_sum2"].shape[0] == EXPERTS
    counts = tensors["blk.1.ffn_down_exps.weight.counts"].reshape(-1).tolist()
    assert counts == [n if n >= LEAST_TOKENS else 0 for n in found.expert_tokens[1]]
    read = read_imatrix(folder / IMATRIX_NAME, spec).statistics
    assert set(read) == set(found) == {t.name for t in linears(spec) if t.name in found}
    for name, one in read.items():
        assert one.tokens == found[name].tokens
        np.testing.assert_allclose(one.squares, found[name].squares, rtol=1e-5)


def test_batches_do_not_change_them(model: Path, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(collecting._MixtureRun, "BATCH", 128)
    with open_checkpoint(model) as checkpoint:
        spec = spec_of(model)
        collect(checkpoint, spec, IDS, tmp_path / "out")
        other = finish_folder(tmp_path / "out", spec, "random", IDS, False)
    found = load_statistics(folder, spec)
    assert other.expert_tokens == found.expert_tokens
    for name, one in found.items():
        np.testing.assert_allclose(other[name].squares, one.squares, rtol=1e-4, atol=1e-9)


def test_an_export_uses_them_and_says_how_many_tokens_each_expert_saw(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    options = {"format_": "gguf", "recipe": "q4_k_m", "context": ORIGINAL}
    plain = export(str(model), "cpu", out=tmp_path / "plain", **options)
    made = export(str(model), "cpu", out=tmp_path / "out", rounding=Rounding(statistics=folder), **options)
    assert plain.artifact.read_bytes() != made.artifact.read_bytes()
    manifest = json.loads((made.folder / "phi3edge.json").read_text())
    assert manifest["calibration"]["expert_tokens"] == load_statistics(folder, spec_of(model)).expert_tokens
    assert any("experts saw too few tokens" in note for note in made.notes)


def test_what_is_not_collected_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="does not write its own text"):
        calibrate(str(model), out=tmp_path / "out")
    with pytest.raises(UnsupportedError, match="second moments"):
        calibrate(str(model), calibration="python", moments=True, out=tmp_path / "out")
