"""Several artifacts of one checkpoint side by side: each against the reference, and each against the others."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from phi3edge._toml import Strict
from phi3edge.errors import ConfigError, UsageError
from phi3edge.metrics import METRICS, Metric, show_value
from phi3edge.report import Report, read_report, to_data
from phi3edge.types import JSON

if TYPE_CHECKING:
    from rich.console import Group

SAME_REFERENCE = 1e-3
"""Relative difference of the reference's perplexity up to which two reports speak of one reference."""

_TOGETHER = "validate them together: phi3edge compare A B, without --reports"


class Pair(Strict):
    """Two artifacts against each other, on the text of their reports.

    Attributes:
        a: name of the first, a key of Comparison.reports.
        b: name of the second.
        kl: KL(a || b) per token in nats, mean.
        top1: share of tokens whose most likely next token is the same.
    """

    a: str
    b: str
    kl: Metric
    top1: Metric


class Comparison(Strict):
    """What a validation of several artifacts found. `passed` holds exactly if every report's does."""

    schema_version: Literal[2] = 2
    passed: bool
    reports: dict[str, Report]
    pairs: list[Pair]


def beside(reports: Mapping[str, Report]) -> Comparison:
    """Reports that are there already, side by side. What the artifacts are to each other is not in them.

    Args:
        reports: by the names that the comparison shall have for them, at least one.

    Raises:
        UsageError: they are of different texts, protocols or references: their figures cannot be compared.
    """
    (first, one), *rest = reports.items()
    for name, report in rest:
        for what, theirs, ours in (
            ("text", one.text.sha256[:12], report.text.sha256[:12]),
            *((f, getattr(one.protocol, f), getattr(report.protocol, f)) for f in ("chunks", "chunk_tokens", "stride")),
        ):
            if theirs != ours:
                raise UsageError(f"{name} has {what} {ours}, {first} {theirs}: they cannot be compared", _TOGETHER)
        theirs, ours = (r.metrics["reference_ppl"].value for r in (one, report))
        if not math.isclose(theirs, ours, rel_tol=SAME_REFERENCE):
            raise UsageError(
                f"{name} is of another reference than {first}: its perplexity is {ours:.4f}, not {theirs:.4f}",
                _TOGETHER,
            )
    return Comparison(passed=all(r.passed for r in reports.values()), reports=dict(reports), pairs=[])


def read_reports(files: Mapping[str, Path]) -> Comparison:
    """Reads the report.json of several artifacts, by name, and puts them side by side.

    Raises:
        UsageError: a file that is not there; or see `beside`.
        ConfigError: one that is not a report of this schema.
    """
    reports = {}
    for name, file in files.items():
        if not file.is_file():
            raise UsageError(f"no report at {file}", "expected a report.json that phi3edge validate wrote")
        try:
            reports[name] = read_report(file)
        except ConfigError as error:
            raise ConfigError(f"{file} is {error.message}", error.hint) from None
    return beside(reports)


def read_comparison(path: Path) -> Comparison:
    """Reads comparison.json.

    Raises:
        ConfigError: not a comparison of this schema.
    """
    try:
        return Comparison.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{path} is not a comparison that phi3edge wrote: {where}: {first['msg']}") from None


def to_json(comparison: Comparison) -> str:
    """The comparison as JSON text, indented."""
    return json.dumps(comparison_data(comparison), indent=2, ensure_ascii=False) + "\n"


def comparison_data(comparison: Comparison) -> JSON:
    """What `to_json` writes, as plain data."""
    data = json.loads(comparison.model_dump_json(exclude={"reports"}))
    return {**data, "reports": {name: to_data(report) for name, report in comparison.reports.items()}}


def render(comparison: Comparison) -> Group:
    """One table, a column for each artifact, for rich's console."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    reports = comparison.reports
    first = next(iter(reports.values()))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for name in reports:
        table.add_column(name, justify="right")
    for name, kind in METRICS.items():
        cells = [r.metrics.get(name) for r in reports.values()]
        if any(cells):
            table.add_row(kind.label, *(show_value(c.value, kind.unit) if c else "not measured" for c in cells))
    gates = []
    for report in reports.values():
        failed = ", ".join(gate.name for gate in report.gates if not gate.passed)
        passed = Text("passed", "green") if report.gates else Text("none set", "dim")
        gates.append(Text(f"FAIL: {failed}", "bold red") if failed else passed)
    table.add_row("gates", *gates)
    pairs = [
        Text(
            f"KL({pair.a} || {pair.b}) {show_value(pair.kl.value, 'nats')}, "
            f"same most likely token {show_value(pair.top1.value, '%')}"
        )
        for pair in comparison.pairs
    ]
    text = f"{first.protocol.scored_tokens} tokens of {first.text.name}; {first.environment.cpu}"
    head = Text.assemble((first.checkpoint.name, "bold"), f", KL and perplexity against it in float32\n{text}\n")
    notes = [Text(f"{name}: {line}", "yellow") for name, r in reports.items() for line in r.not_run]
    return Group(head, table, Text(), *pairs, *notes)
