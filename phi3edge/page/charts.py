"""The page's charts, as Vega-Lite specifications. Colours are variables of the page's style, for light, dark and paper.

A specification is checked where it is compiled: in the tests, and in the browser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, TypeAlias

from phi3edge.metrics import METRICS, show_value
from phi3edge.page.entries import Bench, Entry, Linear
from phi3edge.report import Band, Histogram
from phi3edge.types import JSON
from phi3edge.units import size

Rows: TypeAlias = "list[dict[str, Any]]"

COLOURS = 8
"""Colours of the style, --c1 to --c8; a ninth artifact has the first one's again."""

_POWERS = "datum.value >= 0.01 ? format(datum.value, '~f') : format(datum.value, '~e')"
_LOG_SPAN = 30
"""Ratio of the largest figure to the smallest from which on a chart's axis is logarithmic."""

CONFIG: JSON = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "gridColor": "var(--line)",
        "domainColor": "var(--strong-line)",
        "tickColor": "var(--strong-line)",
        "labelOverlap": "greedy",
    },
    "axisQuantitative": {"tickCount": 6},
    "legend": {
        "labelColor": "var(--ink)",
        "labelFontSize": 12,
        "title": None,
        "orient": "top",
        "direction": "horizontal",
        "columns": {"expr": "max(1, floor(width / 130))"},
        "labelLimit": 220,
        "symbolStrokeWidth": 2,
    },
    "text": {"color": "var(--ink)", "fontSize": 12},
    "bar": {"color": "var(--c1)"},
    "range": {"category": [f"var(--c{number + 1})" for number in range(COLOURS)]},
}


