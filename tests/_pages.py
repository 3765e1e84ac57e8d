"""Artifacts' folders with everything that a page shows, and texts in them that mean harm."""

import json
from pathlib import Path
from typing import Any

import _cards

from phi3edge.comparison import Comparison, Pair
from phi3edge.gates import Gate
from phi3edge.metrics import METRICS, Metric
from phi3edge.report import Answer, Band, Choice, Context, Histogram, Mismatch, Report, Tokens, to_json

HOSTILE = "</script></pre><img src=x onerror=\"alert('harm')\"><!--&amp;"
"""A token's or artifact's text that must not become markup."""

VALUES = {"%": 0.875, "nats": 0.0525, "bytes": 140e6, "tokens/s": 73.25, "s": 0.375, "count": 6.5, "": 10.5}


def report(passed: bool = True, scale: float = 1.0, hostile: str = HOSTILE) -> Report:
    """Of `_cards`' GGUF artifact, with every metric; KL and size times `scale`."""
    found = _cards.report("gguf", passed)
    file = found.artifact[0].model_copy(
        update={"sha256": _cards.manifest("gguf")["files"][0]["sha256"], "bytes": round(140e6 * scale)}
    )
    metrics = {name: Metric(value=VALUES[kind.unit], standard_error=0.0125) for name, kind in METRICS.items()}
    metrics |= {"kl_mean": Metric(value=0.0525 / scale, standard_error=0.002), "kl_p99": Metric(value=0.9)}
    limit = 0.25 if passed else 0.01
    choices = [Choice(token=hostile, probability=0.75), Choice(token=" \n", probability=0.125)]
    return found.model_copy(
        update={
            "artifact": [file],
            "metrics": metrics,
            "gates": [
                Gate(name="kl_mean", sense="max", limit=limit, rule="", value=metrics["kl_mean"].value, passed=passed),
                Gate(name="top1", sense="min", limit=0.7, rule="0.9 of the baseline's", value=0.875, passed=True),
                Gate(name="eog_missing", sense="max", limit=0, rule="", value=0, passed=True),
            ],
            "tokens": Tokens(
                checked=3,
                mismatches=[Mismatch(text=hostile, reference=[1, 2], artifact=[3])],
                eos_ids=[0, 2],
                eog_ids=[0],
                chat=True,
            ),
            "answers": [
                _answer("What is the sea?", "The sea is vast." + hostile, "The sea is deep.", 3, stops=False),
                _answer("Paris?", "Yes.", "Yes.", 5, stops=True),
            ],
            "positions": [
                Band(first=p, last=p + 15, tokens=a, allocated=a, kl=Metric(value=k, standard_error=0.01), top1=0.9)
                for p, a, k in ((4080, 4096, 0.05), (4096, 8192, 0.07), (4080, 8192, 0.9), (8175, 8192, 1.1))
            ],
            "histogram": Histogram(edges=[1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0], counts=[1, 20, 90, 60, 12, 1]),
            "worst": [
                Context(kl=0.9 - n / 10, before=f"{n} {hostile}\n", token=hostile, reference=choices, artifact=choices)
                for n in range(6)
            ],
        }
    )


def _answer(prompt: str, reference: str, artifact: str, equal: int, stops: bool) -> Answer:
    return Answer(prompt=prompt, reference=reference, artifact=artifact, equal=equal, tokens=5, ended=True, stops=stops)


def write_folder(folder: Path, found: Report) -> Path:
    """An artifact's folder with all files that a page reads."""
    linears = [
        {"name": f"{role}.{n}", "role": role, "layer": n, "codec": "q8_0", "tokens": 9, "error": 1e-3 / (n + 1)}
        for n in range(6)
        for role in ("attn_qkv", "ffn_down")
    ]
    calibration: dict[str, Any] = {"text": "wiki.txt", "sha256": "c" * 64, "sequences": 48, "tokens": 512}
    _cards.write_artifact(folder, calibration=calibration | {"device": "cpu", "linears": linears})
    (folder / "report.json").write_text(to_json(found), encoding="utf-8")
    (folder / "layers.json").write_text(json.dumps(layers()))
    (folder / "bench.json").write_text(json.dumps(bench()))
    (folder / "eval.json").write_text(json.dumps(evaluation()))
    return folder


def layers() -> dict[str, Any]:
    """As `phi3edge layers` writes it."""
    units = [(None, "embedding", 0.01), *((n, None, 0.002 * (n + 1)) for n in range(6)), (None, "head", 0.004)]
    bigger = {"codecs": ["q8_0"], "bytes": 1_000_000, "kl_saved": 0.002, "kl_saved_per_mb": 0.002}
    rows = [
        {
            "layer": layer,
            "role": role,
            "codecs": ["q4_0"],
            "bytes": 2_000_000,
            "kl_without": 0.0525 - cost,
            "kl_only": cost,
            "next": bigger if layer else None,
        }
        for layer, role, cost in units
    ]
    return {"schema": 1, "text": "python-3.11 docs", "chunks": 2, "kl": 0.0525, "rows": rows}


def bench() -> dict[str, Any]:
    """As `phi3edge bench --json` prints it."""
    tests = [
        {
            "test": name,
            "prompt": prompt,
            "decode": decode,
            "depth": depth,
            "tokens_per_s": {"median": speed, "mad": 0.5, "mean": speed, "stddev": 0.6},
            "time_to_first_token_s": 0.25 if prompt else None,
            "joules_per_token": None,
            "roofline_share": share,
        }
        for name, prompt, decode, depth, speed, share in (
            ("pp512", 512, 0, 0, 350.0, None),
            ("tg128", 0, 128, 0, 73.0, 0.61),
            ("tg128 @ d4096", 0, 128, 4096, 51.0, 0.55),
        )
    ]
    run = {"threads": 2, "batch": 512, "bandwidth_bytes_per_s": 17.2e9, "peak_memory_bytes": 3e8, "tests": tests}
    return {"schema": 1, "cpu": "AMD EPYC", "notes": ["measure again alone"], "runs": [run]}


def evaluation() -> dict[str, Any]:
    """As `phi3edge eval` writes it."""
    score = {
        "metric": "acc",
        "filter": "none",
        "artifact": {"value": 0.68, "standard_error": 0.01},
        "reference": {"value": 0.69, "standard_error": 0.01},
        "difference": {"value": -0.01, "standard_error": 0.003},
        "flips": {"questions": 100, "to_wrong": 3, "to_right": 2},
    }
    task = {"name": "hellaswag", "num_fewshot": 5, "documents": 100, "of": 10042, "scores": [score]}
    return {"schema_version": 1, "limit": 100, "tasks": [task]}


def comparison() -> Comparison:
    """Three artifacts, one of which failed and has a name that means harm."""
    reports = {"q4_0": report(), "q8_0": report(scale=2.0), f"peer {HOSTILE}": report(passed=False, scale=0.9)}
    names = list(reports)
    pairs = [
        Pair(a=a, b=b, kl=Metric(value=0.03 * (n + m), standard_error=0.001), top1=Metric(value=0.91))
        for n, a in enumerate(names)
        for m, b in enumerate(names)
        if n < m
    ]
    return Comparison(passed=False, reports=reports, pairs=pairs)
