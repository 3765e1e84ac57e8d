"""A model of transformers whose weights stay in the checkpoint's files, for machines that cannot hold it in float32.

The files are mapped into memory; the system keeps as many of their pages as it has room for. A linear widens its weight
to float32 each time it computes, in parts: the same numbers as a whole model in float32 has, more slowly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from phi3edge.checkpoint import EMBEDDING, HEAD, open_checkpoint
from phi3edge.errors import CheckpointError

PART = 1 << 26
"""Elements of a weight that are widened at once: 268 MB."""


class StoredLinear(nn.Module):
    """A linear with a weight of any float dtype, shape (rows, columns), that computes in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, False), bias

    def forward(self, x: Tensor) -> Tensor:
        """From shape (..., columns) to (..., rows)."""
        rows = max(1, PART // self.weight.shape[1])
        out = torch.cat([linear(x, part.float()) for part in self.weight.split(rows)], -1)
        return out if self.bias is None else out + self.bias


class StoredEmbedding(nn.Module):
    """An embedding with a weight of any float dtype, shape (rows, columns), whose rows come out in float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, False)

    def forward(self, ids: Tensor) -> Tensor:
        """From ids of any shape to (..., columns)."""
        return embedding(ids, self.weight).float()


def load_stored(checkpoint: Path, config: Any) -> Any:
    """The model of a checkpoint, with its linears and its embedding in the files.

    Args:
        checkpoint: a folder of safetensors files, whose tensors have transformers' names.
        config: as transformers has it.

    Raises:
        CheckpointError: a tensor is missing.
    """
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    weights = _mapped(checkpoint)
    if config.tie_word_embeddings:
        weights[HEAD] = weights.get(EMBEDDING)
    for name in [name for name, _ in model.named_parameters()] + [HEAD]:
        if weights.get(name) is None:
            raise CheckpointError(f"tensor {name!r} is missing from {checkpoint}")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            bias = weights[f"{name}.bias"].float() if module.bias is not None else None
            model.set_submodule(name, StoredLinear(weights[f"{name}.weight"], bias))
        elif isinstance(module, nn.Embedding):
            model.set_submodule(name, StoredEmbedding(weights[f"{name}.weight"]))
        elif name.endswith("rotary_emb"):  # what it computes from the configuration is on no device yet
            model.set_submodule(name, type(module)(config))
    rest = {name: weights[name].float() for name, value in model.named_parameters() if value.is_meta}
    model.load_state_dict(rest, strict=False, assign=True)
    return model


def _mapped(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name; nothing of them is read yet."""
    found: dict[str, Tensor] = {}
    with open_checkpoint(checkpoint) as opened:
        shards = opened.shards
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    return found
