"""Strict loading of the TOML files that users write: recipes, targets; and providers."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from phi3edge.errors import ConfigError, UsageError
from phi3edge.registry import did_you_mean
from phi3edge.units import parse_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Strict(BaseModel):
    """A model that refuses unknown keys and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _size(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except UsageError as error:
        raise ValueError(f"{error.message}; {error.hint}") from None


Size = Annotated[int, BeforeValidator(_size), Field(gt=0)]
"""Bytes, from a number or as people write them: "1.5 GB"."""

M = TypeVar("M", bound=Strict)


@cache
def shipped(kind: str) -> dict[str, Path]:
    """The files of a kind ("providers", "recipes", "targets") that come with phi3edge, by name, sorted."""
    inside = Path(__file__).parent
    folder = inside / kind if (inside / kind).is_dir() else inside.parent / kind
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(kind: str, name: str, schema: type[M]) -> tuple[str, M]:
    """Load a shipped file by its name, or a user's own by its path (anything that ends in .toml).

    Returns:
        The name (the file's stem) and the validated content.

    Raises:
        ConfigError: no such file, invalid TOML, or an unknown, missing or wrong key; the message names the key.
    """
    singular = kind.rstrip("s")
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"{singular} file {name} does not exist")
    elif name in shipped(kind):
        path = shipped(kind)[name]
    else:
        raise ConfigError(f"unknown {singular} {name!r}", did_you_mean(name, list(shipped(kind))))
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not valid TOML: {error}") from None
    try:
        return path.stem, schema.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{path.name}: unknown key {where!r}", _nearest_key(schema, first["loc"])) from None
        if first["type"] == "missing":
            raise ConfigError(f"{path.name}: {where} is missing", f"see the shipped ones: phi3edge {kind}") from None
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path.name}: {where}: {message}; got {first.get('input')!r}") from None


def _nearest_key(schema: type[BaseModel], where: tuple[int | str, ...]) -> str | None:
    """A hint for an unknown key, from the fields of the (possibly nested) model that it stands in."""
    fields = schema.model_fields
    for part in where[:-1]:
        inner = fields[part].annotation if part in fields else None
        for candidate in (inner, *getattr(inner, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                fields = candidate.model_fields
                break
    return did_you_mean(str(where[-1]), list(fields))
