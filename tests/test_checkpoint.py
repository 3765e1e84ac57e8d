"""Checkpoints: what is read equals what safetensors reads; what is wrong is refused by name."""

import json
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _models import (
    DTYPES,
    EMBEDDING,
    GROUPED,
    HEAD,
    MHA,
    NORM,
    TIED,
    Shape,
    copy_model,
    phi3_config,
    phi3_tensors,
    write_model,
    write_weights,
)
from safetensors.torch import load_file, save_file

from phi3edge.checkpoint import Checkpoint, open_checkpoint
from phi3edge.errors import CheckpointError, Phi3EdgeError, UnsupportedError
from phi3edge.families.phi3 import parse
from phi3edge.sources import resolve
from phi3edge.types import ModelSpec, Source

QKV = "model.layers.1.self_attn.qkv_proj.weight"
SHARD = "model-00002-of-00003.safetensors"


def spec_of(checkpoint: Checkpoint) -> ModelSpec:
    return parse(checkpoint.config, checkpoint.generation_config, checkpoint.name)


def check(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check(spec_of(checkpoint))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "single")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "sharded", GROUPED, shards=3)


# What is read


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_equals_what_safetensors_reads(tmp_path: Path, dtype: str, shards: int) -> None:
    folder = write_model(tmp_path / "m", Shape(dtype=dtype), shards)
    expected = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.names) == set(expected)
        for name, tensor in expected.items():
            assert np.array_equal(checkpoint.read(name), tensor.float().numpy())
            assert checkpoint.info(name)[1] == tuple(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_bit_pattern_is_read_exactly(tmp_path: Path, dtype: str) -> None:
    """All of a 16-bit type, subnormal numbers and both zeros included; a sample of float32's."""
    bits = np.arange(65536, dtype=np.uint16) if dtype != "float32" else np.arange(0, 2**32, 9973, dtype=np.uint32)
    every = torch.from_numpy(bits).view(DTYPES[dtype])
    tensor = every[torch.isfinite(every)].reshape(1, -1)
    save_file({"w": tensor.repeat(3, 1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(phi3_config()))
    with open_checkpoint(tmp_path) as checkpoint:
        rows = checkpoint.rows("w", 1, 3)
        expected = tensor.float().numpy().view(np.uint32)
        assert np.array_equal(rows.view(np.uint32), np.repeat(expected, 2, axis=0))
        raw = checkpoint.raw("w", 2, 3)
        assert raw.tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_rows_from_several_threads_and_into_a_buffer(sharded: Path) -> None:
    expected = {k: v.float().numpy() for file in sharded.glob("*.safetensors") for k, v in load_file(file).items()}
    with open_checkpoint(sharded) as checkpoint:
        spec = spec_of(checkpoint)
        chunks = [(t.name, r, r + 32) for t in spec.tensors if len(t.shape) == 2 for r in range(0, t.shape[0], 32)]

        def read(chunk: tuple[str, int, int]) -> bool:
            name, start, stop = chunk
            out = np.empty((stop - start, expected[name].shape[1]), np.float32)
            assert checkpoint.rows(name, start, stop, out=out) is out
            return np.array_equal(out, expected[name][start:stop])

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, chunks * 4))


def test_a_vector_is_one_row(single: Path) -> None:
    with open_checkpoint(single) as checkpoint:
        assert checkpoint.rows(NORM, 0, 1).shape == (1, MHA.hidden)
        assert checkpoint.read(NORM).shape == (MHA.hidden,)


def test_wrong_ranges_and_buffers_are_our_bugs(single: Path) -> None:
    with open_checkpoint(single) as checkpoint:
        with pytest.raises(ValueError, match="rows 0 to 321"):
            checkpoint.rows(EMBEDDING, 0, MHA.vocab + 1)
        with pytest.raises(ValueError, match="contiguous"):
            checkpoint.rows(EMBEDDING, 0, 2, out=np.empty((2, MHA.hidden), np.float64))
        with pytest.raises(CheckpointError, match="no tensor 'nothing'"):
            checkpoint.read("nothing")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_shards_are_opened_once_and_closed(sharded: Path) -> None:
    def open_shards() -> list[str]:
        links = list(Path("/proc/self/fd").iterdir())
        return sorted(str(fd.readlink()) for fd in links if fd.is_symlink() and ".safetensors" in str(fd.readlink()))

    before = open_shards()
    with open_checkpoint(sharded) as checkpoint:
        for name in checkpoint.names:
            checkpoint.read(name)
        assert open_shards() == sorted([*before, *map(str, checkpoint.shards)])
    assert open_shards() == before


# Every tensor is counted


def test_a_right_model_passes(single: Path, sharded: Path, tmp_path: Path) -> None:
    for folder in (single, sharded, write_model(tmp_path / "tied", TIED)):
        check(folder)


def test_each_tensor_is_read_once(single: Path) -> None:
    with open_checkpoint(single) as checkpoint:
        spec = spec_of(checkpoint)
        names = [tensor.name for tensor in spec.tensors]
        checkpoint.read(QKV)  # before the context: not counted
        with checkpoint.each_read_once(spec):
            for name in names:
                half = checkpoint.info(name)[1][0] // 2 if len(checkpoint.info(name)[1]) == 2 else 0
                last = checkpoint.info(name)[1][0] if half else 1
                checkpoint.raw(name, half, last)
                checkpoint.rows(name, 0, half)


@pytest.mark.parametrize(
    ("reads", "message"),
    [
        ({QKV: [(0, 700)]}, f"'{QKV}': 700 of 768 rows were read"),
        ({QKV: [(0, 700), (701, 768)]}, f"'{QKV}': row 700 was not read"),
        ({QKV: [(0, 768), (5, 6)]}, f"'{QKV}': row 5 was read twice"),
        ({NORM: []}, f"'{NORM}': 0 of 1 rows were read"),
        ({"other": [(0, 1)]}, "'other' was read, and is not in the plan"),
    ],
)
def test_tensors_that_are_not_read_once(tmp_path: Path, reads: dict[str, list[tuple[int, int]]], message: str) -> None:
    write_weights(write_model(tmp_path / "m"), phi3_tensors() | {"other": torch.zeros(1)})
    with open_checkpoint(tmp_path / "m") as checkpoint:
        spec = spec_of(checkpoint)
        everything = {t.name: [(0, t.shape[0] if len(t.shape) == 2 else 1)] for t in spec.tensors}

        def run() -> None:
            with checkpoint.each_read_once(spec):
                for name, ranges in (everything | reads).items():
                    for start, stop in ranges:
                        checkpoint.rows(name, start, stop)

        with pytest.raises(CheckpointError, match=message):
            run()


Tensors = dict[str, torch.Tensor]


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name])}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without(QKV), f"tensor '{QKV}' is missing"),
        (without(HEAD), f"tensor '{HEAD}' is missing"),
        (
            lambda t: t | {"model.layers.2.extra.weight": t[NORM].clone()},
            "unknown tensor 'model.layers.2.extra.weight'",
        ),
        (changed(QKV, lambda w: w[1:].contiguous()), rf"'{QKV}' has shape \(767, 256\), config.json says \(768, 256\)"),
        (changed(QKV, lambda w: w.float()), f"'{QKV}' is F32 .*config.json says bfloat16"),
        (changed(QKV, lambda w: w.half()), f"'{QKV}' is F16"),
        (changed(QKV, lambda w: w.to(torch.int8)), f"'{QKV}' has dtype I8"),
        (changed(QKV, lambda w: w.to(torch.float8_e4m3fn)), f"'{QKV}' has dtype F8_E4M3"),
        (changed(NORM, lambda w: w.half()), f"'{NORM}' is F16"),
    ],
)
def test_tensors_that_config_does_not_explain(
    tmp_path: Path, damage: Callable[[Tensors], Tensors], message: str
) -> None:
    folder = write_model(tmp_path / "m")
    write_weights(folder, damage(phi3_tensors()))
    with pytest.raises(CheckpointError, match=message):
        check(folder)


