"""The page's sections of what was measured: where the artifact differs, what it says, how fast it is, what it needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from phi3edge.metrics import METRICS, show_value
from phi3edge.page import charts
from phi3edge.page.entries import Entry, Evaluation, LayerRow, Layers, Score
from phi3edge.page.html import Content, Html, bar, code, details, join, table, tag, visible
from phi3edge.page.overview import Section, figure, figure_cell, per_artifact, section
from phi3edge.report import Answer, Choice, Context
from phi3edge.units import size

SHOWN_CONTEXTS = 4
"""Worst contexts of an artifact that are open; the others open on request."""


def distribution(entries: Sequence[Entry]) -> Section:
    """The distribution of the tokens' KL, and the contexts where it was largest."""
    histograms = {entry.name: entry.report.histogram for entry in entries}
    data = table(
        "Tokens by their KL",
        [">KL from", ">to", *(f">{name}" for name in histograms)],
        [
            [f"{low:.3g}", f"{high:.3g}", *(str(h.counts[number]) for h in histograms.values())]
            for number, (low, high) in enumerate(
                zip(entries[0].report.histogram.edges, entries[0].report.histogram.edges[1:], strict=False)
            )
            if any(h.counts[number] for h in histograms.values())
        ],
    )
    one = len(entries) == 1
    caption = "How many tokens had what KL. " + (
        "Dashed: median, mean, and the values below which 90 % and 99 % of the tokens lie."
        if one
        else "Further left is better."
    )
    marks = charts.marks_of(entries[0]) if one else {}
    chart = figure("distribution", caption, charts.kl_distribution(histograms, marks), data)
    worst = [
        per_artifact(entries, entry, _contexts(entry.report.worst, open_=one))
        for entry in entries
        if entry.report.worst
    ]
    head = tag("h3", "Where it differs most") if one and worst else None
    note = tag(
        "p", "The text up to there, what it goes on with (marked), and what each expected there.", class_="quiet"
    )
    return section("distribution", "KL of single tokens", chart, head, note if worst else None, *worst)


def _contexts(worst: Sequence[Context], open_: bool) -> Html:
    shown = SHOWN_CONTEXTS if open_ else 0
    rest = [_context(one) for one in worst[shown:]]
    more = f"{len(rest)} more contexts" if shown else f"The {len(rest)} contexts where it differs most"
    return join([*(_context(one) for one in worst[:shown]), details(more, *rest, printed=True) if rest else None])


def _context(context: Context) -> Html:
    rows = []
    for rank in range(max(len(context.reference), len(context.artifact))):
        cells: list[Content] = [str(rank + 1)]
        for choices, kind in ((context.reference, ""), (context.artifact, "second")):
            cells += _choice(choices[rank], kind) if rank < len(choices) else ["", ""]
        rows.append(cells)
    goes_on = tag("mark", *(visible(context.token) if context.token.isspace() else [context.token]))
    return tag(
        "article",
        tag("h4", f"KL {show_value(context.kl, 'nats')} nats"),
        tag("pre", context.before.lstrip("\n"), goes_on),
        table(
            f"Likeliest tokens there, KL {show_value(context.kl, 'nats')}",
            ["", "reference", "probability", "artifact", "probability"],
            rows,
            hidden_caption=True,
        ),
    )


def _choice(choice: Choice, kind: str) -> list[Content]:
    share = choice.probability
    return [visible(choice.token), tag("span", bar(share, kind), f" {share:.1%}", class_="num")]


