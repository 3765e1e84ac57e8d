"""The report of a validation: its schema, as JSON and as a table for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, ValidationError, model_validator

from phi3edge._toml import Strict
from phi3edge.errors import ConfigError, UsageError
from phi3edge.gates import Baseline, Gate
from phi3edge.metrics import METRICS, Metric, show_value
from phi3edge.types import JSON

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

SCHEMA_VERSION = 2
_SAME_REFERENCE = 1e-3
"""Relative difference of the reference's perplexity up to which two reports speak of one reference."""


class _Part(Strict):
    model_config = ConfigDict(ser_json_inf_nan="strings")  # JSON has no such numbers


class File(_Part):
    """A file of the artifact; the name has no folder."""

    name: str
    bytes: int
    sha256: str


class Checkpoint(_Part):
    """What it was compared with: a name, and the hub repository and commit where it came from one."""

    name: str
    repository: str | None = None
    revision: str | None = None


class TextInfo(_Part):
    """The text scored on, or calibrated on; the SHA-256 is of its content, or of its token ids as int32."""

    name: str
    sha256: str


class Protocol(_Part):
    """How the figures were taken.

    Attributes:
        chunks: number of windows of the text.
        chunk_tokens: tokens in each.
        stride: tokens from one window's start to the next one's.
        context_tokens: tokens that at least stand before a scored one, in its window.
        scored_tokens: tokens scored in all.
        reference: what computed the reference, and its precision.
        distributions: what was kept of the reference's distributions.
        kl_drawing_error: standard error of the mean KL, in nats, that this causes; part of the metric's own.
        context: tokens of KV cache while speed and memory were measured.
        prompt_tokens: length of the prompt timed.
        decode_tokens: number of tokens timed after it.
    """

    chunks: int
    chunk_tokens: int
    stride: int
    context_tokens: int
    scored_tokens: int
    reference: str
    distributions: str
    kl_drawing_error: float
    context: int
    prompt_tokens: int
    decode_tokens: int


class Mismatch(_Part):
    """A text whose token ids differ between the checkpoint's tokenizer and the artifact's."""

    text: str
    reference: list[int]
    artifact: list[int]


class Tokens(_Part):
    """Tokenizer checks.

    Attributes:
        checked: number of texts compared.
        eos_ids: ids that end a generation, as the checkpoint says.
        eog_ids: ids that end a generation in the artifact's runtime, which may add its own by their names.
        chat: whether a rendered chat was among the texts; not where the checkpoint has no template.
    """

    checked: int
    mismatches: list[Mismatch]
    eos_ids: list[int]
    eog_ids: list[int]
    chat: bool


class Answer(_Part):
    """A prompt and its greedy continuations.

    Attributes:
        equal: number of leading tokens that are the same.
        tokens: of so many: the longer answer's.
        ended: whether the reference ended its answer.
        stops: whether the artifact, given the reference's whole answer, ends there too; None where that did not end.
    """

    prompt: str
    reference: str
    artifact: str
    equal: int
    tokens: int
    ended: bool
    stops: bool | None


class Band(_Part):
    """Figures of a few neighbouring positions of one long sequence.

    Attributes:
        first: the first position scored, from 0.
        last: the last one.
        tokens: of the sequence: with LongRoPE the rotation of all positions depends on it.
        allocated: tokens of KV cache that the runtime was opened with: some choose their rotation by it.
        kl: KL(reference || artifact), mean.
        top1: share of the same most likely token.
    """

    first: int
    last: int
    tokens: int
    allocated: int
    kl: Metric
    top1: float


class Histogram(_Part):
    """How many scored tokens had a KL between two edges, in nats; the first and last bins hold what is beyond, too."""

    edges: list[float]
    counts: list[int]


class Choice(_Part):
    """A token's text and its probability."""

    token: str
    probability: float


class Context(_Part):
    """A place where the artifact differs most.

    Attributes:
        kl: there, in nats.
        before: the text up to there.
        token: what the text goes on with.
        reference: the likeliest tokens of the reference, the first first.
        artifact: the artifact's.
    """

    kl: float
    before: str
    token: str
    reference: list[Choice]
    artifact: list[Choice]


class Environment(_Part):
    """Where it ran. No host names, no paths."""

    system: str
    machine: str
    cpu: str
    cores: int
    python: str
    threads: int
    software: dict[str, str]
    flags: dict[str, str | int | bool | None]


class Report(_Part):
    """What a validation found. `passed` holds exactly if every gate does.

    Attributes:
        positions: long contexts, where the checkpoint has a boundary that runtimes fail at; see `positions`.
        histogram: of the KL of every scored token.
        worst: where it was largest.
        not_run: one line for everything about the target that these figures do not show, such as a GPU's kernels.
    """

    schema_version: Literal[2] = 2
    passed: bool
    artifact: list[File]
    checkpoint: Checkpoint
    text: TextInfo
    calibration: TextInfo | None = None
    protocol: Protocol
    metrics: dict[str, Metric]
    gates: list[Gate]
    tokens: Tokens
    answers: list[Answer]
    positions: list[Band] = []
    histogram: Histogram
    worst: list[Context]
    environment: Environment
    not_run: list[str] = []

    @model_validator(mode="after")
    def _consistent(self) -> Report:
        if self.passed != all(g.passed for g in self.gates):
            raise ValueError("`passed` contradicts the gates")
        return self


