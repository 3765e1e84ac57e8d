"""llama.cpp's importance matrices: gguf-py writes what we read, and reads what we write."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from _models import MHA, TIED, Shape, phi3_config

from phi3edge.errors import CheckpointError, UsageError
from phi3edge.families import parse_config
from phi3edge.imatrix import linears, read_imatrix, write_imatrix
from phi3edge.statistics import load_statistics
from phi3edge.types import ModelSpec, Statistics

COLUMNS = {"attn_qkv": 256, "attn_output": 256, "ffn_up": 256, "ffn_down": 512}
NAMES = {f"blk.{n}.{linear}.weight": columns for n in range(2) for linear, columns in COLUMNS.items()}
TOKENS = 1536


def model(shape: Shape = MHA) -> ModelSpec:
    return parse_config(phi3_config(shape), None, "tiny")


def sums() -> dict[str, np.ndarray]:
    """What llama-imatrix would have added up for each linear."""
    random = np.random.default_rng(0)
    return {name: random.uniform(1, 900, (1, columns)).astype(np.float32) for name, columns in NAMES.items()}


def write_gguf(path: Path, arrays: dict[str, np.ndarray], kind: str = "imatrix") -> Path:
    """A file as llama-imatrix lays it out, by gguf-py."""
    writer = gguf.GGUFWriter(path, "none")
    writer.kv_data[0].clear()  # it has no architecture
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["/home/someone/wiki.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def arrays(tokens: float = TOKENS) -> dict[str, np.ndarray]:
    content = {}
    for name, total in sums().items():
        content[f"{name}.in_sum2"] = total
        content[f"{name}.counts"] = np.array([[tokens]], np.float32)
    return content


def test_reads_mean_squares_by_the_models_names(tmp_path: Path) -> None:
    spec, total = model(), sums()
    found = read_imatrix(write_gguf(tmp_path / "imatrix.gguf", arrays()), spec)
    assert found.datasets == ("/home/someone/wiki.txt",)
    assert len(found.statistics) == 8
    for name, ours in (
        ("blk.1.ffn_up.weight", "model.layers.1.mlp.gate_up_proj.weight"),
        ("blk.0.attn_qkv.weight", "model.layers.0.self_attn.qkv_proj.weight"),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"),
    ):
        assert found.statistics[ours].tokens == TOKENS
        np.testing.assert_allclose(found.statistics[ours].squares, total[name][0] / TOKENS, rtol=1e-6)
        assert found.statistics[ours].absolute is None


def test_the_head_may_be_missing_and_that_is_noted(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "imatrix.gguf", arrays())
    for shape, head in ((MHA, "lm_head.weight"), (TIED, "model.embed_tokens.weight")):
        found = load_statistics(path, model(shape))
        assert head not in found
        assert found.notes == [f"No statistics of {head}: it is rounded without."]
        assert (found.calibration.name, found.calibration.sha256) == ("wiki.txt", None)
    with_head = arrays() | {
        "output.weight.in_sum2": np.ones((1, 256), np.float32),
        "output.weight.counts": np.array([[4]], np.float32),
    }
    found = load_statistics(write_gguf(tmp_path / "head.gguf", with_head), model())
    assert found["lm_head.weight"].squares[7] == 0.25
    assert not found.notes


@pytest.mark.parametrize("shape", [MHA, TIED], ids=["head", "tied"])
def test_gguf_py_reads_what_is_written(tmp_path: Path, shape: Shape) -> None:
    spec, path = model(shape), tmp_path / "imatrix.gguf"
    random = np.random.default_rng(1)
    given = {t.name: Statistics(1000, random.random(t.shape[1], np.float32)) for t in linears(spec)}
    with path.open("wb") as file:
        write_imatrix(file, spec, given, "some text", 10, 100)
    reader = gguf.GGUFReader(path)
    said = {key: reader.get_field(key).contents() for key in reader.fields if key.startswith(("general", "imatrix"))}
    assert said == {
        "general.type": "imatrix",
        "imatrix.datasets": ["some text"],
        "imatrix.chunk_count": 10,
        "imatrix.chunk_size": 100,
    }
    read = {t.name: t for t in reader.tensors}
    head = "token_embd.weight" if shape.tied else "output.weight"
    assert set(read) == {f"{name}.{part}" for name in [*NAMES, head] for part in ("in_sum2", "counts")}
    down = given["model.layers.1.mlp.down_proj.weight"]
    tensor = read["blk.1.ffn_down.weight.in_sum2"]
    assert (tensor.tensor_type, list(tensor.shape)) == (gguf.GGMLQuantizationType.F32, [512, 1])
    np.testing.assert_allclose(tensor.data[0], down.squares * 1000, rtol=1e-6)
    assert read["blk.1.ffn_down.weight.counts"].data.tolist() == [[1000.0]]
    back = read_imatrix(path, spec).statistics
    for name, statistics in given.items():
        assert back[name].tokens == 1000
        np.testing.assert_allclose(back[name].squares, statistics.squares, rtol=3e-7)


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in arrays().items() if not key.startswith(name)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (without("blk.1."), "lacks 'blk.1.attn_qkv.weight': it has nothing of 4 of 9 linears of tiny"),
        (
            {k: v for k, v in arrays().items() if k != "blk.0.ffn_up.weight.counts"},
            "lacks 'blk.0.ffn_up.weight.counts'",
        ),
        (arrays() | {"blk.2.ffn_up.weight.in_sum2": np.ones((1, 256), np.float32)}, "'blk.2.ffn_up.weight.in_sum2' is"),
        (arrays() | {"blk.0.ffn_up.weight.in_sum2": np.ones((1, 255), np.float32)}, "shape (1, 255); expected 256"),
        (arrays() | {"blk.0.ffn_up.weight.in_sum2": np.ones((1, 256), np.float16)}, "expected 256 numbers as float32"),
        (arrays() | {"blk.0.ffn_up.weight.in_sum2": np.full((1, 256), np.nan, np.float32)}, "NaN or infinity"),
        (arrays() | {"blk.0.ffn_up.weight.in_sum2": np.full((1, 256), -1, np.float32)}, "column 0 is -0.0006"),
        (arrays() | {"blk.0.ffn_up.weight.in_sum2": np.zeros((1, 256), np.float32)}, "no column ever fired"),
        (arrays(tokens=0), "saw no token"),
        (arrays(tokens=np.inf), "NaN or infinity"),
    ],
    ids=["missing", "no counts", "other", "short", "half", "nan", "negative", "zeros", "no tokens", "endless"],
)
def test_a_bad_matrix_is_one_clear_line(tmp_path: Path, content: dict[str, np.ndarray], says: str) -> None:
    path = write_gguf(tmp_path / "imatrix.gguf", content)
    with pytest.raises(UsageError) as raised:
        load_statistics(path, model())
    assert says in raised.value.message
    assert raised.value.hint


def test_what_is_no_imatrix_is_refused(tmp_path: Path) -> None:
    old = tmp_path / "imatrix.dat"
    old.write_bytes((8).to_bytes(4, "little") + (21).to_bytes(4, "little") + b"blk.0.attn_qkv.weight")
    with pytest.raises(UsageError, match="not an importance matrix") as raised:
        load_statistics(old, model())
    assert ".dat format is not read" in str(raised.value.hint)
    with pytest.raises(UsageError, match="of type 'model'"):
        load_statistics(write_gguf(tmp_path / "model.gguf", arrays(), kind="model"), model())
    with pytest.raises(UsageError, match="cannot read"):
        load_statistics(tmp_path / "nowhere.gguf", model())
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(write_gguf(tmp_path / "whole.gguf", arrays()).read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        load_statistics(cut, model())
    with pytest.raises(UsageError, match="mean squares only"):
        load_statistics(tmp_path / "whole.gguf", model(), moments=True)
