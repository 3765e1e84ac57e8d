"""From the name that a user types to a checkpoint: "demo", a folder, or "organization/name[@revision]" on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from phi3edge import registry
from phi3edge.cache import cache_dir
from phi3edge.checkpoint import (
    CONFIG,
    GENERATION_CONFIG,
    Checkpoint,
    cached_source,
    model_name,
    open_checkpoint,
    read_json,
)
from phi3edge.errors import CheckpointError
from phi3edge.families import parse_config
from phi3edge.progress import Told
from phi3edge.types import ModelSpec, Source

DEMO = "demo"


def resolve(name: str, progress: Told | None = None) -> Checkpoint:
    """Open a checkpoint by name; fetch it or build it if it is not here.

    Args:
        name: a folder wins over the hub; write ./demo for a folder of that name.
        progress: told of the bytes that are downloaded or built, if any are.

    Raises:
        CheckpointError: nothing of that name, or it cannot be read.
        HubError: the hub cannot give it.
    """
    folder, source = _locate(name, progress, weights=True)
    return open_checkpoint(folder, source)


def resolve_spec(name: str, progress: Told | None = None) -> ModelSpec:
    """What a checkpoint is, from its config alone: no weights are read, and none are fetched from the hub.

    Raises:
        CheckpointError, HubError, UnsupportedError: see `resolve`.
    """
    folder, source = _locate(name, progress, weights=False)
    generation = read_json(folder, GENERATION_CONFIG) if (folder / GENERATION_CONFIG).exists() else None
    return parse_config(read_json(folder, CONFIG), generation, model_name(folder, source))


def _locate(name: str, progress: Told | None, weights: bool) -> tuple[Path, Source]:
    if name == DEMO:
        from phi3edge.demo import build_demo

        return build_demo(cache_dir(), progress=progress), Source(DEMO, None)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, cached_source(folder)
    if folder.exists():
        raise CheckpointError(f"{name} is a file", "name the folder that holds config.json and the weights")
    if match := re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", name):
        from phi3edge.hub import pull

        return pull(match[1], match[2], progress, weights=weights)
    if os.sep in name or name.startswith((".", "~")):
        raise CheckpointError(f"no folder {name}")
    near = [DEMO, *(f"./{p.parent.name}" for p in Path.cwd().glob(f"*/{CONFIG}"))]
    hint = f"{registry.did_you_mean(name, near)}; a hub model is organization/name"
    raise CheckpointError(f"no checkpoint {name!r}", hint)
