"""LongRoPE and partial rotary embeddings: read, computed, written and run as the checkpoint means them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _models import GROUPED, TIED, phi3_config, write_model

from phi3edge.build import export, prepare
from phi3edge.checkpoint import open_checkpoint
from phi3edge.errors import CheckpointError, UnsupportedError
from phi3edge.families import parse_config
from phi3edge.forward import Decoder, load_block, load_outer
from phi3edge.proof import Protocol, validate_artifact
from phi3edge.reference import load_model
from phi3edge.runners import llama_cpp, ort_genai
from phi3edge.validate import Windows

ORIGINAL, CONTEXT, PAIRS = 256, 1024, 32
FACTOR = math.sqrt(1 + math.log(CONTEXT / ORIGINAL) / math.log(ORIGINAL))


def longrope(kind: str = "longrope", pairs: int = PAIRS, **changes) -> dict:
    """config.json's keys of a LongRoPE model; every factor is its own, so that none can be ignored unseen."""
    scaling = {
        "type": kind,
        "short_factor": [1 + 0.05 * n for n in range(pairs)],
        "long_factor": [1.5 + 0.5 * n for n in range(pairs)],
    }
    return {
        "max_position_embeddings": CONTEXT,
        "original_max_position_embeddings": ORIGINAL,
        "sliding_window": 2048,
        "rope_scaling": scaling | changes,
    }


KINDS = {
    "longrope": (GROUPED, longrope()),
    "su": (GROUPED, longrope("su")),
    "partial, tied": (TIED, longrope(pairs=24) | {"partial_rotary_factor": 0.75}),
    "partial, plain": (GROUPED, {"partial_rotary_factor": 0.75, "max_position_embeddings": CONTEXT}),
}


@pytest.fixture(scope="module", params=list(KINDS))
def model(request, tmp_path_factory) -> Path:
    shape, changes = KINDS[request.param]
    return write_model(tmp_path_factory.mktemp("model") / "tiny", shape, **changes)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "long", GROUPED, **longrope())


