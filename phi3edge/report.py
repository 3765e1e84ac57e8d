"""The report of a validation: its schema, as JSON and as a table for the terminal."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, ValidationError, model_validator

from phi3edge._toml import Strict
from phi3edge.errors import ConfigError
from phi3edge.registry import did_you_mean
from phi3edge.types import JSON
from phi3edge.units import size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Group

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Kind:
    """What a metric is.

    Attributes:
        sense: "max" if a gate on it is an upper limit, "min" if a lower one.
        unit: how to show it: "", "nats", "%", "tokens/s", "s", "bytes" or "count".
    """

    label: str
    sense: Literal["max", "min"]
    unit: str


METRICS = {
    "ppl": Kind("perplexity", "max", ""),
    "reference_ppl": Kind("perplexity of the reference", "max", ""),
    "ppl_ratio": Kind("perplexity / reference's", "max", ""),
    "kl_mean": Kind("KL, mean", "max", "nats"),
    "kl_predicted": Kind("KL, mean, as planned", "max", "nats"),
    "kl_median": Kind("KL, median", "max", "nats"),
    "kl_p90": Kind("KL, 90th percentile", "max", "nats"),
    "kl_p99": Kind("KL, 99th percentile", "max", "nats"),
    "kl_max": Kind("KL, maximum", "max", "nats"),
    "top1": Kind("same most likely token", "min", "%"),
    "greedy_agreement": Kind("same greedy answers", "min", "%"),
    "tokenizer_mismatches": Kind("texts tokenized differently", "max", "count"),
    "eog_missing": Kind("end tokens unknown to it", "max", "count"),
    "prompt_tokens_per_s": Kind("prompt", "min", "tokens/s"),
    "decode_tokens_per_s": Kind("decode", "min", "tokens/s"),
    "time_to_first_token_s": Kind("time to first token", "max", "s"),
    "load_s": Kind("load", "max", "s"),
    "peak_memory_bytes": Kind("peak memory", "max", "bytes"),
    "bytes": Kind("size", "max", "bytes"),
}
"""Every metric, in the order of the report. KL is KL(reference || artifact) per token."""


def check_gates(gates: Mapping[str, float]) -> None:
    """Refuses a gate on a metric that does not exist, or a limit that is not a number.

    Raises:
        ConfigError: names the gate, and the nearest metric.
    """
    for name, limit in gates.items():
        if name not in METRICS:
            raise ConfigError(f"unknown metric {name!r} in the gates", did_you_mean(name, list(METRICS)))
        if math.isnan(limit):
            raise ConfigError(f"the gate {name!r} has no number as its limit")


class _Part(Strict):
    model_config = ConfigDict(ser_json_inf_nan="strings")  # JSON has no such numbers


class Metric(_Part):
    """A figure, and the standard error of its mean where it is one."""

    value: float
    standard_error: float | None = None


class Gate(_Part):
    """A limit, and whether the figure keeps it; value is None where the metric was not measured, which fails."""

    name: str
    sense: Literal["max", "min"]
    limit: float
    value: float | None
    passed: bool


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
        chunks: number of chunks of the text.
        chunk_tokens: tokens in each; the second half is scored.
        scored_tokens: tokens scored in all.
        reference: what computed the reference, and its precision.
        context: tokens of KV cache while speed and memory were measured.
        prompt_tokens: length of the prompt timed.
        decode_tokens: number of tokens timed after it.
    """

    chunks: int
    chunk_tokens: int
    scored_tokens: int
    reference: str
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
    """A prompt and its greedy continuations; `equal` leading tokens are the same, of `tokens`."""

    prompt: str
    reference: str
    artifact: str
    equal: int
    tokens: int


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
        not_run: one line for everything about the target that these figures do not show, such as a GPU's kernels.
    """

    schema_version: Literal[1] = 1
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
    environment: Environment
    not_run: list[str] = []

    @model_validator(mode="after")
    def _consistent(self) -> Report:
        if self.passed != all(g.passed for g in self.gates):
            raise ValueError("`passed` contradicts the gates")
        return self


def judge(metrics: Mapping[str, Metric], gates: Mapping[str, float]) -> list[Gate]:
    """Holds figures against limits. A figure that is missing or not a number fails.

    Raises:
        ConfigError: a gate on an unknown metric.
    """
    check_gates(gates)
    judged = []
    for name, limit in gates.items():
        value = metrics[name].value if name in metrics else None
        sense = METRICS[name].sense
        passed = value is not None and (value <= limit if sense == "max" else value >= limit)  # NaN: False
        judged.append(Gate(name=name, sense=sense, limit=limit, value=value, passed=passed))
    return judged


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
            f"{'≤' if gate.sense == 'max' else '≥'} {show_value(gate.limit, kind.unit)}" if gate else "",
            Text("") if gate is None else Text("pass", "green") if gate.passed else Text("FAIL", "bold red"),
        )
    protocol, environment = report.protocol, report.environment
    parts: list[Table | Text] = [
        Text.assemble((report.artifact[0].name, "bold"), f"  against  {report.checkpoint.name}"),
        Text(
            f"{protocol.scored_tokens} tokens of {report.text.name}, in {protocol.chunks} chunks of "
            f"{protocol.chunk_tokens}; {environment.cpu}, {environment.threads} threads",
            "dim",
        ),
        *([Text(f"calibrated on {report.calibration.name}", "dim")] if report.calibration else []),
        Text(""),
        table,
        Text(""),
    ]
    for mismatch in report.tokens.mismatches:
        parts.append(Text(f"tokens differ for {mismatch.text!r}:", "red"))
        parts.append(Text(f"  checkpoint {mismatch.reference}\n  artifact   {mismatch.artifact}"))
    if missing := sorted(set(report.tokens.eos_ids) - set(report.tokens.eog_ids)):
        parts.append(Text(f"the artifact does not stop at token ids {missing}", "red"))
    parts += [Text(f"not run: {line}", "yellow") for line in report.not_run]
    if report.passed:
        parts.append(Text(f"passed: {len(report.gates)} of {len(report.gates)} gates", "bold green"))
    else:
        failed = [g.name for g in report.gates if not g.passed]
        parts.append(Text(f"failed: {', '.join(failed)} ({len(failed)} of {len(report.gates)} gates)", "bold red"))
    return Group(*parts)


def show_value(value: float, unit: str) -> str:
    """A figure as a person reads it; `unit` as in Kind."""
    if math.isnan(value):
        return "not a number"
    if unit == "%":
        return f"{100 * value:.1f} %"
    if unit == "bytes":
        return size(value)
    if unit == "count":
        return f"{value:g}"
    if unit == "tokens/s":
        return f"{value:.1f} {unit}"
    if unit == "nats":
        return f"{value:.4f}" if value >= 1e-4 or value == 0 else f"{value:.1e}"
    return f"{value:.3f} {unit}".rstrip()