def test_float32_norms_beside_bfloat16_matrices_are_fine(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    write_weights(folder, {k: v.float() if v.ndim == 1 else v for k, v in phi3_tensors().items()})
    check(folder)


def test_without_a_dtype_in_config_all_must_agree(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", torch_dtype=None)
    check(folder)
    write_weights(folder, changed(QKV, lambda w: w.half())(phi3_tensors()))
    with pytest.raises(CheckpointError, match=f"'{QKV}' is F16 .*'{EMBEDDING}' has bfloat16"):
        check(folder)


def test_a_stored_head_of_a_tied_model_must_be_the_embedding(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", TIED)
    tensors = phi3_tensors(TIED)
    write_weights(folder, tensors | {HEAD: tensors[EMBEDDING].clone()})
    check(folder)
    other = tensors[EMBEDDING].clone()
    other[-1, -1] += 1
    for head in (other, tensors[EMBEDDING][1:].clone(), tensors[EMBEDDING].float()):
        write_weights(folder, tensors | {HEAD: head})
        with pytest.raises(CheckpointError, match=r"tie_word_embeddings: true, but .* is stored"):
            check(folder)


# Weights that are not finite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_by_name_and_row(tmp_path: Path, dtype: str, value: float) -> None:
    shape = Shape(layers=1, dtype=dtype)
    tensors = phi3_tensors(shape)
    name = "model.layers.0.mlp.gate_up_proj.weight"
    tensors[name][700, 13] = value
    tensors[name][901, 2] = value
    write_weights(write_model(tmp_path / "m", shape), tensors)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        checkpoint.rows(name, 0, 700)
        with pytest.raises(CheckpointError, match=f"'{name}' holds NaN or infinity, first in row 700, column 13"):
            checkpoint.rows(name, 600, 1024)
        with pytest.raises(CheckpointError, match="first in row 901, column 2"):
            checkpoint.raw(name, 701, 1024)


def test_the_largest_finite_weights_pass(tmp_path: Path) -> None:
    for dtype in DTYPES.values():
        largest = torch.tensor([[torch.finfo(dtype).max, torch.finfo(dtype).min, 0.0]]).to(dtype)
        save_file({"w": largest}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(phi3_config()))
        with open_checkpoint(tmp_path) as checkpoint:
            assert np.array_equal(checkpoint.read("w"), largest.float().numpy())


# Safetensors headers


def write_header(path: Path, header: dict[str, Any] | bytes, data: int = 16, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(data))


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 2], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 8), "b": entry(6, 16)}, "'b' overlaps"),
        ({"a": entry(0, 16), "b": entry(0, 16)}, "'b' overlaps"),
        ({"a": entry(0, 6), "b": entry(8, 16)}, "'b' leaves a gap"),
        ({"a": entry(2, 16)}, "'a' leaves a gap"),
        ({"a": entry(0, 14)}, "tensors end at byte"),
        ({"a": entry(0, 32)}, "tensors end at byte"),
        ({}, "tensors end at byte"),
        ({"a": entry(0, 16, [3])}, r"BF16 of shape \[3\] is 6 bytes, the header says 16"),
        ({"a": entry(0, 16, [8], "F32")}, "is 32 bytes, the header says 16"),
        ({"a": entry(0, 16, [-2, -4])}, "is not a list of sizes"),
        ({"a": entry(0, 16, [2.0, 4])}, "is not a list of sizes"),
        ({"a": entry(0, 16, [True, 8])}, "is not a list of sizes"),
        ({"a": entry(0, 16, [2**62, 2**62])}, "is not a list of sizes"),
        ({"a": entry(0, 16, [10**30, 0])}, "is not a list of sizes"),
        ({"a": entry(0, 16, [9] * 1_000_000)}, "is not a list of sizes"),  # whose product alone would take minutes
        ({"a": entry(0, 16, [8], "Q4")}, "unknown dtype 'Q4'"),
        ({"a": entry(0, 16) | {"data_offsets": [16, 0]}}, "data_offsets"),
        ({"a": entry(0, 16) | {"data_offsets": [0, 16, 16]}}, "data_offsets"),
        ({"a": entry(0, 16) | {"data_offsets": "all"}}, "data_offsets"),
        ({"a": entry(0, 16) | {"more": 1}}, "expected dtype, shape and data_offsets"),
        ({"a": 5}, "expected dtype, shape and data_offsets"),
        ({"a": entry(0, 16), "__metadata__": {"n": 5}}, "__metadata__"),
        (b'{"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]},', "not valid JSON"),
        (b"[]", "not a JSON object but a list"),
        (b"", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply|not valid JSON"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: dict[str, Any] | bytes, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(phi3_config()))
    write_header(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_duplicate_names_in_a_header(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(phi3_config()))
    one = json.dumps(entry(0, 16)).encode()
    write_header(tmp_path / "model.safetensors", b'{"a": ' + one + b', "a": ' + one + b"}")
    with pytest.raises(CheckpointError, match="key 'a' comes twice"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 500, -1])
def test_truncated_files(single: Path, tmp_path: Path, keep: int) -> None:
    folder = copy_model(single, tmp_path / "m")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(folder)


def test_header_length_is_believed_only_within_bounds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(phi3_config()))
    for length, message in (
        (100_000_001, "not a safetensors file"),
        (2**64 - 1, "not a safetensors"),
        (500, "needs 508"),
    ):
        write_header(tmp_path / "model.safetensors", {"a": entry(0, 16)}, length=length)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)


