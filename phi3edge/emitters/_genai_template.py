"""A chat template that ONNX Runtime GenAI renders as transformers does.

The runtime's engine knows most of Jinja, but none of the settings that transformers renders with: a line break after a
block goes (trim_blocks), and the spaces before a block that starts a line (lstrip_blocks). Here they go from the text
itself, which then renders alike with those settings and without.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from phi3edge.errors import MissingExtraError

RUNTIME = "ONNX Runtime GenAI"

FILTERS = (
    "count default dictsort e escape int items join last length list lower map reject rejectattr safe select selectattr"
    " sort string tojson trim"
)
TESTS = "boolean defined false float integer iterable mapping none number sequence string true undefined"
METHODS = "endswith get items lstrip rstrip split startswith strip"
"""What the runtime's engine has, of what Jinja and Python have."""

_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")  # a mark of transformers, which the runtime knows too
_OTHER_ESCAPES = re.compile(r"\\[^nrt\\'\"]")


def runtime_template(template: str, notes: list[str]) -> str:
    """The template as the runtime should read it; what its engine cannot do is noted.

    Raises:
        MissingExtraError: Jinja is not installed.
    """
    try:
        from jinja2 import Environment, TemplateSyntaxError, nodes
        from jinja2.ext import loopcontrols
        from jinja2.meta import find_undeclared_variables
    except ImportError:
        raise MissingExtraError("writing ONNX Runtime GenAI folders", "onnx") from None
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    try:
        tokens = [(kind, value) for _, kind, value in environment.lex(template)]
        text = "".join(_plain(tokens))
        tree = environment.parse(_GENERATION.sub("", text))
        undeclared = find_undeclared_variables(tree)
    except TemplateSyntaxError as error:
        notes.append(f"the chat template is not valid: {error}")
        return template
    lacking = {f"filter {node.name!r}" for node in tree.find_all(nodes.Filter) if node.name not in FILTERS.split()}
    lacking |= {f"test {node.name!r}" for node in tree.find_all(nodes.Test) if node.name not in TESTS.split()}
    called = [node.node for node in tree.find_all(nodes.Call)]
    lacking |= {f"method {n.attr!r}" for n in called if isinstance(n, nodes.Getattr) and n.attr not in METHODS.split()}
    blocks = (nodes.With, nodes.CallBlock, nodes.FilterBlock, nodes.Block, nodes.Include, nodes.Import, nodes.Extends)
    lacking |= {f"block {type(node).__name__!r}" for node in tree.find_all(blocks)}
    if any(kind == "raw_begin" for kind, _ in tokens):
        lacking.add("block 'raw'")
    if lacking:
        notes.append(f"{RUNTIME} cannot render the chat template: it has no {', '.join(sorted(lacking))}")
    # `in` looks up a key or an item; in a text it finds nothing
    if any(
        operand.op in ("in", "notin") and isinstance(operand.expr, (nodes.Getattr, nodes.Getitem))
        for compare in tree.find_all(nodes.Compare)
        for operand in compare.ops
    ):
        notes.append(f"the chat template may look for text in a text by 'in', which {RUNTIME} does not find")
    # transformers gives these as none, the runtime not at all
    missing = sorted(undeclared & {"tools", "documents"})
    return "".join(f"{{% if {n} is not defined %}}{{% set {n} = none %}}{{% endif %}}" for n in missing) + text


def _plain(tokens: list[tuple[str, str]]) -> Iterator[str]:
    """The text of Jinja's tokens, without comments, the marks '+', and what its two settings take away.

    A line break that stays where a setting would take it is written as an expression, which no setting touches.
    """
    after_tag = False
    for n, (kind, value) in enumerate(tokens):
        following = tokens[n + 1][1] if n + 1 < len(tokens) else ""
        if kind == "data":
            start = value[:1] if after_tag and value.startswith("\n") else ""
            value = value[len(start) :]
            kept = value.rstrip(" \t") if following == "{%+" else value if following else value.removesuffix("\n")
            yield _expression(start) + kept + _expression(value[len(kept) :])
        elif kind in ("block_end", "raw_begin", "raw_end"):
            yield value.rstrip("\n").replace("+%}", "%}")
        elif kind == "block_begin":
            yield value.replace("{%+", "{%")
        elif kind == "string" and _OTHER_ESCAPES.search(value):
            quote, said = value[0], value[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
            yield quote + said.replace("\\", "\\\\").replace(quote, "\\" + quote) + quote
        elif not kind.startswith("comment"):
            yield value
        after_tag = kind in ("block_end", "comment_end", "raw_end")


def _expression(space: str) -> str:
    """White space as an expression."""
    return "{{ '" + space.replace("\n", "\\n").replace("\t", "\\t") + "' }}" if space else ""
