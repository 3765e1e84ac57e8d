"""A reference that does not fit into memory: its weights stay in the files, and its figures are the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
from _models import GROUPED, MHA, TIED, Shape, write_model
from _prequantized import GPTQ, write_prequantized
from _small import write_small
from _vision import write_vision
from safetensors.torch import load_file, save_file
from test_longrope import longrope

from phi3edge import machine, reference, stored
from phi3edge.errors import CheckpointError, UsageError
from phi3edge.phi3small import load_phi3small
from phi3edge.reference import Wanted, load_model, reference_pass

KINDS = {
    "window": (MHA, {"sliding_window": 20}),
    "grouped, longrope": (GROUPED, longrope(pairs=32)),
    "tied, partial": (TIED, {"partial_rotary_factor": 0.5}),
    "float32": (Shape(dtype="float32"), {}),
}


def ids(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, count)))


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 102_400)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits_bit_for_bit(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, changes = KINDS[kind]
    folder = write_model(tmp_path / "model", shape, shards=2, **changes)
    whole = load_model(folder)
    monkeypatch.setattr(machine, "free_memory", lambda: 102_400)
    read = load_model(folder)
    assert not any(isinstance(module, stored.StoredLinear) for module in whole.modules())
    linears = [module for module in read.modules() if isinstance(module, stored.StoredLinear)]
    assert len(linears) == 4 * shape.layers + 1
    assert {str(module.weight.dtype) for module in linears} == {f"torch.{shape.dtype}"}
    with torch.inference_mode():
        assert torch.equal(read(ids(300)).logits, whole(ids(300)).logits)
        prompts = [ids(count)[0].tolist() for count in (7, 250, 3)]  # across the original context of 256, with a cache
        for prompt in prompts:
            assert reference._greedy(read, [prompt], 12, ()) == reference._greedy(whole, [prompt], 12, ())


def test_answers_side_by_side_are_those_of_one_at_a_time(tmp_path: Path) -> None:
    for kind, (shape, changes) in KINDS.items():
        model = load_model(write_model(tmp_path / kind, shape, **changes))
        prompts = [ids(count)[0].tolist() for count in (7, 41, 3, 23)]
        with torch.inference_mode():
            alone = [reference._greedy(model, [prompt], 12, ())[0] for prompt in prompts]
            stop = {alone[0][0][4], alone[2][0][11]}  # ends some of them, one at its last token
            for ends in ((), stop):
                expected = [reference._greedy(model, [prompt], 12, ends)[0] for prompt in prompts]
                assert reference._greedy(model, prompts, 12, ends) == expected
        assert len({tuple(answer) for answer, _ in alone}) == len(prompts)


def test_a_weight_is_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, x = torch.randn(50, 32).bfloat16(), torch.randn(50), torch.randn(2, 3, 32)
    expected = torch.nn.functional.linear(x, weight.float(), bias)
    seen: list[int] = []
    widen = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda self: (seen.append(self.numel()), widen(self))[1])
    monkeypatch.setattr(stored, "PART", 7 * 32 + 5)
    torch.testing.assert_close(stored.StoredLinear(weight, bias)(x), expected)
    assert seen == [7 * 32] * 7 + [32]


def test_a_pass_says_so_and_gives_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", GROUPED)
    wanted = Wanted(ids(64).view(2, 32).numpy(), 16, [[1, 2, 3], [4, 5]], 5, [])
    told: list[str] = []

    class Stage:
        def __init__(self, name: str, total: int | None = None) -> None:
            told.append(name)

        def __enter__(self):
            return lambda units: None

        def __exit__(self, *raised) -> None:
            pass

    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "one"))
    whole = reference_pass(folder, wanted, Stage)
    monkeypatch.setattr(machine, "free_memory", lambda: 102_400)
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "two"))
    read = reference_pass(folder, wanted, Stage)
    assert told[0] == "load reference"
    [opened] = [name for name in told if name.startswith("open")]
    assert opened == "open reference: 5.38 MB would fill the free memory, so each step reads its files"
    np.testing.assert_array_equal(read.text_log_probs, whole.text_log_probs)
    assert (read.greedy, read.ended) == (whole.greedy, whole.ended)


def test_tensors_for_images_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_vision(tmp_path / "model", shards=2)
    with torch.inference_mode():
        expected = load_model(folder)(ids(30)).logits
        monkeypatch.setattr(machine, "free_memory", lambda: 102_400)
        assert torch.equal(load_model(folder)(ids(30)).logits, expected)


def test_small_reads_its_blocks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_small(tmp_path / "model")
    with torch.inference_mode():
        expected = load_phi3small(folder)(ids(30)).logits
        monkeypatch.setattr(machine, "free_memory", lambda: 102_400)
        read = load_phi3small(folder)
        assert read._blocks is None
        assert torch.equal(read(ids(30)).logits, expected)


@pytest.mark.usefixtures("no_memory")
def test_integers_need_memory(tmp_path: Path) -> None:
    write_prequantized(tmp_path / "model", GPTQ)
    with pytest.raises(UsageError, match=r"needs about .* MB of memory, 102 kB are free"):
        load_model(tmp_path / "model")


@pytest.mark.usefixtures("no_memory")
def test_only_the_files_of_the_checkpoint_count(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", GROUPED)
    with torch.inference_mode():
        expected = load_model(folder)(ids(30)).logits
        write_model(tmp_path / "other", GROUPED, seed=1)
        (tmp_path / "other" / "model.safetensors").rename(folder / "old.safetensors")
        assert torch.equal(load_model(folder)(ids(30)).logits, expected)


@pytest.mark.usefixtures("no_memory")
def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", GROUPED)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'model\.norm\.weight' is missing"):
        load_model(folder)
