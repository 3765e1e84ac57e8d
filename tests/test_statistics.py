"""Statistics of linears: against transformers' own activations, through interruptions, and from hostile folders."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _models import GROUPED, MHA, TIED, Shape, phi3_config, write_model
from safetensors.numpy import load_file, save_file

from phi3edge.accumulate import Accumulator
from phi3edge.calibration import CalibrationText
from phi3edge.checkpoint import open_checkpoint
from phi3edge.codecs import codec
from phi3edge.collect import STATE, collect
from phi3edge.errors import CheckpointError, OutputError, Phi3EdgeError, UsageError
from phi3edge.families import parse_config
from phi3edge.methods import rtn
from phi3edge.progress import Advance
from phi3edge.reference import load_model
from phi3edge.statistics import NAME, check, finish_folder, identity, load_statistics
from phi3edge.types import ModelSpec, Statistics

SEQUENCES, TOKENS = 40, 64  # more than one batch
QKV, DOWN = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.mlp.down_proj.weight"


def some_ids(vocab: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (SEQUENCES, TOKENS))


def run(model: Path, work: Path, ids: np.ndarray, moments: bool = True, **options: Any) -> ModelSpec:
    with open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        collect(checkpoint, spec, ids, work, moments, **options)
    return spec


def finished(model: Path, work: Path, moments: bool = True) -> ModelSpec:
    spec = run(model, work, some_ids(320), moments)
    (work / STATE).unlink()
    finish_folder(work, spec, "words", some_ids(320), moments)
    return spec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", MHA)


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelSpec]:
    folder = tmp_path_factory.mktemp("statistics") / "saved"
    return folder, finished(model, folder)


def watched(model: Path, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of every linear of transformers' model, float64, (all tokens, columns), by its weight's name."""
    seen: dict[str, np.ndarray] = {}
    reference = load_model(model)
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear):

            def watch(module: Any, inputs: Any, name: str = name) -> None:
                seen[f"{name}.weight"] = inputs[0].reshape(-1, inputs[0].shape[-1]).double().numpy()

            module.register_forward_pre_hook(watch)
    with torch.inference_mode():
        reference(torch.from_numpy(ids))
    return seen


@pytest.mark.parametrize("shape", [MHA, GROUPED, TIED], ids=["mha", "grouped", "tied"])
def test_they_are_the_means_of_what_transformers_linears_see(tmp_path: Path, shape: Shape) -> None:
    folder = write_model(tmp_path / "model", shape)
    spec = finished(folder, tmp_path / "out")
    expected = watched(folder, some_ids(shape.vocab))
    if shape.tied:
        expected["model.embed_tokens.weight"] = expected.pop("lm_head.weight")
    found = load_statistics(tmp_path / "out", spec, moments=True)
    assert set(found) == set(expected)
    text = CalibrationText(some_ids(320), "words")
    assert (found.calibration.name, found.calibration.sha256) == ("words", text.sha256)
    np.testing.assert_array_equal(found.calibration.ids, text.ids)
    assert not found.notes
    for name, x in expected.items():
        statistics = found[name]
        assert statistics.tokens == len(x) == SEQUENCES * TOKENS
        assert statistics.absolute is not None
        assert statistics.moments is not None
        np.testing.assert_allclose(statistics.squares, (x**2).mean(0), rtol=1e-4)
        np.testing.assert_allclose(statistics.absolute, np.abs(x).mean(0), rtol=1e-4)
        np.testing.assert_allclose(statistics.moments, x.T @ x / len(x), rtol=1e-4, atol=1e-4 * (x**2).mean())


def test_without_moments_there_are_none_and_asking_is_an_error(model: Path, tmp_path: Path) -> None:
    spec = finished(model, tmp_path / "out", moments=False)
    found = load_statistics(tmp_path / "out", spec)
    assert all(found[name].moments is None for name in found)
    with pytest.raises(UsageError, match="no second moments") as raised:
        load_statistics(tmp_path / "out", spec, moments=True)
    assert "--moments" in str(raised.value.hint)


