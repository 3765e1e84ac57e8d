"""What a CI needs of a validation: every artifact held to gates and baselines, as JUnit XML, Markdown and JSON.

An artifact that cannot be validated is an error of its own, and the others are validated all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

from phi3edge.errors import Phi3EdgeError, UsageError
from phi3edge.files import write_text
from phi3edge.gates import Gate
from phi3edge.metrics import METRICS, Metric, show_value
from phi3edge.progress import Stages, silent
from phi3edge.proof import Protocol, name_artifacts, user_gates, validate_artifact
from phi3edge.report import Report, show_limit, to_data, to_json
from phi3edge.types import JSON

JUNIT, SUMMARY, DATA = "junit.xml", "summary.md", "ci.json"


@dataclass(frozen=True, slots=True)
class Checked:
    """One artifact: its report, or why there is none."""

    name: str
    report: Report | None
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it was validated and keeps its gates."""
        return self.report is not None and self.report.passed


def check(
    artifacts: Sequence[Path],
    protocol: Protocol,
    checkpoint: str | None = None,
    target: str | None = None,
    gates: Path | None = None,
    baselines: Path | None = None,
    update: bool = False,
    stages: Stages = silent,
) -> list[Checked]:
    """Validate artifacts and hold them to gates.

    Args:
        artifacts: folders or files; a folder of several formats stands for its artifacts.
        protocol: of all of them; its gates hold for all.
        checkpoint: the reference of all; None for what each one's manifest names.
        target: whose gates; None for what each one's manifest names.
        gates: a user's gates.toml, over the protocol's.
        baselines: a folder with a report NAME.json for each artifact; one that gates.toml names goes before it.
        update: write these from what is found now, in place of holding it to them.
        stages: shows progress.

    Raises:
        ConfigError: gates.toml is none.
        UsageError: an artifact is given twice, or `update` without `baselines`.
    """
    if update and baselines is None:
        raise UsageError("--update writes baselines, and no folder for them was given", "--baselines FOLDER")
    named = name_artifacts(artifacts)
    plans = {name: _protocol(name, artifact, protocol, gates, baselines, update) for name, artifact in named.items()}
    found = [_check(name, named[name], checkpoint, target, plan, stages) for name, plan in plans.items()]
    if update and baselines is not None:
        baselines.mkdir(parents=True, exist_ok=True)
        for one in found:
            if one.report is not None:
                write_text(_kept(baselines, one.name), to_json(one.report))
    return found


def _protocol(
    name: str, artifact: Path, protocol: Protocol, gates: Path | None, baselines: Path | None, update: bool
) -> Protocol:
    own, baseline = user_gates(gates, artifact)
    limits = {**protocol.gates, **own}
    if update:
        absolute = {k: v.model_copy(update={"of_baseline": None, "noise": None}) for k, v in limits.items()}
        kept = {k: v for k, v in absolute.items() if v.limit is not None or v.of_reference is not None}
        return replace(protocol, gates=kept, baseline=None)
    if baseline is None and baselines is not None and _kept(baselines, name).is_file():
        baseline = _kept(baselines, name)
    return replace(protocol, gates=limits, baseline=baseline or protocol.baseline)


def _kept(baselines: Path, name: str) -> Path:
    return baselines / f"{name.replace('/', '-')}.json"


def _check(
    name: str, artifact: Path, checkpoint: str | None, target: str | None, protocol: Protocol, stages: Stages
) -> Checked:
    try:
        report, _, _ = validate_artifact(artifact, checkpoint, target, protocol, stages=stages)
    except Phi3EdgeError as error:
        return Checked(name, None, error.message + (f" ({error.hint})" if error.hint else ""))
    return Checked(name, report)


def exit_code(found: Sequence[Checked]) -> int:
    """0: all passed; 1: a gate failed; 2: one could not be validated."""
    if any(one.report is None for one in found):
        return 2
    return 0 if all(one.passed for one in found) else 1


