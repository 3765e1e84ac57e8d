"""ONNX Runtime GenAI folders of small checkpoints, written by phi3edge itself from recipes made in place."""

from pathlib import Path
from typing import Any

from phi3edge.build import Exported, export


def write_recipe(folder: Path, linear: str, **codecs: str) -> str:
    """A recipe of one codec for all linears, and of others by role; its path."""
    path = folder / f"{'-'.join([linear, *codecs.values()])}.toml"
    lines = {"linear": linear, "norm": "f32", **codecs}
    path.write_text(
        "\n".join(['summary = "test"', 'formats = ["onnx"]', "[codecs]", *(f'{k} = "{v}"' for k, v in lines.items())])
    )
    return str(path)


def make(checkpoint: Path, out: Path, linear: str, target: str = "cpu", **codecs: Any) -> Exported:
    """Export a checkpoint as an ONNX folder; arguments of `export` may stand between the codecs by role."""
    options = {key: codecs.pop(key) for key in ("threads", "split_max_size", "context") if key in codecs}
    recipe = write_recipe(out.parent, linear, **codecs)
    return export(str(checkpoint), target, recipe=recipe, format_="onnx", out=out, **options)