def layers(entries: Sequence[Entry]) -> Section | None:
    """KL by layer and role, and the error of the calibrated linears."""
    parts = []
    for number, entry in enumerate(entries):
        own: list[Content] = []
        if entry.layers:
            amount = "1 chunk" if entry.layers.chunks == 1 else f"{entry.layers.chunks} chunks"
            whole = show_value(entry.layers.kl, "nats")
            own += [
                tag("p", f"On {amount} of {entry.layers.text}, where the whole artifact's KL is {whole} nats."),
                _layer_chart(number, entry.layers),
            ]
        calibration = entry.manifest and entry.manifest.calibration
        linears = calibration.linears if calibration else []
        if any(one.error and one.layer is not None for one in linears):
            data = table(
                "Relative error of the calibrated linears",
                ["linear", "role", "codec", ">error"],
                [
                    [one.name, one.role, one.codec, f"{one.error:.2e}" if one.error is not None else "not known"]
                    for one in linears
                ],
            )
            caption = "Error of each linear's outputs on the calibration text, relative to the outputs themselves."
            own.append(figure(f"calibration-{number}", caption, charts.calibration_error(linears), data))
        if calibration and (counts := calibration.expert_tokens):
            experts = [f">expert {n}" for n in range(len(counts[0]))]
            rows = [[f"layer {n}", *(f"{count:,}" for count in row)] for n, row in enumerate(counts)]
            title = "Tokens of the calibration text that chose each expert"
            own.append(details(title, table(title, ["", *experts], rows, hidden_caption=True)))
        if own:
            parts.append(per_artifact(entries, entry, *own))
    if not parts:
        return None
    return section("layers", "By layer and role", *parts)


def _layer_chart(number: int, found: Layers) -> Html:
    """What each unit costs: the embedding, the blocks in their order and the head; or the roles, the dearest first."""
    blocks = any(row.layer is not None for row in found.rows)
    rows = sorted(found.rows, key=_place) if blocks else found.rows
    costs = [found.kl - row.kl_without for row in rows]
    values = [
        {
            "name": row.name,
            "label": row.name.removeprefix("block ").replace("embedding", "emb"),
            "value": cost,
            "shown": f"{cost:.4f}",
        }
        for row, cost in zip(rows, costs, strict=True)
    ]
    data = table(
        "KL by block or role",
        ["what", "codecs", ">bytes", ">it costs", ">KL without it", ">KL with it alone", "the next bigger codecs"],
        [
            [
                row.name,
                ", ".join(row.codecs),
                size(row.bytes),
                f"{cost:.4f}",
                show_value(row.kl_without, "nats"),
                show_value(row.kl_only, "nats"),
                _bigger(row),
            ]
            for row, cost in zip(rows, costs, strict=True)
        ],
    )
    title = "KL that it costs, nats"
    chart = charts.by_layer(values, title) if blocks else charts.by_role(values, title)
    caption = "What each costs: the artifact's KL less its KL with that one back in full precision."
    if min(costs) < 0:
        caption += " Below 0, its rounding makes up for another's, or the text is too short to tell."
    return figure(f"layers-{number}", caption, chart, data)


def _place(row: LayerRow) -> float:
    """A block's number; the embedding before all, the head behind."""
    return row.layer if row.layer is not None else -1 if row.role == "embedding" else math.inf


def _bigger(row: LayerRow) -> str:
    if row.next is None:
        return ""
    saved = f"about {show_value(row.next.kl_saved, 'nats')} less, {size(row.next.bytes)} more"
    return f"{', '.join(row.next.codecs)}: {saved}"


def positions(entries: Sequence[Entry]) -> Section | None:
    """KL where long contexts break."""
    parts = []
    for number, entry in enumerate(entries):
        if not (bands := entry.report.positions):
            continue
        data = table(
            f"Long positions, {entry.name}",
            ["positions", ">of a sequence of", ">in a context of", ">KL, mean", ">same most likely token"],
            [
                [
                    f"{band.first} to {band.last}",
                    str(band.tokens),
                    str(band.allocated),
                    figure_cell(band.kl, "nats"),
                    show_value(band.top1, "%"),
                ]
                for band in bands
            ],
        )
        caption = "KL at positions on both sides of the model's boundaries, and at the end of the context."
        parts.append(
            per_artifact(entries, entry, figure(f"positions-{number}", caption, charts.long_positions(bands), data))
        )
    return section("positions", "Long positions", *parts) if parts else None


