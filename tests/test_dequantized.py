"""An artifact's weights, against gguf-py's decoder, ONNX Runtime's operators and what was written."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from _genai import write_genai
from _gguf import gguf_name, write_gguf
from _models import GROUPED, MHA, TIED, Shape, write_model

from phi3edge import build
from phi3edge.artifact import find_artifact
from phi3edge.checkpoint import open_checkpoint
from phi3edge.dequantized import Dequantized
from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.families import parse_config
from phi3edge.types import ModelSpec

KINDS = gguf.GGMLQuantizationType


def spec_of(folder: Path) -> ModelSpec:
    with open_checkpoint(folder) as checkpoint:
        return parse_config(checkpoint.config, checkpoint.generation_config, "tiny")


@pytest.mark.parametrize("kind", [KINDS.F32, KINDS.F16, KINDS.Q4_0, KINDS.Q8_0])
def test_a_peers_gguf_is_read_as_its_own_decoder_reads_it(tmp_path: Path, kind: KINDS) -> None:
    model = write_model(tmp_path / "model", GROUPED)
    file, spec = write_gguf(model, tmp_path / "peer.gguf", kind), spec_of(model)
    found = Dequantized(find_artifact(file), spec)
    theirs = {t.name: t for t in gguf.GGUFReader(file).tensors}
    for tensor in spec.tensors:
        entry = theirs[gguf_name(tensor.name)]
        expected = gguf.quants.dequantize(entry.data, entry.tensor_type).reshape(tensor.shape)
        np.testing.assert_array_equal(found.read(tensor.name), expected)
        assert found[tensor.name].bytes == entry.n_bytes
        assert found[tensor.name].codec == ("f32" if len(tensor.shape) == 1 else kind.name.lower())


@pytest.mark.parametrize("shape", [MHA, GROUPED, TIED], ids=["mha", "grouped", "tied"])
@pytest.mark.parametrize("recipe", ["int4", "int8", "int4-fast", "f32"])
def test_our_onnx_folder_holds_the_same_weights_as_the_codecs_gave(tmp_path: Path, shape: Shape, recipe: str) -> None:
    model = write_model(tmp_path / "model", shape)
    out = build.export(str(model), "cpu", recipe=recipe, format_="onnx", out=tmp_path / "out", threads=1)
    spec = spec_of(model)
    found = Dequantized(find_artifact(out.folder), spec)
    codecs = {t.tensor.name: t.codec for t in out.prepared.plan.tensors}
    with open_checkpoint(model) as checkpoint:
        for tensor in spec.tensors:
            original, weight = checkpoint.read(tensor.name), found.read(tensor.name)
            assert weight.shape == tensor.shape
            assert found[tensor.name].codec == codecs[tensor.name]
            limit = {"f": 0.0, "i": 0.01, "u": 0.12}[codecs[tensor.name][0]]
            limit = 0.12 if codecs[tensor.name].startswith("int4") else limit
            assert np.linalg.norm(weight - original) <= limit * np.linalg.norm(original)
    if shape.tied:
        np.testing.assert_array_equal(found.read("head"), found.read("model.embed_tokens.weight"))


def test_a_graph_with_names_of_its_own_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", MHA)
    with pytest.raises(CheckpointError, match="has no embedding"):
        Dequantized(find_artifact(write_genai(model, tmp_path / "theirs")), spec_of(model))


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", MHA)
    file = write_gguf(model, tmp_path / "peer.gguf")
    for shape in (Shape(layers=3), Shape(intermediate=768)):
        other = spec_of(write_model(tmp_path / f"{shape.layers}-{shape.intermediate}", shape))
        with pytest.raises(CheckpointError, match=r"has no|has shape"):
            Dequantized(find_artifact(file), other)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", MHA)
    file = write_gguf(model, tmp_path / "peer.gguf")
    data = file.read_bytes()
    at = data.index(b"general.architecture") + len(b"general.architecture") + 4 + 8
    file.write_bytes(data[:at] + b"phi2" + data[at + 4 :])
    with pytest.raises(UnsupportedError, match="architecture 'phi2', expected 'phi3'"):
        Dequantized(find_artifact(file), spec_of(model))


def test_a_type_without_a_codec_is_refused_by_name(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", MHA)
    file = write_gguf(model, tmp_path / "peer.gguf", KINDS.TQ1_0)
    with pytest.raises(UnsupportedError, match="no codec for tq1_0"):
        Dequantized(find_artifact(file), spec_of(model))