def baseline(earlier: Report, text: TextInfo, protocol: Protocol, environment: Environment, ppl: float) -> Baseline:
    """An earlier report as a baseline of figures taken now.

    Args:
        earlier: the report.
        text: what is scored now.
        protocol: how.
        environment: where.
        ppl: the reference's perplexity now.

    Raises:
        UsageError: it is of another text, protocol or reference: its figures say nothing about these.
    """
    name = f"of {earlier.artifact[0].name}"
    for what, theirs, ours in (
        ("text", earlier.text.sha256[:12], text.sha256[:12]),
        *((f, getattr(earlier.protocol, f), getattr(protocol, f)) for f in ("chunks", "chunk_tokens", "stride")),
    ):
        if theirs != ours:
            raise UsageError(
                f"the baseline {name} has {what} {theirs}, this validation {ours}",
                "make the baseline again with the same text and protocol",
            )
    theirs = earlier.metrics["reference_ppl"].value
    if not abs(theirs / ppl - 1) <= _SAME_REFERENCE:
        raise UsageError(
            f"the baseline {name} is of another reference: its perplexity is {theirs:.4f}, this one's {ppl:.4f}",
            "make the baseline again with this checkpoint",
        )
    same = earlier.environment.software == environment.software and earlier.environment.cpu == environment.cpu
    return Baseline(name, earlier.metrics, same)


def to_json(report: Report) -> str:
    """The report as JSON text, indented. NaN and infinities are the strings "NaN", "Infinity", "-Infinity"."""
    return report.model_dump_json(indent=2) + "\n"


def to_data(report: Report) -> JSON:
    """What `to_json` writes, as plain data: a part of a larger JSON document."""
    return json.loads(to_json(report))


def from_json(text: str) -> Report:
    """Reads a report.

    Raises:
        ConfigError: not a report of this schema.
    """
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"not a report of schema {SCHEMA_VERSION}: {where}: {first['msg']}") from None


def read_report(path: Path) -> Report:
    """Reads report.json."""
    return from_json(path.read_text(encoding="utf-8"))


def render(report: Report) -> Group:
    """The report as a table, with what failed below it, for rich's console."""
    from rich.console import Group
    from rich.text import Text

    protocol, environment = report.protocol, report.environment
    stride = "" if protocol.stride == protocol.chunk_tokens else f" every {protocol.stride}"
    parts: list[Table | Text] = [
        Text.assemble((report.artifact[0].name, "bold"), f"  against  {report.checkpoint.name}"),
        Text(
            f"{protocol.scored_tokens} tokens of {report.text.name}, in {protocol.chunks} chunks of "
            f"{protocol.chunk_tokens}{stride}; {environment.cpu}, {environment.threads} threads",
            "dim",
        ),
        *([Text(f"calibrated on {report.calibration.name}", "dim")] if report.calibration else []),
        Text(""),
        _metrics_table(report),
        Text(""),
    ]
    if report.positions:
        parts += [_positions_table(report), Text("")]
    for mismatch in report.tokens.mismatches:
        parts.append(Text(f"tokens differ for {mismatch.text!r}:", "red"))
        parts.append(Text(f"  checkpoint {mismatch.reference}\n  artifact   {mismatch.artifact}"))
    if missing := sorted(set(report.tokens.eos_ids) - set(report.tokens.eog_ids)):
        parts.append(Text(f"the artifact does not stop at token ids {missing}", "red"))
    parts += [
        Text(f"the artifact goes on after the reference's answer to {answer.prompt!r}", "red")
        for answer in report.answers
        if answer.stops is False
    ]
    parts += [Text(f"not run: {line}", "yellow") for line in report.not_run]
    if report.passed:
        parts.append(Text(f"passed: {len(report.gates)} of {len(report.gates)} gates", "bold green"))
    else:
        failed = [g.name for g in report.gates if not g.passed]
        parts.append(Text(f"failed: {', '.join(failed)} ({len(failed)} of {len(report.gates)} gates)", "bold red"))
    return Group(*parts)


def _metrics_table(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    gates = {g.name: g for g in report.gates}
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_column("±", justify="right", style="dim")
    table.add_column("gate", justify="right")
    table.add_column("")
    for name, kind in METRICS.items():
        metric, gate = report.metrics.get(name), gates.get(name)
        if metric is None and gate is None:
            continue
        table.add_row(
            kind.label,
            show_value(metric.value, kind.unit) if metric else "not measured",
            show_value(metric.standard_error, kind.unit) if metric and metric.standard_error is not None else "",
            show_limit(gate) if gate else "",
            Text("") if gate is None else Text("pass", "green") if gate.passed else Text("FAIL", "bold red"),
        )
    return table


def _positions_table(report: Report) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("positions", "of", "context", "KL, mean", "±", "same most likely token"):
        table.add_column(name, justify="right")
    for band in report.positions:
        table.add_row(
            f"{band.first} to {band.last}",
            str(band.tokens),
            str(band.allocated),
            show_value(band.kl.value, "nats"),
            show_value(band.kl.standard_error, "nats") if band.kl.standard_error is not None else "",
            show_value(band.top1, "%"),
        )
    return table


def show_limit(gate: Gate) -> str:
    """A gate's limit as a person reads it."""
    if gate.limit is None:
        return gate.rule
    rule = f" ({gate.rule})" if gate.rule else ""
    return f"{'≤' if gate.sense == 'max' else '≥'} {show_value(gate.limit, METRICS[gate.name].unit)}{rule}"