def test_empty_tensors_and_padded_headers_are_legal(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(phi3_config()))
    header = {"a": entry(0, 16), "none": entry(16, 16, [0, 3]), "first": entry(0, 0, [0])}
    write_header(tmp_path / "model.safetensors", json.dumps(header).encode() + b"   ")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("none").shape == (0, 3)
        assert checkpoint.read("a").shape == (8,)


# Indexes and folders


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda i: i["weight_map"].update({QKV: "model-00009-of-00003.safetensors"}), "model-00009.*not in"),
        (lambda i: i["weight_map"].update({QKV: "../model.safetensors"}), r"'\.\./model\.safetensors'"),
        (lambda i: i["weight_map"].update({QKV: "/etc/model.safetensors"}), "'/etc/model.safetensors'"),
        (lambda i: i["weight_map"].update({QKV: "sub/model.safetensors"}), "'sub/model.safetensors'"),
        (lambda i: i["weight_map"].update({QKV: "..\\model.safetensors"}), "expected a .safetensors file"),
        (lambda i: i["weight_map"].update({QKV: "pytorch_model.bin"}), "'pytorch_model.bin'"),
        (lambda i: i["weight_map"].update({QKV: 5}), "is in 5"),
        (lambda i: i["weight_map"].update({"other": SHARD}), "'other' is in model-00002.*it is not"),
        (lambda i: i["weight_map"].update({EMBEDDING: SHARD}), f"'{EMBEDDING}' is in model-00002.*it is not"),
        (lambda i: i["weight_map"].pop(EMBEDDING), f"'{EMBEDDING}' of model-00001.*is not in model.safetensors.index"),
        (lambda i: i.pop("weight_map"), "weight_map is missing"),
        (lambda i: i.update(weight_map={}), "weight_map is missing or empty"),
        (lambda i: i.update(weight_map=[]), "weight_map is missing"),
    ],
)
def test_wrong_indexes(sharded: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    folder = copy_model(sharded, tmp_path / "m")
    edit_index(folder, edit)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards(sharded: Path, tmp_path: Path) -> None:
    folder = copy_model(sharded, tmp_path / "m")
    second = load_file(folder / SHARD)
    save_file(second | {EMBEDDING: torch.zeros(2, 2)}, folder / SHARD)
    with pytest.raises(CheckpointError, match=f"'{EMBEDDING}' is in two shards: model-00001.* and model-00002"):
        open_checkpoint(folder)


def test_links_out_of_the_folder(sharded: Path, tmp_path: Path) -> None:
    for name in (SHARD, "config.json", "tokenizer.json"):
        folder = copy_model(sharded, tmp_path / name)
        (folder / name).unlink()
        (folder / name).symlink_to(sharded / name)
        with pytest.raises(CheckpointError, match=f"{name} is a link to .* outside the folder"):
            open_checkpoint(folder)


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(phi3_config()))
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to a file that is gone"):
        open_checkpoint(tmp_path)


