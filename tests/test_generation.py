"""Text that a model writes: its logits against transformers', and how rows are filled."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _models import GROUPED, MHA, TIED, Shape, write_model
from _small import ORIGINAL, SMALL, Small, longrope, write_small

from phi3edge.calibration import calibration_text
from phi3edge.checkpoint import open_checkpoint
from phi3edge.errors import UsageError
from phi3edge.families import parse_config
from phi3edge.generation import TEMPERATURE, Cache, Fit, choose, fit, generate, load, step
from phi3edge.phi3small import decoder_of
from phi3edge.reference import load_model
from phi3edge.types import ModelSpec

TOKENS = 40


def _logits(folder: Path, ids: torch.Tensor, begins: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of every position, one after the other; rows look back at what lies before `begins` only until they are there."""
    found = []
    with torch.inference_mode(), open_checkpoint(folder) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        decoder, device = decoder_of(spec), torch.device("cpu")
        outer = load(checkpoint, spec, None, dtype, device)
        blocks = [load(checkpoint, spec, n, dtype, device) for n in range(spec.layers)]
        cache = Cache(decoder, *ids.shape, dtype)
        for position in range(ids.shape[1]):
            h = decoder.embed(outer["embedding"][ids[:, position]].float())
            since = torch.tensor([begin if position >= begin else 0 for begin in begins])
            for layer, weights in enumerate(blocks):
                h = step(cache, h, layer, weights, position, since)
            found.append(decoder.logits(decoder.normed("output_norm", h, outer), outer))
    return torch.stack(found, 1)