def size_against_kl(entries: Sequence[Entry]) -> JSON:
    """A point for each artifact, with two standard errors of its KL."""
    rows: Rows = []
    for entry in entries:
        kl = entry.report.metrics["kl_mean"]
        error = 2 * (kl.standard_error or 0.0)
        rows.append(
            {
                "name": entry.name,
                "bytes": entry.bytes,
                "kl": kl.value,
                "low": max(kl.value - error, kl.value / 10),  # a logarithm needs more than 0
                "high": kl.value + error,
                "verdict": "passed" if entry.report.passed else "failed",
                "shown": f"{show_value(kl.value, 'nats')} nats, {size(entry.bytes)}",
            }
        )
    unit, factor = ("GB", 1e9) if max(row["bytes"] for row in rows) >= 1e9 else ("MB", 1e6)
    for row in rows:
        row["size"] = row["bytes"] / factor
    middle = (min(row["size"] for row in rows) + max(row["size"] for row in rows)) / 2
    y = {"type": "quantitative", **_axis([row["kl"] for row in rows])}
    x = {
        "field": "size",
        "type": "quantitative",
        "title": f"size, {unit}",
        "scale": {"zero": False, "padding": 24, "nice": False},
    }
    labels = [
        {
            "transform": [{"filter": f"datum.size {'<=' if left else '>'} {middle!r}"}],
            "mark": {
                "type": "text",
                "align": "left" if left else "right",
                "dx": 9 if left else -9,
                "dy": -7,
                "limit": {"expr": "width / 2"},
            },
            "encoding": {"x": x, "y": {**y, "field": "kl"}, "text": {"field": "name"}},
        }
        for left in (True, False)
    ]
    return _chart(
        rows,
        260,
        layer=[
            {
                "mark": {"type": "rule", "color": "var(--muted)"},
                "encoding": {
                    "x": x,
                    "y": {**y, "field": "low", "title": "KL, mean, nats per token"},
                    "y2": {"field": "high"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {
                    "x": x,
                    "y": {**y, "field": "kl"},
                    "color": _verdict(),
                    "tooltip": [
                        {"field": "name", "title": "artifact"},
                        {"field": "shown", "title": "KL, size"},
                        {"field": "verdict", "title": "gates"},
                    ],
                },
            },
            *labels,
        ],
    )


def kl_distribution(histograms: Mapping[str, Histogram], marks: Mapping[str, float]) -> JSON:
    """How many tokens had what KL, on a logarithmic axis: bars for one artifact, lines of shares for several.

    Args:
        histograms: by artifact.
        marks: values to mark by a rule, by what they are; for one artifact.
    """
    used = [number for h in histograms.values() for number, count in enumerate(h.counts) if count] or [0]
    first, last = max(min(used) - 1, 0), max(used) + 2
    edges = next(iter(histograms.values())).edges
    domain = [edges[first], edges[min(last, len(edges) - 1)]]
    scale = {"type": "log", "domain": domain, "nice": False}
    axis = {"labelExpr": _POWERS, "grid": False, "values": [10.0**power for power in range(-8, 3)]}
    middle = math.sqrt(domain[0] * domain[1])
    x = {"field": "low", "type": "quantitative", "scale": scale, "axis": axis, "title": "KL of a token, nats"}
    if len(histograms) > 1:
        return _chart(
            [
                {"name": name, "low": h.edges[n], "share": (h.counts[n] if n < len(h.counts) else 0) / sum(h.counts)}
                for name, h in histograms.items()
                for n in range(first, min(last + 1, len(h.edges)))
                if sum(h.counts)
            ],
            240,
            mark={"type": "line", "interpolate": "step-after", "strokeWidth": 1.8, "clip": True},
            encoding={
                "x": x,
                "y": {
                    "field": "share",
                    "type": "quantitative",
                    "title": "share of tokens",
                    "axis": {"format": ".0%"},
                },
                "color": {"field": "name", "type": "nominal", "sort": None},
            },
        )
    [found] = histograms.values()
    rows: Rows = [
        {
            "low": found.edges[n],
            "high": found.edges[n + 1],
            "count": found.counts[n],
            "from": f"{found.edges[n]:.3g} to {found.edges[n + 1]:.3g} nats",
        }
        for n in range(first, min(last, len(found.counts)))
    ]
    places = [(number, what, value) for number, (what, value) in enumerate(marks.items()) if value > 0]
    return _chart(
        rows,
        260,
        layer=[
            {
                "mark": {"type": "bar", "clip": True},
                "encoding": {
                    "x": x,
                    "x2": {"field": "high"},
                    "y2": {"datum": 0},
                    "y": {
                        "field": "count",
                        "type": "quantitative",
                        "title": "tokens",
                        "scale": {"domain": [0, 1.4 * max([row["count"] for row in rows])], "nice": False},
                    },
                    "tooltip": [{"field": "from", "title": "KL"}, {"field": "count", "title": "tokens"}],
                },
            },
            {
                "data": {"values": [{"low": value} for _, _, value in places]},
                "mark": {"type": "rule", "color": "var(--ink)", "strokeDash": [3, 3], "clip": True},
                "encoding": {"x": x},
            },
            *(
                {
                    "data": {"values": [{"low": value, "what": what}]},
                    "mark": {
                        "type": "text",
                        "align": "right" if value > middle else "left",
                        "dx": -4 if value > middle else 4,
                        "y": 7 + 15 * number,
                    },
                    "encoding": {"x": x, "text": {"field": "what"}},
                }
                for number, what, value in places
            ),
        ],
    )


def by_layer(rows: Rows, title: str) -> JSON:
    """Upright bars, as for layers, of which there are many; rows hold name, label, value and shown."""
    return _chart(
        rows,
        220,
        mark={"type": "bar"},
        encoding={
            "x": {"field": "label", "type": "nominal", "sort": None, "title": "block", "axis": {"labelAngle": 0}},
            "y": {"field": "value", "type": "quantitative", "title": title},
            "tooltip": [{"field": "name"}, {"field": "shown", "title": title}],
        },
    )


def by_role(rows: Rows, title: str) -> JSON:
    """Bars beside names, as for roles, of which there are few; rows as in `by_layer`."""
    y = {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 130}}
    x = {"field": "value", "type": "quantitative", "title": title}
    return _chart(
        rows,
        26 * len(rows),
        mark={"type": "bar"},
        encoding={"x": x, "y": y, "tooltip": [{"field": "name"}, {"field": "shown", "title": title}]},
    )


def calibration_error(linears: Sequence[Linear]) -> JSON:
    """The relative error of each calibrated linear's outputs, over layers, a line for each role; experts' mean."""
    found: dict[tuple[int, str, str], list[float]] = {}
    for one in linears:
        if one.layer is not None and one.error:
            found.setdefault((one.layer, one.role, one.codec), []).append(one.error)
    rows: Rows = [
        {"layer": layer, "role": role, "error": mean(errors), "codec": codec}
        for (layer, role, codec), errors in found.items()
    ]
    return _chart(
        rows,
        260,
        mark={"type": "line", "point": {"size": 22, "filled": True}, "strokeWidth": 1.5},
        encoding={
            "x": {
                "field": "layer",
                "type": "quantitative",
                "title": "layer",
                "scale": {"nice": False},
                "axis": {"grid": False, "tickMinStep": 1},
            },
            "y": {
                "field": "error",
                "type": "quantitative",
                "title": "relative error of outputs",
                **_axis([row["error"] for row in rows]),
            },
            "color": {"field": "role", "type": "nominal", "sort": None},
            "tooltip": [
                {"field": "role"},
                {"field": "layer"},
                {"field": "codec"},
                {"field": "error", "format": ".2e"},
            ],
        },
    )


def long_positions(bands: Sequence[Band]) -> JSON:
    """KL by position, a colour for each length of the sequence and context that the runtime was opened with."""
    rows: Rows = [
        {
            "position": (band.first + band.last) / 2,
            "kl": band.kl.value,
            "low": band.kl.value - 2 * (band.kl.standard_error or 0.0),
            "high": band.kl.value + 2 * (band.kl.standard_error or 0.0),
            "opened": f"{band.tokens} tokens in a context of {band.allocated}",
            "span": f"{band.first} to {band.last}",
        }
        for band in bands
    ]
    x = {"field": "position", "type": "quantitative", "title": "position", "scale": {"zero": False, "padding": 12}}
    colour = {
        "field": "opened",
        "type": "nominal",
        "sort": None,
        "legend": {"columns": {"expr": "max(1, floor(width / 240))"}, "labelLimit": 300},
    }
    return _chart(
        rows,
        220,
        encoding={"x": x, "color": colour},
        layer=[
            {
                "mark": {"type": "rule"},
                "encoding": {
                    "y": {"field": "low", "type": "quantitative", "title": "KL, mean, nats"},
                    "y2": {"field": "high"},
                },
            },
            {
                "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
                "encoding": {
                    "y": {"field": "kl", "type": "quantitative"},
                    "tooltip": [
                        {"field": "span", "title": "positions"},
                        {"field": "opened", "title": "of"},
                        {"field": "kl", "title": "KL", "format": ".4f"},
                    ],
                },
            },
        ],
    )


def speed(benches: Mapping[str, Bench]) -> JSON:
    """Decode speed as measured, before the speed that memory bandwidth allows."""
    rows: Rows = []
    swept = len({run.threads for bench in benches.values() for run in bench.runs}) > 1
    for name, bench in benches.items():
        for run in bench.runs:
            for test in run.tests:
                if not test.roofline_share:
                    continue
                label = f"{test.test}, {run.threads} threads" if swept else test.test
                rows.append(
                    {
                        "name": f"{name}: {label}" if len(benches) > 1 else label,
                        "value": test.tokens_per_s.median,
                        "roofline": test.tokens_per_s.median / test.roofline_share,
                        "share": test.roofline_share,
                    }
                )
    y = {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 170}}
    x = {"type": "quantitative", "title": "decode, tokens/s"}
    told = [
        {"field": "name", "title": "test"},
        {"field": "value", "title": "tokens/s", "format": ".1f"},
        {"field": "roofline", "title": "bandwidth allows", "format": ".1f"},
        {"field": "share", "title": "share", "format": ".0%"},
    ]
    return _chart(
        rows,
        28 * len(rows),
        encoding={"y": y, "tooltip": told},
        layer=[
            {"mark": {"type": "bar", "color": "var(--track)"}, "encoding": {"x": {**x, "field": "roofline"}}},
            {"mark": {"type": "bar", "height": 12}, "encoding": {"x": {**x, "field": "value"}}},
        ],
    )


