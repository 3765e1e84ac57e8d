"""The page's last sections: how the artifact was made, from what, how the figures were taken, and what was not run."""

from __future__ import annotations

from collections.abc import Sequence

from phi3edge.metrics import show_value
from phi3edge.page.entries import Entry, Manifest
from phi3edge.page.html import Content, Html, bar, code, definitions, details, table, tag
from phi3edge.page.overview import Section, per_artifact, section
from phi3edge.units import size


def plan(entries: Sequence[Entry]) -> Section | None:
    """Codecs and bytes by role."""
    parts = []
    for entry in entries:
        said = entry.manifest
        if said is None or said.plan is None:
            continue
        total = max(said.plan.weight_bytes, 1)
        rows: list[list[Content]] = [
            [
                role.role,
                role.codec + (f" (for {role.wanted})" if role.wanted else ""),
                role.method,
                str(role.tensors),
                size(role.bytes),
                tag("span", bar(role.bytes / total), f" {role.bytes / total:.1%}"),
                show_value(role.predicted_kl, "nats") if role.predicted_kl is not None else "",
            ]
            for role in said.plan.roles
        ]
        told = f"Recipe {said.recipe.name}: {said.plan.bits_per_weight:.2f} bits per weight, {size(total)} of weights"
        if said.plan.predicted_kl is not None:
            told += f", KL predicted {show_value(said.plan.predicted_kl, 'nats')}"
            told += f" and measured {show_value(entry.report.metrics['kl_mean'].value, 'nats')}"
        columns = ["role", "codec", "method", ">tensors", ">bytes", "share", ">predicted KL"]
        parts.append(
            per_artifact(
                entries,
                entry,
                tag("p", f"{told}.", f" {said.recipe.summary}." if said.recipe.summary else None),
                table(f"Plan of {entry.name}", columns, rows, hidden_caption=True),
                *(tag("p", note, class_="quiet") for note in said.notes),
            )
        )
    return section("plan", "Plan", *parts) if parts else None


def provenance(entries: Sequence[Entry]) -> Section:
    """Files, checkpoint, texts, protocol and environment, with hashes."""
    parts = [per_artifact(entries, entry, *_provenance(entry)) for entry in entries]
    return section("provenance", "Provenance", *parts)


def _provenance(entry: Entry) -> list[Content]:
    report, said = entry.report, entry.manifest
    protocol, environment, whole = report.protocol, report.environment, report.checkpoint
    parts: list[Content] = [
        definitions(
            [
                ("checkpoint", whole.name),
                ("repository", whole.repository),
                ("revision", code(whole.revision) if whole.revision else None),
                *(_made(said) if said else [("made by", "not known: no manifest")]),
                ("evaluated on", _hashed(report.text.name, report.text.sha256)),
                (
                    "protocol",
                    f"{protocol.chunks} windows of {protocol.chunk_tokens} tokens, one every {protocol.stride}; "
                    f"{protocol.scored_tokens:,} tokens scored, each after at least {protocol.context_tokens}",
                ),
                ("reference", protocol.reference),
                (
                    "distributions kept",
                    f"{protocol.distributions}; this adds {show_value(protocol.kl_drawing_error, 'nats')} "
                    "to the standard error of the mean KL",
                ),
                (
                    "validated on",
                    f"{environment.cpu}, {environment.threads} of {environment.cores} cores, "
                    f"{environment.system} {environment.machine}, Python {environment.python}",
                ),
                ("with", ", ".join(f"{name} {version}" for name, version in environment.software.items())),
            ]
        ),
        table(
            "Files of the artifact",
            ["file", ">bytes", "SHA-256"],
            [[file.name, f"{file.bytes:,}", code(file.sha256)] for file in report.artifact],
        ),
    ]
    if said and said.inputs:
        files = [[file.name, f"{file.bytes:,}", code(file.sha256)] for file in said.inputs]
        inputs = table("Files of the checkpoint that it was made from", ["file", ">bytes", "SHA-256"], files)
        parts.append(details(f"Files of the checkpoint ({len(files)})", inputs, printed=True))
    flags = [[name, "none" if value is None else str(value)] for name, value in environment.flags.items()]
    parts.append(details("Flags of the runtime", table("Flags of the runtime", ["flag", "value"], flags), printed=True))
    return parts


def _made(said: Manifest) -> list[tuple[str, Content]]:
    """From what and by what, as the manifest says."""
    model, calibration = said.model, said.calibration
    terms: list[tuple[str, Content]] = [
        ("licence", model.licence or "not stated"),
        ("parameters", f"{model.parameters:,}" if model.parameters else None),
        ("target", f"{said.target}, {said.format}, context {said.context:,}"),
        ("KV cache", said.kv_cache),
        ("recipe", said.recipe.name),
        ("seed", None if said.seed is None else str(said.seed)),
        ("made with", ", ".join(f"{name} {version}" for name, version in said.versions.items())),
    ]
    if calibration:
        known = calibration.sequences and calibration.tokens
        amount = f", {calibration.sequences} sequences of {calibration.tokens} tokens" if known else ""
        terms.append(("calibrated on", _hashed(calibration.text + amount, calibration.sha256)))
    return terms


def _hashed(name: str, sha256: str | None) -> Html:
    return tag("span", name, *((". SHA-256 ", code(sha256)) if sha256 else ()))


def not_run(entries: Sequence[Entry]) -> Section:
    """What the figures do not show."""
    lines = [
        tag("li", f"{entry.name}: {line}" if len(entries) > 1 else line)
        for entry in entries
        for line in entry.report.not_run
    ]
    if missing := _missing(entries):
        lines += missing
    content = tag("ul", *lines) if lines else tag("p", "Nothing that phi3edge knows of.")
    return section("not-run", "What was not run", content)


def _missing(entries: Sequence[Entry]) -> list[Html]:
    """Measurements that are other commands'."""
    ours = [entry for entry in entries if entry.manifest]
    commands = (
        ("KL by layer and role", "phi3edge layers", [e.name for e in ours if e.layers is None]),
        ("speed against the roofline", "phi3edge bench", [e.name for e in ours if e.bench is None]),
        ("tasks", "phi3edge eval", [e.name for e in ours if e.evaluation is None]),
    )
    return [
        tag("li", what, f" ({', '.join(names)})" if len(entries) > 1 else None, ": ", code(command))
        for what, command, names in commands
        if names
    ]
