"""The text an artifact is scored on: a user's file, or prose that every installed Python carries."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from phi3edge.errors import UsageError

# modules that are one file of that name in every Python from 3.10 to 3.13, and say a lot in their docstrings
# fmt: off
MODULES = (
    "argparse", "_pydecimal", "cmd", "codecs", "collections/__init__", "configparser", "contextlib", "copy",
    "csv", "difflib", "doctest", "email/message", "enum", "fractions", "ftplib", "functools", "gettext",
    "heapq", "http/client", "http/cookiejar", "imaplib", "inspect", "ipaddress", "logging/__init__",
    "mailbox", "optparse", "os", "pdb", "pickle", "pickletools", "pprint", "random", "sched", "selectors",
    "shutil", "smtplib", "socketserver", "statistics", "subprocess", "tarfile", "tempfile", "textwrap",
    "threading", "timeit", "traceback", "types", "typing", "unittest/case", "unittest/mock", "urllib/parse",
    "urllib/request", "weakref", "xmlrpc/client",
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Text:
    """A text to score on.

    Attributes:
        name: what it is, for the report; no path.
        sha256: of its UTF-8 bytes, in hexadecimal.
    """

    name: str
    text: str
    sha256: str


def default_text() -> Text:
    """Sections of Python's language reference and docstrings of its standard library, in turn; about 1.3 MB.

    Read from the installed sources, never imported. It differs a little from one version of Python to the next: the
    report records its hash, and figures are comparable only where the hashes agree.

    Raises:
        UsageError: this Python comes without its sources.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    try:
        topics = _strings(ast.parse((stdlib / "pydoc_data/topics.py").read_text(encoding="utf-8")))
        modules = [docstrings(ast.parse((stdlib / f"{m}.py").read_text(encoding="utf-8"))) for m in MODULES]
    except OSError as error:
        raise UsageError(
            f"this Python has no {Path(error.filename).name} to take the default text from",
            "give a text of your own: --text FILE",
        ) from None
    parts = [part for pair in zip_longest(topics, modules) for part in pair if part]
    return _text(f"python-{sysconfig.get_python_version()} docs", "\n\n\n".join(parts))


def read_text(path: Path) -> Text:
    """A user's text file, UTF-8.

    Raises:
        UsageError: no such file, or not UTF-8.
    """
    try:
        return _text(path.name, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the text {path} is not UTF-8 (byte {error.start})", "convert it, or give another one"
        ) from None


def cut(ids: list[int], chunks: int | None, tokens: int, stride: int, name: str) -> np.ndarray:
    """Windows of a text from its beginning: int64, shape (chunks, tokens).

    Args:
        ids: the text.
        chunks: number of windows; None for as many as there are.
        tokens: in each.
        stride: tokens from one's start to the next one's.
        name: the text's, for the error.

    Raises:
        UsageError: the text is too short.
    """
    most = max((len(ids) - tokens) // stride + 1, 0)
    if (chunks or 1) > most:
        needed = ((chunks or 1) - 1) * stride + tokens
        raise UsageError(
            f"the text {name} has {len(ids)} tokens; {chunks or 1} chunks of {tokens} need {needed}",
            f"give a longer text, or --chunks {most}" if most else "give a longer text",
        )
    windows = np.lib.stride_tricks.sliding_window_view(np.array(ids, dtype=np.int64), tokens)[::stride]
    return windows[: chunks or most].copy()


def _text(name: str, text: str) -> Text:
    return Text(name, text, hashlib.sha256(text.encode()).hexdigest())


def _strings(module: ast.Module) -> list[str]:
    """Values of the one dictionary that pydoc_data/topics.py assigns, in its order."""
    table = next(n.value for n in module.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Dict))
    return [ast.literal_eval(value) for value in table.values]


def docstrings(node: ast.AST) -> str:
    """All docstrings below a node, in source order."""
    own = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
    below = (docstrings(child) for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
    return "\n\n".join(filter(None, (own, *below)))


_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
