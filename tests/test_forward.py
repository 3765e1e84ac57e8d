"""The float forward pass against transformers, which reads the same checkpoint."""

from pathlib import Path

import pytest
import torch
from _models import GROUPED, MHA, TIED, Shape, write_model

from phi3edge.checkpoint import open_checkpoint
from phi3edge.families import parse_config
from phi3edge.forward import LINEARS, Decoder, load_block, load_outer
from phi3edge.reference import load_model

TOKENS = 48


@pytest.mark.parametrize("shape", [MHA, GROUPED, TIED], ids=["mha", "grouped", "tied"])
@pytest.mark.parametrize("window", [None, 20], ids=["full", "window"])
def test_block_by_block_gives_the_logits_of_transformers(tmp_path: Path, shape: Shape, window: int | None) -> None:
    folder = write_model(tmp_path / "model", shape, sliding_window=window)
    ids = torch.randint(0, shape.vocab, (3, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode(), open_checkpoint(folder) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        decoder = Decoder(spec)
        h = load_outer(checkpoint, spec, "embedding")[ids]
        for layer in range(spec.layers):
            h = decoder.block(h, load_block(checkpoint, spec, layer))
        h = decoder.norm(h, load_outer(checkpoint, spec, "output_norm"))
        logits = h @ load_outer(checkpoint, spec, "head").T
        expected = load_model(folder)(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)


def test_observers_see_the_input_of_each_linear_in_order(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", GROUPED)
    seen: list[tuple[str, torch.Size]] = []
    with torch.inference_mode(), open_checkpoint(folder) as checkpoint:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, "tiny")
        weights = load_block(checkpoint, spec, 1)
        h = torch.randn(2, 5, spec.hidden_size)
        Decoder(spec).block(h, weights, lambda role, x: seen.append((role, x.shape)))
    assert [role for role, _ in seen] == list(LINEARS)
    for role, shape in seen:
        assert shape == (2, 5, weights[role].shape[1])
