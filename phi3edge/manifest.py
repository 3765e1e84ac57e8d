"""phi3edge.json: what an artifact is, what it was made from and how, so that it can be checked and made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, ValidationError

from phi3edge.errors import OutputError
from phi3edge.files import Advance, sha256, write_text
from phi3edge.types import JSON

NAME = "phi3edge.json"
SCHEMA = 1

PlainName = Annotated[str, StringConstraints(pattern=r"^[^/\\:]+$", strip_whitespace=False)]


class _File(BaseModel):
    name: PlainName
    bytes: int = Field(ge=0)
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Model(BaseModel):
    checkpoint: str
    licence: str | None


class _Recipe(BaseModel):
    name: str


class _Manifest(BaseModel):
    """The fields that phi3edge itself reads; there are more, for people and tools."""

    version: Literal[1] = Field(alias="schema")
    files: list[_File] = Field(min_length=1)
    model: _Model
    target: str
    context: int = Field(gt=0)
    recipe: _Recipe
    notes: list[str]
    format: Literal["gguf", "onnx"] = "gguf"
    requires: dict[str, str] = {}


def write_json(path: Path, content: Any) -> None:
    """Write a JSON document; see `files.write_text`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> JSON:
    """The manifest of an artifact's folder.

    Raises:
        OutputError: no manifest, not JSON, one that lacks a field or names files outside its folder, or one from
            another version of phi3edge.
    """
    path = folder / NAME
    if not path.is_file():
        raise OutputError(f"{folder} has no {NAME}; expected a folder that phi3edge export wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OutputError(f"{path} is not a phi3edge manifest: {error}") from None
    if isinstance(content, dict) and content.get("schema", SCHEMA) != SCHEMA:
        raise OutputError(
            f"{path} has schema {content['schema']}; this phi3edge reads {SCHEMA}",
            "use the phi3edge that wrote it, or a newer one",
        )
    try:
        _Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise OutputError(f"{path} is not a phi3edge manifest: {where}: {first['msg']}", "export again") from None
    return content


def verify(folder: Path, advance: Advance | None = None) -> list[str]:
    """Compare an artifact's files with its manifest.

    Returns:
        One line for each file that is missing, has another size, or has another hash; empty if all is well.

    Raises:
        OutputError: no readable manifest.
    """
    problems = []
    for entry in read_manifest(folder)["files"]:
        name = entry["name"]
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name}: {path.stat().st_size} bytes, expected {entry['bytes']}")
        elif (found := sha256(path, advance)) != entry["sha256"]:
            problems.append(f"{name}: sha256 {found}, expected {entry['sha256']}")
    return problems
