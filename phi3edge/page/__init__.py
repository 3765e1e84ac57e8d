"""The page of a validation: report.html and comparison.html, for a person who must decide. One file, no network.

Vega-Lite draws the charts in the browser, from JavaScript that vl-convert carries and that is written into the page.
The page's own policy (CSP) allows no connection, no other script and no evaluated code, whatever a report holds.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import import_module, resources
from pathlib import Path

from phi3edge import __version__, folders
from phi3edge.comparison import Comparison, beside, read_comparison
from phi3edge.errors import MissingExtraError, OutputError
from phi3edge.files import write_text
from phi3edge.page import made, measured, overview
from phi3edge.page.entries import read_entry
from phi3edge.page.html import Html, join, tag
from phi3edge.report import Report, read_report


def require_plotting() -> None:
    """Raise unless pages can be written here.

    Raises:
        MissingExtraError: vl-convert is not installed.
    """
    try:
        import_module("vl_convert")
    except ImportError:
        raise MissingExtraError("writing an HTML page", "report") from None


def write(folder: Path) -> Path:
    """Write the page of what lies in a folder, beside it.

    Args:
        folder: an artifact's, with its report.json: report.html; or one of several formats: comparison.html.

    Returns:
        The page.

    Raises:
        MissingExtraError: see `require_plotting`.
        OutputError: no report there, or another file there is not what its name says.
        ConfigError: the report is not one.
    """
    if parts := folders.artifacts_in(folder):
        kept = folder / folders.COMPARISON
        found = read_comparison(kept) if kept.is_file() else beside({part.name: _report_in(part) for part in parts})
        page = folder / folders.COMPARISON_PAGE
        text = render(found, {part.name: part for part in parts})
    else:
        page = folder / folders.PAGE
        text = render(_report_in(folder), {folder.resolve().name: folder})
    write_text(page, text)
    return page


def render(found: Report | Comparison, places: Mapping[str, Path] = {}) -> str:
    """The page as one HTML text.

    Args:
        found: of one artifact, or of several side by side.
        places: folders of artifacts by their names in the comparison (of one report's, whatever its name is), to show
            how they were made and what else was measured.

    Raises:
        MissingExtraError: see `require_plotting`.
        OutputError: a file in a folder is not what its name says.
    """
    require_plotting()
    pairs = found.pairs if isinstance(found, Comparison) else []
    if isinstance(found, Comparison):
        entries = [read_entry(name, report, places.get(name)) for name, report in found.reports.items()]
    else:
        entries = [read_entry(found.artifact[0].name, found, next(iter(places.values()), None))]
    sections = [
        section
        for section in (
            overview.gates(entries),
            overview.sizes(entries),
            overview.pairs(entries, pairs),
            overview.figures(entries),
            measured.distribution(entries),
            measured.layers(entries),
            measured.positions(entries),
            measured.answers(entries),
            measured.tokens(entries),
            measured.speed(entries),
            measured.memory(entries),
            measured.evaluation(entries),
            made.plan(entries),
            made.provenance(entries),
            made.not_run(entries),
        )
        if section is not None
    ]
    title = entries[0].name if len(entries) == 1 else f"{len(entries)} artifacts of {entries[0].report.checkpoint.name}"
    links = [tag("li", tag("a", section.title, href=f"#{section.name}")) for section in sections]
    body = join(
        [
            tag("a", "Skip to the verdict", href="#verdict", class_="skip"),
            tag(
                "header",
                tag("h1", title),
                overview.subtitle(entries),
                tag("nav", tag("ul", *links), aria_label="Sections"),
            ),
            tag("main", overview.verdict(entries), *(section.html for section in sections)),
            tag("footer", f"Written by phi3edge {__version__}. This page holds all of its data and loads nothing."),
            tag("div", id="tip", hidden=True),
        ]
    )
    return _document(title, body)


def _report_in(folder: Path) -> Report:
    path = folder / folders.REPORT
    if not path.is_file():
        raise OutputError(f"{folder} has no {folders.REPORT}", f"phi3edge validate {folder}")
    return read_report(path)


def _document(title: str, body: Html) -> str:
    scripts = [_vega(), _own("page.js")]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(_own("page.css"))),
    )
    drawn = tag("body", body, *(tag("script", Html(script)) for script in scripts))
    return f"<!DOCTYPE html>\n{tag('html', head, drawn, lang='en')}\n"


def _own(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


@cache
def _vega() -> str:
    """Vega-Lite and what it needs, as a script that defines vegaEmbed."""
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    assert "</script" not in script.lower()
    return script