def test_the_hub_cache_links_to_its_own_blobs(sharded: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for n, file in enumerate(sorted(sharded.iterdir())):
        (repository / "blobs" / f"{n:040x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{n:040x}")
    with resolve(str(snapshot)) as checkpoint:
        checkpoint.check(spec_of(checkpoint))
        assert checkpoint.source == Source("org/tiny", "a" * 40, "mit")
        assert checkpoint.name == "tiny"
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to(sharded / SHARD)
    with pytest.raises(CheckpointError, match="outside the folder"):
        resolve(str(snapshot))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_never_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(phi3_config()))
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=f"pickle.*{name}") as caught:
        open_checkpoint(tmp_path)
    assert "safe_serialization" in (caught.value.hint or "")


def test_other_folders_without_weights(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(phi3_config()))
    with pytest.raises(CheckpointError, match="has no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter"):
        open_checkpoint(tmp_path)
    folder = copy_model(sharded, tmp_path / "m")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"has model-00001.*but neither"):
        open_checkpoint(folder)
    folder = copy_model(sharded, tmp_path / "both")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="has both"):
        open_checkpoint(folder)


# Configs


def test_models_that_need_their_own_code(single: Path, tmp_path: Path) -> None:
    check(single)  # the original config has an auto_map too, which is never followed
    folder = copy_model(single, tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(phi3_config(model_type="phi4mm")))
    with pytest.raises(UnsupportedError, match="'phi4mm' needs code of the repository"):
        open_checkpoint(folder)
    (folder / "config.json").write_text(json.dumps(phi3_config(model_type="phi33", auto_map=None)))
    with pytest.raises(UnsupportedError, match="model_type is 'phi33'") as caught:
        open_checkpoint(folder)
    assert caught.value.hint == "did you mean 'phi3'?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"has no config\.json"),
        ("", r"config\.json is not valid JSON"),
        ("{", r"config\.json is not valid JSON"),
        ("[1]", r"config\.json is not a JSON object but a list"),
        ('{"model_type": "phi3", "model_type": "phi3"}', "key 'model_type' comes twice"),
    ],
)
def test_wrong_configs(single: Path, tmp_path: Path, text: str | None, message: str) -> None:
    folder = copy_model(single, tmp_path / "m")
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_two_dtypes_in_config(single: Path, tmp_path: Path) -> None:
    folder = copy_model(single, tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(phi3_config(dtype="float16")))
    with pytest.raises(CheckpointError, match="dtype is 'float16', torch_dtype is 'bfloat16'"):
        check(folder)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\r\ntags: [x]\r\nlicense: 'apache-2.0'\r\n---\r\n", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: our-licence\n---\n", "our-licence"),
        ("# no front matter\nlicense: mit\n", None),
        ("---\ntags: []\n---\nlicense: mit\n", None),
    ],
)
def test_licence_from_the_model_card(single: Path, tmp_path: Path, card: str, licence: str | None) -> None:
    folder = copy_model(single, tmp_path / "m")
    (folder / "README.md").write_bytes(card.encode())
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.source.licence == licence


# Names


def test_names_that_are_not_checkpoints(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(single.parent)
    for name, message, hint in (
        ("dmeo", "no checkpoint 'dmeo'", "'demo'"),
        ("singel", "no checkpoint 'singel'", "'./single'"),
        ("./nothing", r"no folder \./nothing", ""),
        ("/no/such/folder", "no folder /no/such/folder", ""),
        (str(single / "config.json"), "is a file", "name the folder"),
    ):
        with pytest.raises(Phi3EdgeError, match=message) as caught:
            resolve(name)
        assert hint in (caught.value.hint or "")
    with resolve("single") as checkpoint:
        assert checkpoint.source.repository is None
        assert checkpoint.name == "single"