def test_its_imatrix_says_the_same(saved: tuple[Path, ModelSpec]) -> None:
    folder, spec = saved
    ours, theirs = load_statistics(folder, spec), load_statistics(folder / "imatrix.gguf", spec)
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_allclose(theirs[name].squares, ours[name].squares, rtol=3e-7)


def interrupt_after(sequences: int) -> Callable[..., Any]:
    """Stages that end the run, as Ctrl-C does, once so many sequences have gone through a block."""

    @contextmanager
    def stages(name: str, total: int | None = None) -> Iterator[Advance]:
        done = 0

        def advance(units: int) -> None:
            nonlocal done
            done += units
            if done > sequences:
                raise KeyboardInterrupt

        yield advance

    return stages


@pytest.mark.parametrize("sequences", [0, SEQUENCES - 1, SEQUENCES, 2 * SEQUENCES - 1, 2 * SEQUENCES])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    model: Path, saved: tuple[Path, ModelSpec], tmp_path: Path, sequences: int
) -> None:
    ids, work = some_ids(320), tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        run(model, work, ids, stages=interrupt_after(sequences))
    left = {path.name for path in work.iterdir()}
    layer = sequences // SEQUENCES
    assert left == {STATE, f"hidden-{layer:05d}.f32", *(f"block-{n:05d}.safetensors" for n in range(layer))}
    finished_before = {path: path.stat().st_mtime_ns for path in work.glob("block-*")}
    run(model, work, ids)
    assert {path: path.stat().st_mtime_ns for path in finished_before} == finished_before
    names = {"block-00000.safetensors", "block-00001.safetensors", "head.safetensors"}
    assert {path.name for path in work.iterdir()} == {STATE, *names}
    for name in names:
        assert (work / name).read_bytes() == (saved[0] / name).read_bytes()


def test_what_a_killed_run_left_is_cleared_away(model: Path, saved: tuple[Path, ModelSpec], tmp_path: Path) -> None:
    ids, work = some_ids(320), tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        run(model, work, ids, stages=interrupt_after(SEQUENCES))
    (work / "hidden-00000.f32").write_bytes(b"read, and not yet removed")
    (work / ".hidden-00002.f32.0000.partial").write_bytes(b"half")
    run(model, work, ids)
    names = {"block-00000.safetensors", "block-00001.safetensors", "head.safetensors"}
    assert {path.name for path in work.iterdir()} == {STATE, *names}
    assert all((work / name).read_bytes() == (saved[0] / name).read_bytes() for name in names)


def test_the_number_of_tokens_costs_no_digits() -> None:
    random = torch.Generator().manual_seed(0)
    total, sums = torch.zeros(64, 64, dtype=torch.float64), Accumulator(64, moments=True)
    for _ in range(50):
        x = torch.randn(2048, 64, generator=random) * torch.logspace(-2, 3, 64)
        sums.add(x[None])
        total += x.double().T @ x.double()
    exact = (total / 102_400).numpy()
    found = sums.statistics()
    assert found.tokens == 102_400
    assert found.moments is not None
    spread = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    assert (np.abs(found.moments - exact) / spread).max() < 1.5e-7
    np.testing.assert_allclose(found.squares, exact.diagonal(), rtol=1.5e-7)