def write(found: Sequence[Checked], folder: Path, environment: Mapping[str, str]) -> list[Path]:
    """Write junit.xml, summary.md and ci.json; and the summary to GitHub's step summary, where there is one.

    Args:
        found: what to write.
        folder: where; it is made.
        environment: the process's variables: GITHUB_STEP_SUMMARY is the file that GitHub Actions shows.

    Returns:
        The files in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = summary(found)
    contents = {JUNIT: junit(found), SUMMARY: text, DATA: json.dumps(data(found), indent=2, ensure_ascii=False) + "\n"}
    for name, content in contents.items():
        write_text(folder / name, content)
    if step := environment.get("GITHUB_STEP_SUMMARY"):
        with Path(step).open("a", encoding="utf-8") as file:
            file.write(text)
    return [folder / name for name in contents]


def data(found: Sequence[Checked]) -> JSON:
    """All that was found, as plain data."""
    return {
        "schema_version": 1,
        "passed": exit_code(found) == 0,
        "artifacts": [
            {"name": one.name, "passed": one.passed, "error": one.error, "report": one.report and to_data(one.report)}
            for one in found
        ],
    }


def junit(found: Sequence[Checked]) -> str:
    """JUnit's XML: a suite for each artifact, a case for each gate."""
    root = ElementTree.Element("testsuites", name="phi3edge")
    for one in found:
        gates = one.report.gates if one.report else []
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=one.name,
            tests=str(len(gates) or 1),
            failures=str(sum(not gate.passed for gate in gates)),
            errors=str(int(one.report is None)),
        )
        for gate in gates:
            case = ElementTree.SubElement(suite, "testcase", classname=f"phi3edge.{one.name}", name=gate.name)
            if not gate.passed:
                ElementTree.SubElement(case, "failure", message=f"{_value(gate)}, gate {show_limit(gate)}")
        if one.report is None:
            case = ElementTree.SubElement(suite, "testcase", classname=f"phi3edge.{one.name}", name="validate")
            ElementTree.SubElement(case, "error", message=one.error or "")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def summary(found: Sequence[Checked]) -> str:
    """Markdown: a verdict and a table for each artifact."""
    return "\n".join(part for one in found for part in _summary(one))


def _summary(one: Checked) -> list[str]:
    if one.report is None:
        return [f"### ⚠️ {_cell(one.name)}: not validated", "", _cell(one.error or ""), ""]
    report = one.report
    protocol = report.protocol
    gates = {gate.name: gate for gate in report.gates}
    rows = [
        (METRICS[name].label, _figure(name, report.metrics.get(name)), _verdict(gates.get(name)))
        for name in METRICS
        if name in report.metrics or name in gates
    ]
    return [
        f"### {'✅' if report.passed else '❌'} {_cell(one.name)}",
        "",
        f"Against {_cell(report.checkpoint.name)}: {protocol.scored_tokens} tokens of {_cell(report.text.name)}, "
        f"{protocol.chunks} chunks of {protocol.chunk_tokens}; {_cell(report.environment.cpu)}.",
        "",
        "| | measured | gate |",
        "|---|---:|---|",
        *(f"| {label} | {value} | {gate} |" for label, value, gate in rows),
        "",
        *(f"> not run: {_cell(line)}" for line in report.not_run),
        "",
    ]


def _figure(name: str, metric: Metric | None) -> str:
    if metric is None:
        return "not measured"
    unit = METRICS[name].unit
    error = f" ± {show_value(metric.standard_error, unit)}" if metric.standard_error is not None else ""
    return show_value(metric.value, unit) + error


def _verdict(gate: Gate | None) -> str:
    if gate is None:
        return ""
    return f"{'pass' if gate.passed else '**FAIL**'}, {show_limit(gate)}"


def _value(gate: Gate) -> str:
    return "not measured" if gate.value is None else show_value(gate.value, METRICS[gate.name].unit)


def _cell(text: str) -> str:
    """Text that Markdown shows as it is, within one cell."""
    escaped = "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in text)
    return " ".join(escaped.split())
