"""Artifacts' folders as export and validate leave them, without a model in them: for cards and uploads."""

import hashlib
import json
from pathlib import Path
from typing import Any

from phi3edge.gates import Gate
from phi3edge.metrics import Metric
from phi3edge.report import (
    Checkpoint,
    Environment,
    File,
    Histogram,
    Protocol,
    Report,
    TextInfo,
    Tokens,
    to_json,
)

REPOSITORY = "microsoft/Phi-3-mini-4k-instruct"
REVISION = "0a67737cc96d2554230f90338b163bc6380a2a85"
CALIBRATED = {"text": "wiki.txt", "sha256": "c" * 64, "sequences": 48, "tokens": 512, "device": "cpu", "linears": []}
WEIGHTS = {"gguf": {"tiny-q8_0.gguf": b"GGUF" + bytes(1000)}, "onnx": {"model.onnx": b"graph", "model.onnx.data": b"w"}}


def write_artifact(folder: Path, format_: str = "gguf", passed: bool | None = None, **changes: Any) -> Path:
    """A folder with weights, manifest and, unless `passed` is None, a report; `changes` are of the manifest."""
    folder.mkdir()
    for name, data in WEIGHTS[format_].items():
        (folder / name).write_bytes(data)
    (folder / "phi3edge.json").write_text(json.dumps(manifest(format_) | changes))
    if passed is not None:
        (folder / "report.json").write_text(to_json(report(format_, passed)))
    return folder


def manifest(format_: str) -> dict[str, Any]:
    """As build.export writes it, shortened."""
    files = [{"name": n, "bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in WEIGHTS[format_].items()]
    role = {"role": "head", "codec": "q8_0", "wanted": None, "method": "gptq", "tensors": 1, "bytes": 1234}
    return {
        "schema": 1,
        "model": {
            "name": "Phi-3-mini-4k-instruct",
            "family": "phi3",
            "parameters": 3_821_079_552,
            "checkpoint": f"{REPOSITORY}@{REVISION}",
            "repository": REPOSITORY,
            "revision": REVISION,
            "licence": "mit",
        },
        "format": format_,
        "requires": {"onnxruntime-genai": ">=0.9"} if format_ == "onnx" else {},
        "files": files,
        "target": "iphone",
        "context": 2048,
        "kv_cache": "q8_0" if format_ == "gguf" else "f32",
        "recipe": {"name": "q8_0", "summary": "8 bits", "formats": [format_], "method": "gptq"},
        "plan": {"bits_per_weight": 8.5, "weight_bytes": 1234, "predicted_kl": None, "roles": [role], "chosen": []},
        "calibration": None,
        "notes": ["A note that is worth reading."],
        "seed": None,
        "inputs": [{"name": "config.json", "bytes": 5, "sha256": "b" * 64}],
        "versions": {"phi3edge": "0.1.0", "python": "3.11.7", "numpy": "2.4.6", "numba": "0.68.1"},
    }


def report(format_: str, passed: bool) -> Report:
    return Report(
        passed=passed,
        artifact=[File(name=name, bytes=len(data), sha256="a" * 64) for name, data in WEIGHTS[format_].items()],
        checkpoint=Checkpoint(name="Phi-3-mini-4k-instruct"),
        text=TextInfo(name="python-3.11 docs", sha256="d" * 64),
        protocol=Protocol(
            chunks=16,
            chunk_tokens=512,
            stride=512,
            context_tokens=256,
            scored_tokens=4080,
            reference="transformers, float32",
            distributions="top-k",
            kl_drawing_error=0.0,
            context=2048,
            prompt_tokens=128,
            decode_tokens=32,
        ),
        metrics={
            "ppl": Metric(value=6.25, standard_error=0.125),
            "kl_mean": Metric(value=0.0123, standard_error=0.0004),
            "decode_tokens_per_s": Metric(value=21.5),
        },
        gates=[Gate(name="kl_mean", sense="max", limit=0.02 if passed else 0.01, rule="", value=0.0123, passed=passed)],
        tokens=Tokens(checked=3, mismatches=[], eos_ids=[0], eog_ids=[0], chat=True),
        answers=[],
        histogram=Histogram(edges=[0, 1], counts=[1]),
        worst=[],
        environment=Environment(
            system="Linux",
            machine="x86_64",
            cpu="AMD EPYC",
            cores=2,
            python="3.11.7",
            threads=2,
            software={"llama.cpp": "llama-cpp-python 0.3.36"},
            flags={},
        ),
        not_run=["The GPU's kernels."],
    )