def test_the_beginning_of_other_work_is_not_gone_on_with(model: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        run(model, work, some_ids(320, seed=1), stages=interrupt_after(SEQUENCES))
    run(model, work, some_ids(320))
    run(model, tmp_path / "fresh", some_ids(320))
    for name in ("block-00000.safetensors", "head.safetensors"):
        assert (work / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()


def test_a_folder_of_something_else_is_not_touched(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="something else"):
        run(model, tmp_path, some_ids(320))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (np.zeros((0, 8), np.int64), "shape (0, 8)"),
        (np.zeros((1, 513), np.int64), "takes 512"),
        (np.full((1, 8), 320), "has 320 tokens"),
        (np.full((1, 8), -1), "from -1"),
    ],
    ids=["none", "long", "beyond", "negative"],
)
def test_ids_that_the_model_does_not_take_are_refused(model: Path, tmp_path: Path, ids: np.ndarray, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        run(model, tmp_path / "work", ids)
    assert says in raised.value.message
    assert not (tmp_path / "work").exists()


def test_statistics_of_another_model_are_refused_by_what_differs(saved: tuple[Path, ModelSpec]) -> None:
    folder, _ = saved
    for changed, says in (
        ({"intermediate_size": 1024}, "intermediate_size is 512, expected 1024"),
        ({"num_hidden_layers": 3}, "layers is 2, expected 3"),
        ({"rope_theta": 5000.0}, "rope is"),
    ):
        other = parse_config(phi3_config(MHA, **changed), None, "other")
        with pytest.raises(UsageError, match="not of other") as raised:
            load_statistics(folder, other)
        assert says in raised.value.message
    same = parse_config(phi3_config(MHA, torch_dtype="float16", eos_token_id=3), None, "a fine-tune")
    assert len(load_statistics(folder, same)) == 9


def change_document(folder: Path, **changes: Any) -> None:
    path = folder / NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_block(folder: Path, name: str, array: np.ndarray | None) -> None:
    path = folder / "block-00001.safetensors"
    tensors = {**load_file(path), name: array}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no document": (lambda f: (f / NAME).unlink(), f"no {NAME}"),
    "no JSON": (lambda f: (f / NAME).write_text("{"), "not what phi3edge calibrate writes"),
    "schema": (lambda f: change_document(f, schema=9), "schema"),
    "no tokens": (lambda f: change_document(f, tokens=0), "tokens"),
    "no ids": (lambda f: (f / "ids.npy").unlink(), "no ids.npy"),
    "cut ids": (lambda f: (f / "ids.npy").write_bytes(b"\x93NUMPY"), "ids.npy cannot be read"),
    "other ids": (lambda f: np.save(f / "ids.npy", np.zeros((2, 3), np.int32)), "is not what statistics.json says"),
    "long ids": (lambda f: np.save(f / "ids.npy", some_ids(320)), "int64 of shape (40, 64)"),
    "objects": (lambda f: np.save(f / "ids.npy", np.array([None])), "ids.npy cannot be read"),
    "no block": (lambda f: (f / "block-00001.safetensors").unlink(), "no block-00001.safetensors"),
    "cut": (lambda f: (f / "head.safetensors").write_bytes(b"12345678"), "head.safetensors"),
    "missing": (lambda f: change_block(f, f"{DOWN}.squares", None), f"lacks '{DOWN}.squares'"),
    "short": (lambda f: change_block(f, f"{DOWN}.squares", np.ones(511, np.float32)), "expected F32 (512,)"),
    "double": (lambda f: change_block(f, f"{DOWN}.squares", np.ones(512)), "is F64"),
    "nan": (lambda f: change_block(f, f"{QKV}.squares", np.full(256, np.nan, np.float32)), "column 0 is nan"),
    "negative": (lambda f: change_block(f, f"{QKV}.absolute", np.full(256, -1, np.float32)), "absolute of column 0"),
    "zeros": (lambda f: change_block(f, f"{QKV}.squares", np.zeros(256, np.float32)), "no column ever fired"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_one_clear_line(saved: tuple[Path, ModelSpec], tmp_path: Path, fault: str) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    damage, says = BROKEN[fault]
    damage(folder)
    with pytest.raises(Phi3EdgeError) as raised:
        load_statistics(folder, saved[1])
    assert says in raised.value.message
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("moments", "says"),
    [(np.full((256, 256), np.nan, np.float32), "NaN"), (np.eye(256, dtype=np.float32), "diagonal")],
    ids=["nan", "of another linear"],
)
def test_broken_moments_are_found_when_they_are_asked_for(
    saved: tuple[Path, ModelSpec], tmp_path: Path, moments: np.ndarray, says: str
) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    change_block(folder, f"{QKV}.moments", moments)
    found = load_statistics(folder, saved[1], moments=True)
    assert found[DOWN].moments is not None
    with pytest.raises(UsageError, match=says):
        found[QKV]
    change_block(folder, f"{QKV}.moments", np.ones((256, 255), np.float32))
    with pytest.raises(CheckpointError, match=r"expected F32 \(256, 256\)"):
        load_statistics(folder, saved[1], moments=True)


def statistics_of(x: np.ndarray) -> Statistics:
    means = (x**2).mean(0), np.abs(x).mean(0), x.T @ x / len(x)
    return Statistics(len(x), *(mean.astype(np.float32) for mean in means))


def test_a_column_that_never_fires_counts_as_the_least() -> None:
    x = np.random.default_rng(0).normal(size=(50, 6)) * [1, 2, 0, 3, 0.5, 0]
    given = statistics_of(x)
    found, count = check(given, 6, "w")
    assert count == 2
    assert found.absolute is not None
    assert found.moments is not None
    np.testing.assert_array_equal(found.squares[[0, 1, 3, 4]], given.squares[[0, 1, 3, 4]])
    np.testing.assert_array_equal(found.squares[[2, 5]], given.squares[4])
    np.testing.assert_array_equal(np.diagonal(found.moments), found.squares)
    assert found.absolute.min() > 0
    assert np.linalg.eigvalsh(found.moments).min() > 0
    assert given.squares[2] == 0
    whole, none = check(statistics_of(x[:, [0, 1]]), 2, "w")
    assert (none, whole.tokens) == (0, 50)


def test_columns_that_never_fire_are_noted_and_rounded_all_the_same(
    saved: tuple[Path, ModelSpec], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved[0], tmp_path / "copy"))
    change_block(folder, f"{DOWN}.squares", np.r_[np.zeros(96), np.ones(416)].astype(np.float32))
    found = load_statistics(folder, saved[1])
    assert found.notes == [f"96 input columns of {DOWN} never fired: each counts as its linear's least."]
    weight = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    q4_0 = codec("q4_0")
    error = q4_0.dequantize(rtn.quantize(weight, q4_0, found[DOWN])) - weight
    assert np.abs(error[:, :96]).max() < 0.4


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"tokens": 0}, "0 tokens"),
        ({"squares": np.ones(5, np.float32)}, "has 6 columns"),
        ({"squares": np.array([1, np.inf, 1, 1, 1, 1], np.float32)}, "column 1 is inf"),
        ({"absolute": np.array([1, 1, 1, 1, 1, np.nan], np.float32)}, "absolute of column 5 is nan"),
        ({"moments": np.eye(5, dtype=np.float32)}, "moments of shape"),
    ],
    ids=["tokens", "columns", "infinite", "absolute", "moments"],
)
def test_numbers_that_say_nothing_are_refused(broken: dict[str, Any], says: str) -> None:
    whole = statistics_of(np.random.default_rng(0).normal(size=(50, 6)))
    with pytest.raises(UsageError) as raised:
        check(replace(whole, **broken), 6, "tensor 'w'")
    assert says in raised.value.message
    assert raised.value.message.startswith("tensor 'w'")


