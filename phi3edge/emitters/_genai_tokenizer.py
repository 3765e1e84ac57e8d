"""The tokenizer files of an ONNX Runtime GenAI folder."""

from __future__ import annotations

from pathlib import Path

from phi3edge.types import ModelSpec


def tokenizer_files(checkpoint: Path, spec: ModelSpec) -> tuple[dict[str, bytes], list[str]]:
    """Names and contents of the files, and notes."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    return {name: (checkpoint / name).read_bytes() for name in names if (checkpoint / name).is_file()}, []