def reference(model: Path, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return load_model(model)(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].numpy()


def ids(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 320, count)


LENGTHS = (40, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 400)


def test_the_configuration_is_read(long_model: Path) -> None:
    spec = parse_config(json.loads((long_model / "config.json").read_text()), None, "x")
    assert spec.rope.by_length
    assert spec.rope.dim == 64
    assert spec.rope.long_factors == tuple(longrope()["rope_scaling"]["long_factor"])
    assert spec.rope.attention_factor == pytest.approx(FACTOR)
    assert pytest.approx(1.118, abs=1e-3) == FACTOR


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (longrope("yarn"), UnsupportedError, "'yarn'.*default, longrope, su"),
        (longrope(short_factor=[1.0]), CheckpointError, "short_factor.*list of 32 numbers"),
        (longrope(long_factor=None), CheckpointError, "long_factor.*list of 32 numbers"),
        (longrope(long_factor=[0.0] * PAIRS), CheckpointError, "long_factor.*positive"),
        (longrope(extra=1), UnsupportedError, "unknown key 'extra'"),
        (longrope(original_max_position_embeddings=4096), CheckpointError, "is 256, but 4096"),
        ({"rope_scaling": [1]}, CheckpointError, "expected an object"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, UnsupportedError, "'linear'"),
        ({"partial_rotary_factor": 0.33}, CheckpointError, "even number"),
        ({"partial_rotary_factor": 1.5}, CheckpointError, "even number"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes: dict, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        parse_config(phi3_config(GROUPED, **changes), None, "x")


def test_our_forward_is_transformers_on_both_sides(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "x")
        decoder = Decoder(spec)
        for length in LENGTHS:
            tokens = ids(length)
            h = load_outer(checkpoint, spec, "embedding")[torch.from_numpy(tokens)][None]
            for layer in range(spec.layers):
                h = decoder.block(h, load_block(checkpoint, spec, layer))
            h = decoder.norm(h, load_outer(checkpoint, spec, "output_norm"))
            ours = (h @ load_outer(checkpoint, spec, "head").T)[0].detach().numpy()
            np.testing.assert_allclose(ours, reference(model, tokens), atol=2e-4)


def test_an_onnx_folder_is_exact_below_at_and_above(model: Path, tmp_path: Path) -> None:
    made = export(str(model), "cpu", format_="onnx", recipe="f32", out=tmp_path / "out", context=CONTEXT)
    with ort_genai.open(made.folder, context=CONTEXT, threads=1) as runner:
        for length in LENGTHS:
            np.testing.assert_allclose(runner.logits(ids(length)), reference(model, ids(length)), atol=3e-4)


def test_greedy_answers_cross_the_original_context(tmp_path: Path) -> None:
    """Each next token is that of the whole sequence, rotated for its length; the runtime knows 4,096 only."""
    lengths = {"max_position_embeddings": 8192, "original_max_position_embeddings": 4096}
    model = write_model(tmp_path / "in", GROUPED, **longrope() | lengths, eos_token_id=0)
    (model / "generation_config.json").unlink()
    made = export(str(model), "cpu", format_="onnx", recipe="f32", out=tmp_path / "out", context=4200)
    sequence = ids(4094).tolist()
    with ort_genai.open(made.folder, context=4200, threads=1) as runner:
        found = runner.generate(sequence, 6)
    assert len(found) > 3
    for token in found:
        logits = reference(model, np.array(sequence))[-1]
        assert logits[token] == pytest.approx(logits.max(), abs=1e-4)
        sequence.append(token)


def test_a_gguf_file_is_exact_on_the_side_it_is_opened_for(model: Path, tmp_path: Path) -> None:
    spec = parse_config(json.loads((model / "config.json").read_text()), None, "x")
    made = export(str(model), "cpu", format_="gguf", recipe="f32", out=tmp_path / "out", context=64)
    with llama_cpp.open(made.artifact, context=CONTEXT, threads=1, kv_type="f32", plain=True) as runner:
        np.testing.assert_allclose(runner.logits(ids(400)), reference(model, ids(400)), atol=2e-2)
        inside = np.abs(runner.logits(ids(40)) - reference(model, ids(40))).mean()
    assert (inside > 0.05) == spec.rope.by_length  # the other side's factors


def test_a_gguf_file_says_which_side_it_is_for(long_model: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    short = export(str(long_model), "cpu", format_="gguf", recipe="q8_0", out=tmp_path / "short", context=ORIGINAL)
    long = export(str(long_model), "cpu", format_="gguf", recipe="q8_0", out=tmp_path / "long", context=CONTEXT)
    fields = [GGUFReader(made.artifact).fields for made in (short, long)]
    assert [f["phi3.context_length"].contents() for f in fields] == [ORIGINAL, CONTEXT]
    assert fields[0]["phi3.rope.scaling.attn_factor"].contents() == pytest.approx(FACTOR)
    tensors = {t.name: t.data for t in GGUFReader(long.artifact).tensors}
    np.testing.assert_array_equal(
        tensors["rope_factors_short.weight"], np.float32(longrope()["rope_scaling"]["short_factor"])
    )
    assert any(f"up to {ORIGINAL} tokens" in note for note in short.notes)
    assert any(f"above {ORIGINAL} tokens" in note for note in long.notes)
    assert prepare(str(long_model), "cpu", format_="gguf", context=CONTEXT).fit.context == CONTEXT


def test_split_files_hold_the_factors_once(long_model: Path, tmp_path: Path) -> None:
    made = export(
        str(long_model), "cpu", format_="gguf", recipe="f32", out=tmp_path / "s", context=64, split_max_size=2_000_000
    )
    assert len(made.files) > 2
    assert max(path.stat().st_size for path in made.files) <= 2_000_000
    with llama_cpp.open(made.artifact, context=512, threads=1, kv_type="f32", plain=True) as runner:
        np.testing.assert_allclose(runner.logits(ids(400)), reference(long_model, ids(400)), atol=2e-2)


def test_a_report_shows_both_sides(long_model: Path, tmp_path: Path) -> None:
    protocol = Protocol(windows=Windows(2, 64), threads=1)
    for format_, exact_everywhere in (("onnx", True), ("gguf", False)):
        made = export(
            str(long_model), "cpu", format_=format_, recipe="f32", out=tmp_path / format_, context=512, kv_cache="f32"
        )
        report, *_ = validate_artifact(made.folder, protocol=replace(protocol))
        bands = {(b.first, b.tokens, b.allocated): b.kl.value for b in report.positions}
        assert list(bands) == [
            (240, 256, 256),
            (240, 256, 512),
            (256, 512, 512),
            (495, 512, 512),
        ]
        right = [(240, 256, 256), (256, 512, 512), (495, 512, 512)]
        assert all(bands[place] < 1e-4 for place in right)
        assert (bands[240, 256, 512] < 1e-4) == exact_everywhere
        assert (report.metrics["kl_mean"].value < 1e-4) == exact_everywhere  # windows of 64 in a context of 512