def memory(rows: Rows, limit: float | None) -> JSON:
    """Bars of bytes beside the memory that an app may use; rows hold name, what and bytes."""
    top = max([*(row["bytes"] for row in rows), limit or 0])
    unit, factor = ("GB", 1e9) if top >= 1e9 else ("MB", 1e6)
    values = [{**row, "value": row["bytes"] / factor, "shown": size(row["bytes"])} for row in rows]
    y = {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 130}}
    layers: list[JSON] = [
        {
            "mark": {"type": "bar"},
            "encoding": {
                "x": {"field": "value", "type": "quantitative", "title": unit},
                "y": y,
                "tooltip": [{"field": "name"}, {"field": "shown", "title": "bytes"}],
            },
        }
    ]
    if limit is not None:
        layers.append(
            {
                "data": {"values": [{"value": limit / factor, "shown": f"limit {size(limit)}"}]},
                "mark": {"type": "rule", "color": "var(--fail)", "strokeWidth": 2},
                "encoding": {"x": {"field": "value", "type": "quantitative"}, "tooltip": {"field": "shown"}},
            }
        )
    return _chart(values, 28 * len(rows), layer=layers)


def _chart(rows: Rows, height: int, **parts: Any) -> JSON:
    return {
        "width": "container",
        "height": height,
        "data": {"values": rows},
        "config": CONFIG,
        **parts,
    }


def _axis(values: Sequence[float]) -> JSON:
    """Logarithmic where figures span much, else from 0."""
    if not 0 < min(values) <= max(values) / _LOG_SPAN:
        return {"scale": {"zero": True}}
    ticks = [factor * 10.0**power for power in range(-9, 2) for factor in (1, 3)]
    return {"scale": {"type": "log", "nice": True}, "axis": {"labelExpr": _POWERS, "values": ticks}}


def _verdict() -> JSON:
    return {
        "field": "verdict",
        "type": "nominal",
        "scale": {"domain": ["passed", "failed"], "range": ["var(--c1)", "var(--fail)"]},
        "legend": None,
    }


def marks_of(entry: Entry) -> dict[str, float]:
    """The figures of the distribution of a token's KL that its chart marks."""
    names = {"kl_median": "median", "kl_mean": "mean", "kl_p90": "90 %", "kl_p99": "99 %"}
    assert names.keys() <= METRICS.keys()
    metrics = entry.report.metrics
    return {f"{what} {metrics[name].value:.3g}": metrics[name].value for name, what in names.items() if name in metrics}
