"""Finds codecs, families, methods, emitters and runners: one Python file each, found by its name.

`names("codecs")` lists files without importing them; `load("codecs", "q4_k")` imports one. A file whose name starts
with an underscore is shared code, not an entry.
"""

import difflib
import importlib
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType

from phi3edge.errors import ConfigError

MOST_NAMED = 20
"""Choices that a hint lists at most; it has to fit on a line."""


@cache
def names(kind: str) -> tuple[str, ...]:
    """The names of all entries of a kind ("codecs", "families", "methods", "emitters", "runners"), sorted."""
    folder = Path(__file__).parent / kind
    return tuple(sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_")))


def load(kind: str, name: str) -> ModuleType:
    """The module of one entry.

    Raises:
        ConfigError: no file of that name; the message names the nearest one.
    """
    if name not in names(kind):
        raise ConfigError(f"unknown {kind.rstrip('s')} {name!r}", did_you_mean(name, names(kind)))
    return importlib.import_module(f"phi3edge.{kind}.{name}")


def did_you_mean(word: str, choices: tuple[str, ...] | list[str]) -> str:
    """A hint that names the nearest of the choices, or lists them."""
    near = difflib.get_close_matches(word, choices, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(choices[:MOST_NAMED]) or 'none'}{' ...' if len(choices) > MOST_NAMED else ''}"