def answers(entries: Sequence[Entry]) -> Section | None:
    """The greedy answers of both, side by side."""
    parts = []
    for entry in entries:
        found = entry.report.answers
        if not found:
            continue
        differing = [answer for answer in found if answer.equal < answer.tokens or answer.stops is False]
        same = [answer for answer in found if answer not in differing]
        told = tag(
            "p", f"{len(same)} of {len(found)} are the same to the last token. Marked: from the first difference."
        )
        rest = details("The answers that are the same", *(_answer(answer) for answer in same), printed=True)
        shown: list[Content] = [_answer(answer) for answer in differing]
        if len(entries) > 1 and shown:
            shown = [details(f"{len(differing)} answers that differ", *shown, printed=True)]
        head = tag("h3", "Side by side") if len(entries) == 1 else None
        parts.append(per_artifact(entries, entry, told, head, *shown, rest if same else None))
    return section("answers", "Greedy answers", *parts) if parts else None


def _answer(answer: Answer) -> Html:
    alike = _alike(answer.reference, answer.artifact)
    same = answer.equal == answer.tokens
    told = f"all {answer.tokens} tokens the same" if same else f"{answer.equal} of {answer.tokens} tokens the same"
    return tag(
        "article",
        tag("h4", answer.prompt),
        tag(
            "div",
            *(
                tag(
                    "div", tag("h5", who), tag("pre", text[:alike], tag("mark", text[alike:]) if text[alike:] else None)
                )
                for who, text in (("reference", answer.reference), ("artifact", answer.artifact))
            ),
            class_="sides",
        ),
        tag("p", told, class_="quiet"),
        tag("p", "The artifact goes on after the reference's answer.", class_="failed wraps")
        if answer.stops is False
        else None,
    )


def _alike(a: str, b: str) -> int:
    """Number of leading characters that are the same."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tokens(entries: Sequence[Entry]) -> Section:
    """Whether the artifact's tokenizer is the checkpoint's."""
    parts = []
    for entry in entries:
        found = entry.report.tokens
        chat = "a rendered chat among them" if found.chat else "no chat among them: the checkpoint has no template"
        lines: list[Content] = [
            tag("p", f"{found.checked} texts compared, {chat}; {len(found.mismatches)} tokenized differently.")
        ]
        if missing := sorted(set(found.eos_ids) - set(found.eog_ids)):
            lines.append(tag("p", f"The artifact does not stop at token ids {missing}.", class_="failed wraps"))
        else:
            lines.append(tag("p", f"It knows all end tokens of the checkpoint: ids {found.eos_ids}."))
        if found.mismatches:
            rows = [[visible(one.text), code(str(one.reference)), code(str(one.artifact))] for one in found.mismatches]
            lines.append(table("Texts tokenized differently", ["text", "checkpoint's ids", "artifact's ids"], rows))
        parts.append(per_artifact(entries, entry, *lines))
    return section("tokens", "Tokens", *parts)


def speed(entries: Sequence[Entry]) -> Section:
    """Speed as validated, and against the memory bandwidth where it was measured."""
    names = ("prompt_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s", "load_s")
    protocol, environment = entries[0].report.protocol, entries[0].report.environment
    told = (
        f"While validating: a prompt of {protocol.prompt_tokens} tokens, then {protocol.decode_tokens} more, "
        f"with {environment.threads} {'thread' if environment.threads == 1 else 'threads'} of {environment.cpu}."
    )
    validated = table(
        "Speed while validating",
        ["artifact", *(f">{METRICS[name].label}" for name in names)],
        [
            [
                entry.name,
                *(figure_cell(entry.report.metrics.get(name), METRICS[name].unit) for name in names),
            ]
            for entry in entries
        ],
        hidden_caption=True,
    )
    parts: list[Content] = [tag("p", told), validated]
    benches = {entry.name: entry.bench for entry in entries if entry.bench}
    if not benches:
        line = "No benchmark is there to hold against the roofline of memory bandwidth: "
        command = "phi3edge bench FOLDER"
        parts.append(tag("p", line, code(command), class_="quiet"))
        return section("speed", "Speed", *parts)
    tests = [(name, run, test) for name, bench in benches.items() for run in bench.runs for test in run.tests]
    data = table(
        "Benchmark",
        [
            "artifact",
            "test",
            ">threads",
            ">depth",
            ">tokens/s",
            ">share of the roofline",
            ">first token",
            ">J per token",
        ],
        [
            [
                name,
                test.test,
                str(run.threads or ""),
                str(test.depth),
                f"{test.tokens_per_s.median:.1f}"
                + (f" ± {test.tokens_per_s.mad:.1f}" if test.tokens_per_s.mad else ""),
                f"{test.roofline_share:.0%}" if test.roofline_share else "",
                f"{test.time_to_first_token_s:.3f} s" if test.time_to_first_token_s else "",
                f"{test.joules_per_token:.2f}" if test.joules_per_token else "",
            ]
            for name, run, test in tests
        ],
    )
    if any(test.roofline_share for _, _, test in tests):
        widths = sorted({run.bandwidth_bytes_per_s for _, run, _ in tests if run.bandwidth_bytes_per_s})
        measured = " and ".join(f"{width / 1e9:.1f} GB/s" for width in widths)
        caption = f"Decode speed, before what the memory's bandwidth allows ({measured}, measured in the same run)."
        parts.append(figure("speed", caption, charts.speed(benches), data))
    else:
        parts.append(data)
    parts += [tag("p", remark, class_="quiet") for bench in benches.values() for remark in bench.notes]
    return section("speed", "Speed", *parts)


def memory(entries: Sequence[Entry]) -> Section | None:
    """Memory against the target's limit."""
    rows, cells = [], []
    limits = {entry.target.memory.app for entry in entries if entry.target}
    for entry in entries:
        peak = entry.report.metrics.get("peak_memory_bytes")
        what = entry.name if len(entries) > 1 else ""
        rows.append({"name": f"{what} files".strip(), "bytes": entry.bytes})
        if peak:
            rows.append({"name": f"{what} peak".strip(), "bytes": peak.value})
        app = entry.target.memory.app if entry.target else None
        cells.append(
            [
                entry.name,
                size(entry.bytes),
                figure_cell(peak, "bytes"),
                size(app) if app else "no target",
                f"{peak.value / app:.0%}" if peak and app else "",
            ]
        )
    data = table("Memory", ["artifact", ">files", ">peak memory", ">an app may use", ">used"], cells)
    context = entries[0].report.protocol.context
    parts: list[Content] = [
        tag("p", f"Peak memory is of the process that ran it here, with a KV cache for {context:,} tokens.")
    ]
    limit = limits.pop() if len(limits) == 1 else None
    caption = f"Memory{f', and what an app may use on the target ({size(limit)}, the red rule)' if limit else ''}."
    parts.append(figure("memory", caption, charts.memory(rows, limit), data))
    for name, target in {e.manifest.target: e.target for e in entries if e.manifest and e.target}.items():
        parts.append(tag("p", f"{name}: {target.summary}. The limit: {target.memory.source}.", class_="quiet"))
    return section("memory", "Memory", *parts)


