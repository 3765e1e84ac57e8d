"""Writes docs/families.md: model by format by method, and the KL where runtimes break, from small checkpoints.

    python bench/families.py [--out docs/families.md]

Every model is a small random checkpoint in the original configuration style, with the real lengths where its function
changes (windows, original contexts, block-sparse patterns). F32 artifacts run in ONNX Runtime GenAI and llama.cpp; KL
is KL(reference || artifact), mean of the last 16 positions of a sequence, llama.cpp opened for that side of the
original context. Methods are tried for real: exported, or refused with the reason that the table gives.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from _models import GROUPED, TIED, write_model
from _moe import write_phimoe
from _small import NARROW, ORIGINAL_PATTERN, write_small
from _small import longrope as small_longrope

from phi3edge.build import export
from phi3edge.distributions import log_softmax
from phi3edge.errors import Phi3EdgeError
from phi3edge.machine import cpu_name
from phi3edge.reference import load_model
from phi3edge.rounding import Rounding
from phi3edge.runners import runner_for

LENGTHS = (512, 1100, 2046, 2047, 2048, 2050, 3000, 4095, 4096, 4097, 4200)
LAST = 16
METHODS = ("rtn", "awq", "gptq", "awq+gptq")
RECIPES = {"onnx": "int4", "gguf": "q4_0"}
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "sleeps", "by", "water")
CONTEXT = 4224


def _longrope(pairs: int, original: int = 4096) -> dict[str, Any]:
    scaling = {
        "type": "longrope",
        "short_factor": [1 + 0.05 * n for n in range(pairs)],
        "long_factor": [1.5 + 0.5 * n for n in range(pairs)],
    }
    lengths = {"max_position_embeddings": 131072, "original_max_position_embeddings": original}
    return {**lengths, "sliding_window": 262144, "rope_scaling": scaling}


LENGTHS_4K = {"max_position_embeddings": 4224, "original_max_position_embeddings": 4224}
MODELS: dict[str, Callable[[Path], Path]] = {
    "mini-4k, medium-4k": lambda folder: write_model(folder, GROUPED, **LENGTHS_4K, sliding_window=2047),
    "mini-128k, medium-128k, 3.5-mini": lambda folder: write_model(folder, GROUPED, **_longrope(32)),
    "phi-4-mini": lambda folder: write_model(folder, TIED, **_longrope(24), partial_rotary_factor=0.75),
    "phi-4": lambda folder: write_model(folder, GROUPED, **LENGTHS_4K, sliding_window=None, rope_theta=250000.0),
    "3.5-MoE": lambda folder: write_phimoe(
        folder,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        sliding_window=131072,
        rope_scaling={
            **_longrope(32)["rope_scaling"],
            "original_max_position_embeddings": 4096,
            "short_mscale": 1.3,
            "long_mscale": 1.3,
        },
    ),
    "small-8k": lambda folder: write_small(folder, NARROW, **ORIGINAL_PATTERN, max_position_embeddings=8192),
    "small-128k (here with an original context of 4,096)": lambda folder: write_small(
        folder,
        NARROW,
        **ORIGINAL_PATTERN,
        **small_longrope(NARROW.head_dim // 2) | {"original_max_position_embeddings": 4096},
        max_position_embeddings=131072,
    ),
}


def main() -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "families.md")
    args = parser.parse_args()
    positions, methods, notes = [], [], []
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "words.txt"
        text.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 6000)))
        for n, (name, write) in enumerate(MODELS.items()):
            checkpoint = write(Path(work) / str(n) / "the model")
            positions += _positions(name, checkpoint, Path(work) / str(n))
            row, reasons = _methods(name, checkpoint, Path(work) / str(n), text)
            methods.append(row)
            notes += reasons
            print(methods[-1], *positions[-2:], sep="\n", flush=True)
    args.out.write_text(_page(positions, methods, notes))


def _positions(name: str, checkpoint: Path, work: Path) -> list[str]:
    """A row for each format: the KL at the end of sequences of LENGTHS."""
    model = load_model(checkpoint)
    vocabulary, limit = model.config.vocab_size, model.config.max_position_embeddings
    original = getattr(model.config, "original_max_position_embeddings", limit) or limit
    tokens = np.random.default_rng(0).integers(0, 256, CONTEXT) % vocabulary
    lengths = [length for length in LENGTHS if length <= limit]
    with torch.inference_mode():
        theirs = {
            length: torch.log_softmax(
                model(torch.from_numpy(tokens[:length])[None], use_cache=False).logits[0, -LAST:].double(), -1
            ).numpy()
            for length in lengths
        }
    rows = []
    for format_ in ("onnx", "gguf"):
        try:
            made = export(
                str(checkpoint),
                "cpu",
                format_=format_,
                recipe="f32",
                out=work / f"f32-{format_}",
                context=min(CONTEXT, limit),
                kv_cache="f32",
            )
        except Phi3EdgeError:
            rows.append(f"| {name} | {format_} | " + " | ".join("-" for _ in LENGTHS) + " |")
            continue
        runtime, found = runner_for(made.artifact), {}
        by_length = original < limit and format_ == "gguf"
        for side in (original, CONTEXT) if by_length else (min(CONTEXT, limit),):
            with runtime.open(made.artifact, context=side, kv_type="f32", plain=True) as runner:
                for length in lengths:
                    if (length <= original) == (side == original) or not by_length:
                        ours = log_softmax(runner.logits(tokens[:length], length - LAST)).astype(np.float64)
                        p = theirs[length]
                        found[length] = float((np.exp(p) * (p - ours)).sum(-1).mean())
        cells = [("< 1e-7" if found[n] < 1e-7 else f"{found[n]:.0e}") if n in found else "" for n in LENGTHS]
        rows.append(f"| {name} | {format_} | " + " | ".join(cells) + " |")
    return rows


def _methods(name: str, checkpoint: Path, work: Path, text: Path) -> tuple[str, list[str]]:
    """A row: for each format, which methods export; and why others are refused."""
    cells, reasons = [], []
    for format_, recipe in RECIPES.items():
        able, refused = [], {}
        for method in METHODS:
            rounding = Rounding(method, *(() if method == "rtn" else (str(text), 8)))
            try:
                out = work / f"{format_}-{method}"
                export(str(checkpoint), "cpu", format_=format_, recipe=recipe, out=out, rounding=rounding)
                able.append(method)
            except Phi3EdgeError as error:
                refused.setdefault(error.message, []).append(method)
        cells.append(", ".join(able) or "refused")
        reasons += [f"- {name}, {format_}, {', '.join(which)}: {why}" for why, which in refused.items()]
    return f"| {name} | {' | '.join(cells)} |", reasons


PAGE = """# The family: what is written, and how exact it is