@pytest.mark.parametrize("shape", [MHA, GROUPED, TIED], ids=["mha", "grouped", "tied"])
@pytest.mark.parametrize("window", [None, 15], ids=["full", "window"])
def test_token_by_token_gives_the_logits_of_transformers(tmp_path: Path, shape: Shape, window: int | None) -> None:
    folder = write_model(tmp_path / "model", shape, sliding_window=window)
    ids = torch.randint(0, shape.vocab, (3, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = load_model(folder)(ids).logits
    torch.testing.assert_close(_logits(folder, ids, [0, 0, 0]), expected, rtol=0, atol=2e-4)


def test_a_text_sees_nothing_of_the_one_before_it_in_its_row(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", GROUPED)
    ids = torch.randint(0, GROUPED.vocab, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        model = load_model(folder)
        alone = model(ids[1:, 17:]).logits[0]
        together = model(ids[1:]).logits[0, 17:]
    found = _logits(folder, ids, [0, 17])[1, 17:]
    torch.testing.assert_close(found, alone, rtol=0, atol=2e-4)
    assert (found - together).abs().max() > 0.1


@pytest.mark.parametrize("shape", [SMALL, Small(tied=False)], ids=["tied", "untied"])
@pytest.mark.parametrize("changes", [{}, longrope()], ids=["8k", "128k"])
def test_a_block_sparse_model_gives_the_logits_of_its_reference(tmp_path: Path, shape: Small, changes: dict) -> None:
    """Also of a text within a row: its blocks are counted from its own beginning."""
    folder, begin = write_small(tmp_path / "model", shape, **changes), 37
    ids = torch.randint(0, shape.vocab, (2, 3 * TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        model = load_model(folder)
        first, alone = model(ids[:1]).logits[0], model(ids[1:, begin:]).logits[0]
    found = _logits(folder, ids, [0, begin])
    assert (first == torch.finfo(torch.float32).min).sum() == 3 * len(first)  # tokens that stand for nothing
    torch.testing.assert_close(found[0], first, rtol=0, atol=2e-4)
    torch.testing.assert_close(found[1, begin:], alone, rtol=0, atol=2e-4)


def test_a_block_sparse_model_writes_its_own_calibration_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path / "cache"))
    folder = write_small(tmp_path / "model", **longrope())
    with open_checkpoint(folder) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        text = calibration_text(None, folder, spec, 2, ORIGINAL + 44)  # in two rows each
        assert text.name.startswith("written by the model itself")
        assert text.ids.shape == (2, ORIGINAL + 44)
        assert not np.isin(text.ids, spec.masked_ids).any()
        with pytest.raises(UsageError, match=f"within its original context of {ORIGINAL}"):
            generate(checkpoint, spec, [_Told(0)], ORIGINAL + 1, 0)


def test_bfloat16_is_near(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", GROUPED)
    ids = torch.randint(0, GROUPED.vocab, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    exact, rough = (_logits(folder, ids, [0, 0], dtype) for dtype in (torch.float32, torch.bfloat16))
    error = (rough - exact).abs()
    assert 0 < error.max() < 0.2
    assert error.mean() < 0.02 * exact.abs().mean()


def test_sampling_keeps_to_the_most_likely_tokens_and_their_shares() -> None:
    shares = torch.tensor([0.004, 0.5, 0.332, 0.002, 0.16, 0.002])  # tempered; 1, 2 and 4 hold 0.99 of it together
    logits = TEMPERATURE * shares.log()
    uniform = torch.from_numpy(np.linspace(0, 1, 9600, endpoint=False, dtype=np.float32))
    counts = torch.bincount(choose(logits.expand(9600, -1), uniform), minlength=6)
    torch.testing.assert_close(counts / 9600, torch.tensor([0, 0.5, 0.332, 0, 0.16, 0]) / 0.992, rtol=0, atol=1e-3)
    largest = torch.tensor([1 - 2**-24])
    assert choose(logits[None], largest).tolist() == [4]


class _Told:
    """Beginnings of one row, each a different length, that remember what they were asked for."""

    def __init__(self, row: int) -> None:
        self.given: list[list[int]] = []
        self.row = row

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        self.given.append([4 + self.row, *[5] * len(self.given), 6])
        return self.given[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("generation") / "model", GROUPED)


def _generate(
    model: Path, rows: int = 5, eos: tuple[int, ...] = (), seed: int = 0, memory: int | None = None
) -> tuple[np.ndarray, list[_Told]]:
    with open_checkpoint(model) as checkpoint:
        spec = replace(parse_config(checkpoint.config, checkpoint.generation_config, "tiny"), eos_token_ids=eos)
        told = [_Told(row) for row in range(rows)]
        ids = generate(checkpoint, spec, told, TOKENS, seed, memory)
    return ids, told


def test_rows_are_full_and_every_end_is_followed_by_the_next_beginning(model: Path) -> None:
    ids, told = _generate(model, eos=tuple(range(100, 200)))
    assert ids.shape == (5, TOKENS)
    assert ids.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() < GROUPED.vocab
    for row, beginnings in zip(ids.tolist(), told, strict=True):
        texts, at = 0, 0
        for beginning in beginnings.given:
            assert row[at : at + len(beginning)] == beginning[: TOKENS - at]
            sampled = row[at + len(beginning) :]
            ended = next((n for n, token in enumerate(sampled) if 100 <= token < 200), len(sampled))
            at, texts = at + len(beginning) + ended + 1, texts + 1
        assert at >= TOKENS
        assert texts > 2


def test_the_same_seed_gives_the_same_text_and_another_seed_another(model: Path) -> None:
    first, again, other = (_generate(model, seed=seed)[0] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).mean() > 0.5


def test_one_block_in_memory_at_a_time_writes_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3edge import generation

    sizes: list[Fit] = []

    def remember(*arguments: object) -> Fit:
        sizes.append(fit(*arguments))
        return sizes[-1]

    monkeypatch.setattr(generation, "fit", remember)
    with open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
    little = spec.parameters * generation.fast_dtype("cpu").itemsize * 4 // 3 - 4
    kept, streamed = _generate(model)[0], _generate(model, memory=little)[0]
    assert [size.keep for size in sizes] == [True, False]
    assert sizes[0].rows == sizes[1].rows == 5
    assert (kept == streamed).all()


def _phi3_mini(spec: ModelSpec) -> ModelSpec:
    """Sizes of Phi-3-mini; tensors of one block and what is outside."""
    shapes = {"attn_qkv": (9216, 3072), "attn_output": (3072, 3072), "ffn_gate_up": (16384, 3072)}
    shapes |= {"ffn_down": (3072, 8192), "embedding": (32064, 3072), "head": (32064, 3072)}
    tensors = tuple(replace(t, shape=shapes.get(t.role, (3072,))) for t in spec.tensors if t.layer in (None, 0))
    return replace(spec, layers=32, kv_heads=32, head_dim=96, tensors=tensors)


def test_what_fits_into_memory(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        spec = _phi3_mini(parse_config(checkpoint.config, checkpoint.generation_config, "tiny"))
    assert fit(spec, 96, 256, 2, 40 * 10**9) == Fit(True, 96)
    assert fit(spec, 96, 256, 2, 5 * 10**9) == Fit(False, 32)  # 1.3 GB of weights, 0.1 GB a row: three times 32
    assert fit(spec, 96, 256, 2, 10**9) == Fit(False, 1)


def test_few_rows_at_once_write_all_rows(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phi3edge import generation

    monkeypatch.setattr(generation, "fit", lambda *_: Fit(True, 2))
    ids, told = _generate(model)
    assert [row[:2].tolist() for row in ids] == [beginnings.given[0] for beginnings in told]
    assert len({tuple(row[2:]) for row in ids.tolist()}) == 5