def evaluation(entries: Sequence[Entry]) -> Section | None:
    """Scores on tasks."""
    parts = [
        per_artifact(entries, entry, *_evaluation(entry.name, entry.evaluation))
        for entry in entries
        if entry.evaluation
    ]
    return section("evaluation", "Tasks", *parts) if parts else None


def _evaluation(name: str, found: Evaluation) -> list[Content]:
    rows: list[list[Content]] = []
    for task in found.tasks:
        shots = "" if task.num_fewshot is None else str(task.num_fewshot)
        documents = f"{task.documents:,}" + (f" of {task.of:,}" if task.documents < task.of else "")
        rows += [[task.name, shots, documents, *_score(score)] for score in task.scores]
    columns = ["task", ">shots", ">documents", "metric", ">artifact", ">reference", ">difference", ">answers changed"]
    limited = f" At most {found.limit} documents of each task were asked." if found.limit else ""
    told = "± is one standard error; that of a difference is of the same documents, pair by pair."
    return [tag("p", told + limited), table(f"Tasks, {name}", columns, rows, hidden_caption=True)]


def _score(score: Score) -> list[Content]:
    figures = (score.artifact, score.reference, score.difference)
    changed = f"{score.flips.to_wrong} to wrong, {score.flips.to_right} to right" if score.flips else ""
    return [
        f"{score.metric}, {score.filter}" if score.filter != "none" else score.metric,
        *(figure_cell(one, "") if one else "not run" for one in figures),
        changed,
    ]
