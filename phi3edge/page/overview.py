"""The page's first sections: the verdict, the gates, all figures, and artifacts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phi3edge.comparison import Pair
from phi3edge.gates import Gate
from phi3edge.metrics import METRICS, Metric, show_value
from phi3edge.page import charts
from phi3edge.page.entries import Entry
from phi3edge.page.html import Content, Html, bar, data_script, details, join, table, tag
from phi3edge.report import Report, show_limit
from phi3edge.types import JSON
from phi3edge.units import size


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: its heading's text, and the name of its anchor."""

    name: str
    title: str
    html: Html


def section(name: str, title: str, *content: Content) -> Section:
    """A section with its heading."""
    html = tag("section", tag("h2", title, id=f"{name}-title"), *content, id=name, aria_labelledby=f"{name}-title")
    return Section(name, title, html)


def figure(name: str, caption: str, spec: JSON, data: Html) -> Html:
    """A chart, and the same figures as a table below it."""
    return tag(
        "figure",
        tag("figcaption", caption),
        tag("div", class_="chart", role="img", aria_label=caption + " The figures are in the table below."),
        details("Figures as a table", data),
        data_script(spec),
        id=f"chart-{name}",
    )


def per_artifact(entries: Sequence[Entry], entry: Entry, *content: Content) -> Html:
    """Content under the artifact's name, where there are several."""
    return join([tag("h3", entry.name) if len(entries) > 1 else None, *content])


def subtitle(entries: Sequence[Entry]) -> Html:
    """What was compared with what, on what text."""
    report = entries[0].report
    protocol = report.protocol
    against = report.checkpoint.name + (f" at {report.checkpoint.revision[:12]}" if report.checkpoint.revision else "")
    return tag(
        "p",
        f"against {against} ({protocol.reference}), {protocol.scored_tokens:,} tokens of {report.text.name}",
        class_="lead",
    )


def verdict(entries: Sequence[Entry]) -> Html:
    """Whether it may be shipped, as the gates say, and the few figures that most decide it."""
    gates = [gate for entry in entries for gate in entry.report.gates]
    failed = [entry for entry in entries if not entry.report.passed]
    kind, heading = (
        ("fail", "Failed") if failed else ("pass", "Passed") if gates else ("", "No gates: nothing was judged")
    )
    lines: list[Content] = []
    if len(entries) > 1:
        lines = [join([tag("strong", entry.name), f": {_judged(entry.report)}"]) for entry in entries]
    elif gates:
        lines = [_judged(entries[0].report).removeprefix("failed ")]
    unseen = sum(len(entry.report.not_run) for entry in entries)
    told = tag("p", tag("a", f"{unseen} not run: what these figures do not show", href="#not-run")) if unseen else None
    return join(
        [
            tag(
                "section",
                tag("h2", heading, id="verdict-title"),
                *(tag("p", line) for line in lines),
                told,
                class_=f"verdict {kind}".strip(),
                id="verdict",
                aria_labelledby="verdict-title",
            ),
            _tiles(entries[0].report) if len(entries) == 1 else None,
        ]
    )


def _judged(report: Report) -> str:
    failed = [METRICS[gate.name].label for gate in report.gates if not gate.passed]
    if not report.gates:
        return "no gates"
    if failed:
        return f"failed {len(failed)} of {len(report.gates)} gates: {'; '.join(failed)}"
    return f"all {len(report.gates)} gates" if len(report.gates) > 1 else "its one gate"


def _tiles(report: Report) -> Html:
    shown = (
        ("bytes", "size", "of its files"),
        ("kl_mean", "KL", "nats per token, mean"),
        ("top1", "same token", "likeliest in both"),
        ("ppl_ratio", "perplexity", "times the reference's"),
        ("decode_tokens_per_s", "decode", "per second, while validating"),
        ("peak_memory_bytes", "peak memory", "while validating"),
    )
    return tag(
        "dl",
        *(
            tag(
                "div",
                tag("dt", label),
                tag(
                    "dd",
                    show_value(report.metrics[name].value, METRICS[name].unit).removesuffix("/s"),
                    tag("small", what),
                ),
            )
            for name, label, what in shown
            if name in report.metrics
        ),
        class_="tiles",
    )


def gates(entries: Sequence[Entry]) -> Section:
    """Every gate: what was measured, the limit, who set it and how it came about."""
    if not any(entry.report.gates for entry in entries):
        return section(
            "gates", "Gates", tag("p", "None were set: neither by a target, nor a recipe, nor for this run.")
        )
    if len(entries) == 1:
        return section("gates", "Gates", _gate_table(entries[0]))
    by_name = [{gate.name: gate for gate in entry.report.gates} for entry in entries]
    rows = [
        [kind.label, *(_gate_cell(entry, found.get(name)) for entry, found in zip(entries, by_name, strict=True))]
        for name, kind in METRICS.items()
        if any(name in found for found in by_name)
    ]
    matrix = table("Gates by artifact", ["what", *(entry.name for entry in entries)], rows, hidden_caption=True)
    limits = [join([tag("h3", entry.name), _gate_table(entry)]) for entry in entries if entry.report.gates]
    return section("gates", "Gates", matrix, details("Each limit, and how it came about", *limits, printed=True))


