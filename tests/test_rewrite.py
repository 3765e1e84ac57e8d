"""A rewritten checkpoint computes what the original does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from _models import GROUPED, MHA, TIED, Shape, write_model

from phi3edge.checkpoint import open_checkpoint
from phi3edge.families import parse_config
from phi3edge.forward import Decoder, load_block, load_outer
from phi3edge.rewrite import Rewritten, rotation


@pytest.mark.parametrize("shape", [MHA, GROUPED, TIED, Shape(hidden=192, heads=6, kv_heads=2)])
@pytest.mark.parametrize("turn_values", [True, False])
def test_the_logits_stay_what_they_were(tmp_path: Path, shape: Shape, turn_values: bool) -> None:
    folder = write_model(tmp_path / "model", shape)
    ids = torch.randint(0, shape.vocab, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode(), open_checkpoint(folder) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        rewritten = Rewritten(checkpoint, spec, turn_values)
        decoder = Decoder(spec)
        logits = []
        for source in (checkpoint, rewritten):
            h = load_outer(source, spec, "embedding")[ids]
            for layer in range(spec.layers):
                h = decoder.block(h, load_block(source, spec, layer))
            h = decoder.norm(h, load_outer(source, spec, "output_norm"))
            logits.append(h @ load_outer(source, spec, "head").T)
        changed = [t.role for t in spec.tensors if not np.array_equal(checkpoint.read(t.name), rewritten.read(t.name))]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=2e-4)
    assert {"ffn_gate_up", "ffn_down"} <= set(changed)
    assert ("embedding" in changed) == (not shape.tied)
    assert ("attn_output" in changed) == (turn_values or not shape.tied)


def test_rows_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    with torch.inference_mode(), open_checkpoint(write_model(tmp_path / "model", GROUPED)) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        rewritten = Rewritten(checkpoint, spec)
        for tensor in spec.tensors:
            whole = rewritten.read(tensor.name)
            assert whole.shape == tensor.shape
            if len(tensor.shape) == 2:
                np.testing.assert_allclose(rewritten.rows(tensor.name, 3, 7), whole[3:7], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 96, 768])
def test_a_rotation_is_orthogonal_and_spreads_every_channel(size: int) -> None:
    matrix = rotation(size, 0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size), rtol=0, atol=1e-5)
    assert torch.equal(matrix, rotation(size, 0))
    odd = size // (size & -size)
    assert matrix.abs().max() <= (odd / size) ** 0.5 + 1e-6