Written by `python bench/families.py` from small random checkpoints in the original configuration style, with the real
lengths where each model's function changes; {machine}. Tests hold the same, mostly at smaller lengths:
`test_longrope.py`, `test_validate.py`, `test_emit_gguf.py`, `test_emit_ort_genai.py`,
`test_phimoe_gguf.py`, `test_phimoe_onnx.py`,
`test_small_onnx.py`, `test_small_rounding.py`, `test_rounding.py`.

## Methods

| model | ONNX for the CPU | GGUF |
|---|---|---|
{methods}

{notes}

Byte budgets (`--budget`) work for all models, for 3.5-MoE with `--calibration python` or a file.
Phi-3-vision is refused by name.

## Position against KL

F32 artifacts; KL(reference || artifact) in nats, mean of the last 16 positions of a sequence of so many tokens.
llama.cpp is opened for the side of the original context that the sequence is on.

| model | format | {lengths} |
|---|---|{rules}
{positions}

llama.cpp ignores Phi-3-mini-4k's window of 2,047 tokens. In a GGUF file of Phi-3.5-MoE, tokens for which another
expert is within 2 % of a chosen one differ, and so does what attends to them: `experts_shared` in a report says how
many they are.
"""


def _page(positions: list[str], methods: list[str], notes: list[str]) -> str:
    return PAGE.format(
        machine=cpu_name(),
        methods="\n".join(methods),
        notes="\n".join(notes),
        lengths=" | ".join(map(str, LENGTHS)),
        rules="---|" * len(LENGTHS),
        positions="\n".join(positions),
    )


if __name__ == "__main__":
    main()
