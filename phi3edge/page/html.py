"""HTML as values: text becomes markup only through here, and is escaped on the way."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

_VOID = ("br", "meta")


class Html(str):
    """Markup: not escaped again."""

    __slots__ = ()


Content: TypeAlias = "Html | str | None"


def tag(name: str, /, *content: Content, **attributes: str | bool | None) -> Html:
    """An element.

    Args:
        name: of the element.
        content: markup as it is, text escaped; None is left out.
        attributes: `class_` stands for class and `_` for `-`; True is an attribute without a value, None and False are
            none.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{written}>" if name in _VOID else f"<{name}{written}>{join(content)}</{name}>")


def join(parts: Iterable[Content]) -> Html:
    """Parts in a row: markup as it is, text escaped."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts if part is not None))


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[Content]], *, hidden_caption: bool = False
) -> Html:
    """A table that scrolls within itself on a narrow screen.

    Args:
        caption: what it shows.
        columns: headings; those that start with ">" are of figures, aligned to the right.
        rows: cells; the first of a row is its heading.
        hidden_caption: for screen readers only, where the text above says it.
    """
    figures = [column.startswith(">") for column in columns]
    head = [
        tag("th", column.lstrip(">"), scope="col", class_="num" if right else None)
        for column, right in zip(columns, figures, strict=True)
    ]
    body = []
    for row in rows:
        cells = [
            tag("th", cell, scope="row") if number == 0 else tag("td", cell, class_="num" if figures[number] else None)
            for number, cell in enumerate(row)
        ]
        body.append(tag("tr", *cells))
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption, class_="hidden" if hidden_caption else None),
            tag("thead", tag("tr", *head)),
            tag("tbody", *body),
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def bar(share: float, kind: str = "") -> Html:
    """A bar of a share of its full length; for the eye only, as a figure stands beside it."""
    width = 100 * min(max(share, 0.0), 1.0)
    return tag(
        "span",
        tag("span", style=f"width:{width:.1f}%", class_=kind or None),
        class_="bar",
        aria_hidden="true",
    )


def details(summary: Content, *content: Content, printed: bool = False) -> Html:
    """A part that opens on request; on paper, if `printed`."""
    return tag("details", tag("summary", summary), *content, data_print=printed)


def definitions(pairs: Iterable[tuple[str, Content]]) -> Html:
    """A list of terms and what they are; those that are None or empty are left out."""
    return tag("dl", *(tag("div", tag("dt", term), tag("dd", value)) for term, value in pairs if value))


def code(text: str) -> Html:
    """A command, hash or name, as it is typed."""
    return tag("code", text)


def visible(token: str) -> Html:
    """A token's text with its white space to be seen."""
    shown = []
    for character in token:
        mark = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}.get(character)
        shown.append(tag("span", mark, class_="blank") if mark else join([_printable(character)]))
    return tag("code", *shown, class_="token") if token else tag("span", "(nothing)", class_="blank")


def _printable(character: str) -> str:
    return character if character.isprintable() else f"\\u{ord(character):04x}"


def data_script(content: Any, **attributes: str) -> Html:
    """Data for the page's script: JSON that no text within can end, as it has no "<"."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")
    return tag("script", Html(text.replace("&", "\\u0026")), type="application/json", **attributes)