def test_rtn_weighs_errors_by_the_mean_squares(saved: tuple[Path, ModelSpec]) -> None:
    folder, spec = saved
    statistics = load_statistics(folder, spec)[DOWN]
    weight = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    for name in ("q4_0", "q4_k", "uint4_b32"):
        module = codec(name)
        plain, weighed = (module.dequantize(rtn.quantize(weight, module, s)) - weight for s in (None, statistics))
        assert (weighed**2 @ statistics.squares).sum() < (plain**2 @ statistics.squares).sum()


def test_a_dense_models_identity_has_no_fields_that_came_with_experts():
    """A folder of statistics that an earlier version wrote stays of use."""
    from test_families import MINI_4K

    assert not {"norm", "experts"} & set(identity(parse_config(MINI_4K, None, "x")))


def test_a_longrope_models_folder_is_known_again(tmp_path: Path):
    """Its factors are lists in the file."""
    from test_longrope import GROUPED, longrope

    path = write_model(tmp_path / "in", GROUPED, **longrope())
    ids = np.random.default_rng(0).integers(0, 320, (2, 32))
    with open_checkpoint(path) as checkpoint:
        spec = parse_config(checkpoint.config, None, "long")
        collect(checkpoint, spec, ids, tmp_path / "out")
        finish_folder(tmp_path / "out", spec, "random", ids, False)
    assert load_statistics(tmp_path / "out", spec).calibration.ids is not None