def _gate_cell(entry: Entry, gate: Gate | None) -> Html:
    """A gate's result, figure and limit, in three lines at most."""
    if gate is None:
        return tag("span", "no gate", class_="absent")
    shown = figure_cell(entry.report.metrics.get(gate.name), METRICS[gate.name].unit)
    limit = tag("small", _limit(gate), class_="line num")
    return join([_result(gate), tag("br"), tag("span", shown, class_="num"), limit])


def _gate_table(entry: Entry) -> Html:
    columns = ["what", "result", ">measured", ">limit", "used of the limit", "how the limit came about"]
    rows = [_gate_row(entry, gate) for gate in sorted(entry.report.gates, key=lambda gate: gate.passed)]
    return table(f"Gates of {entry.name}", columns, rows, hidden_caption=True)


def _result(gate: Gate) -> Html:
    return tag("span", "passed" if gate.passed else "FAILED", class_="passed" if gate.passed else "failed")


def _limit(gate: Gate) -> str:
    """The limit alone; how it came about is its rule."""
    return "none" if gate.limit is None else show_limit(gate.model_copy(update={"rule": ""}))


def _gate_row(entry: Entry, gate: Gate) -> list[Content]:
    kind = METRICS[gate.name]
    used = None
    if gate.limit and gate.value:
        share = gate.value / gate.limit if gate.sense == "max" else gate.limit / gate.value
        used = join([bar(share, "" if gate.passed else "bad"), f" {share:.0%}"])
    return [
        kind.label,
        _result(gate),
        figure_cell(entry.report.metrics.get(gate.name), kind.unit),
        _limit(gate),
        used,
        "; ".join(part for part in (entry.origin(gate), gate.rule) if part),
    ]


def figure_cell(metric: Metric | None, unit: str) -> Html:
    """A figure with its standard error; `unit` as in phi3edge.metrics.Kind."""
    if metric is None:
        return tag("span", "not measured", class_="absent")
    error = metric.standard_error
    return join(
        [show_value(metric.value, unit), None if error is None else tag("small", f" ± {show_value(error, unit)}")]
    )


def figures(entries: Sequence[Entry]) -> Section:
    """Every metric of every artifact, whether it was measured or not."""
    rows: list[list[Content]] = []
    for name, kind in METRICS.items():
        cells: list[Content] = [kind.label + (f", {kind.unit}" if kind.unit == "nats" else "")]
        for entry in entries:
            cells.append(figure_cell(entry.report.metrics.get(name), kind.unit))
        rows.append(cells)
    return section(
        "figures",
        "All figures",
        tag(
            "p",
            "± is one standard error. KL is KL(reference || artifact) per token. Speeds are of the machine it ran on.",
        ),
        table(
            "Every figure of the validation",
            ["what", *(f">{entry.name if len(entries) > 1 else 'measured'}" for entry in entries)],
            rows,
            hidden_caption=True,
        ),
    )


def sizes(entries: Sequence[Entry]) -> Section | None:
    """Size against KL of all artifacts."""
    if len(entries) < 2:
        return None
    rows = []
    for entry in sorted(entries, key=lambda entry: entry.bytes):
        kl, plan = entry.report.metrics["kl_mean"], entry.manifest.plan if entry.manifest else None
        rows.append(
            [
                entry.name,
                size(entry.bytes),
                f"{plan.bits_per_weight:.2f}" if plan else "not known",
                figure_cell(kl, "nats"),
            ]
        )
    data = table("Size and KL, the smallest first", ["artifact", ">size", ">bits per weight", ">KL, mean, nats"], rows)
    caption = "Lower left is better. The rules are two standard errors of the mean KL to each side."
    return section("sizes", "Size against KL", figure("sizes", caption, charts.size_against_kl(entries), data))


def pairs(entries: Sequence[Entry], found: Sequence[Pair]) -> Section | None:
    """The artifacts against each other."""
    if not found:
        return None
    names = [entry.name for entry in entries]
    kls = {(pair.a, pair.b): pair.kl for pair in found}
    same = {(pair.b, pair.a): pair.top1 for pair in found}
    top = max([kl.value for kl in kls.values()] + [1e-12])
    rows: list[list[Content]] = []
    for row in names:
        cells: list[Content] = [row]
        for column in names:
            if kl := kls.get((row, column)):
                shown = show_value(kl.value, "nats")
                cells.append(tag("span", shown, class_="heat", style=f"--share:{45 * max(kl.value, 0) / top:.0f}%"))
            elif top1 := same.get((row, column)):
                cells.append(tag("span", show_value(top1.value, "%"), class_="quiet"))
            else:
                cells.append("")
        rows.append(cells)
    return section(
        "pairs",
        "Against each other",
        tag(
            "p",
            "Above the diagonal: KL(row || column) per token, in nats. "
            "Below it: how often both have the same most likely token.",
        ),
        table("The artifacts against each other", ["", *(f">{name}" for name in names)], rows, hidden_caption=True),
    )
