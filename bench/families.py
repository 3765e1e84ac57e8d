"""Writes docs/families.md: model by format by method, and the KL where runtimes break, from small checkpoints.

    python bench/families.py [--out docs/families.md]

Every model is a small random checkpoint in the original configuration style, with the real lengths where its function
changes (windows, original contexts, block-sparse patterns). F32 artifacts run in ONNX Runtime GenAI and llama.cpp; KL
is KL(reference || artifact), mean of the last 16 positions of a sequence, llama.cpp opened for that side of the
original context. Token by token, a runtime goes on from a prompt with its own most likely tokens and its KV cache,
across the same places. Methods are tried for real: exported, or refused with the reason that the table gives.
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
from _vision import SHAPE as VISION
from _vision import write_vision

from phi3edge.build import export
from phi3edge.distributions import log_softmax
from phi3edge.errors import Phi3EdgeError
from phi3edge.machine import cpu_name
from phi3edge.reference import load_model
from phi3edge.rounding import Rounding
from phi3edge.runners import runner_for

LENGTHS = (512, 1100, 2046, 2047, 2048, 2050, 3000, 4095, 4096, 4097, 4200)
LAST = 16
SPANS = ((2040, 12), (2994, 12), (4084, 12), (4090, 14))
"""Tokens of a prompt, and tokens decoded after it: across windows and LongRoPE's original context (the last)."""

SHRUNK = "small-128k (here with an original context of 4,096)"
"""Its runtime recomputes at the 8,192 tokens of the real one, which test_small_onnx.py crosses."""

METHODS = ("rtn", "awq", "gptq", "awq+gptq")
RECIPES = {"onnx": "int4", "gguf": "q4_0"}
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "sleeps", "by", "water")
CONTEXT = 4224


def _longrope(pairs: int, original: int = 4096, kind: str = "longrope") -> dict[str, Any]:
    scaling = {
        "type": kind,
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
    "3-vision, 3.5-vision (text)": lambda folder: write_vision(folder, VISION, **_longrope(32, kind="su")),
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
    SHRUNK: lambda folder: write_small(
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
    positions, decoded, methods, notes = [], [], [], []
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "words.txt"
        text.write_text(" ".join(np.random.default_rng(0).choice(WORDS, 6000)))
        for n, (name, write) in enumerate(MODELS.items()):
            checkpoint = write(Path(work) / str(n) / "the model")
            prompts, steps = _positions(name, checkpoint, Path(work) / str(n))
            positions += prompts
            decoded += steps
            row, reasons = _methods(name, checkpoint, Path(work) / str(n), text)
            methods.append(row)
            notes += reasons
            print(methods[-1], *positions[-2:], *decoded[-2:], sep="\n", flush=True)
    args.out.write_text(_page(positions, decoded, methods, notes))


def _positions(name: str, checkpoint: Path, work: Path) -> tuple[list[str], list[str]]:
    """A row for each format: the KL at the end of sequences of LENGTHS; and another: the KL while decoding SPANS."""
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
    rows, decoded = [], []
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
            decoded.append(f"| {name} | {format_} | " + " | ".join("-" for _ in SPANS) + " |")
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
        cells = [_shown(found[n]) if n in found else "" for n in LENGTHS]
        rows.append(f"| {name} | {format_} | " + " | ".join(cells) + " |")
        boundary = original if original < limit else None
        cells = []
        for prompt, count in SPANS:
            crosses = boundary is not None and prompt <= boundary < prompt + count
            if crosses and (format_ == "gguf" or name == SHRUNK):
                cells.append("-")
                continue
            side = original if by_length and prompt + count <= original else min(CONTEXT, limit)
            decode = _llama_cpp if format_ == "gguf" else _genai
            ids, ours = decode(made.artifact, tokens[:prompt], count, side)
            cells.append(_shown(_worst(model, ids, ours, boundary)))
        decoded.append(f"| {name} | {format_} | " + " | ".join(cells) + " |")
    return rows, decoded


def _shown(kl: float) -> str:
    return "< 1e-7" if kl < 1e-7 else f"{kl:.0e}"


def _genai(artifact: Path, prompt: np.ndarray, count: int, context: int) -> tuple[list[int], np.ndarray]:
    """A prompt and what onnxruntime-genai generates after it, and the logits of each token.

    Nothing but token 0 ends a generation here: what the runtime does to go past an end would be in the logits.
    """
    import onnxruntime_genai as og

    config = og.Config(str(artifact.parent))
    config.clear_providers()
    config.overlay('{"model": {"eos_token_id": 0}}')  # a list would be added to the folder's
    parameters = og.GeneratorParams(model := og.Model(config))
    parameters.set_search_options(max_length=context, do_sample=False)
    generator, ids, rows = og.Generator(model, parameters), prompt.tolist(), []
    generator.append_tokens(prompt.astype(np.int32))
    for _ in range(count):
        assert not generator.is_done(), "token 0 came: take another prompt"
        generator.generate_next_token()
        ids.append(int(generator.get_next_tokens()[0]))
        rows.append(generator.get_output("logits")[0, -1].copy())  # of the run that it was chosen from
    return ids, np.stack(rows)


def _llama_cpp(artifact: Path, prompt: np.ndarray, count: int, context: int) -> tuple[list[int], np.ndarray]:
    """A prompt and the most likely tokens after it, decoded one by one in llama.cpp, and the logits of each."""
    ids, rows = prompt.tolist(), []
    with runner_for(artifact).open(artifact, context=context, kv_type="f32", plain=True) as runner:
        for _ in range(count):
            rows.append(runner.logits(np.array(ids), len(ids) - 1, reuse=True)[0])
            ids.append(int(rows[-1].argmax()))
    return ids, np.stack(rows)


def _worst(model: Any, ids: list[int], ours: np.ndarray, boundary: int | None) -> float:
    """The largest KL of rows that predict the last tokens of `ids`: each from all before it, rotated for so many."""
    before = np.arange(len(ids) - len(ours), len(ids))
    theirs = np.empty(ours.shape)
    with torch.inference_mode():
        for part in (before <= boundary, before > boundary) if boundary else (before > 0,):
            if part.any():
                logits = model(torch.tensor([ids[: before[part][-1]]]), use_cache=False).logits[0, before[part] - 1]
                theirs[part] = torch.log_softmax(logits.double(), -1).numpy()
    log_probs = torch.log_softmax(torch.from_numpy(ours).double(), -1).numpy()
    return float((np.exp(theirs) * (theirs - log_probs)).sum(-1).max())


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
`test_phimoe_gguf.py`, `test_phimoe_onnx.py`, `test_phimoe_rounding.py`, `test_phi3_vision.py`,
`test_small_onnx.py`, `test_small_rounding.py`, `test_rounding.py`.

## Methods

| model | ONNX for the CPU | GGUF |
|---|---|---|
{methods}

{notes}

Byte budgets (`--budget`) work for all models, for 3.5-MoE with `--calibration python` or a file.

Phi-3-vision and Phi-3.5-vision are exported as their text decoder; images are not in the artifact. Their tokenizer
swallows white space after `<|assistant|>` and not after `<|user|>` or `<|end|>`, which a GGUF file cannot say: its chat
template leaves that white space out, so that a chat has the reference's token ids. Other texts with such a token before
white space have not, and `tokenizer_mismatches` counts them. In ONNX folders all ids are the reference's.

## Position against KL

F32 artifacts; KL(reference || artifact) in nats, mean of the last 16 positions of a sequence of so many tokens.
llama.cpp is opened for the side of the original context that the sequence is on.

| model | format | {lengths} |
|---|---|{rules}
{positions}

## Token by token

The same artifacts; the largest KL of tokens that the runtime decodes after a prompt, with its KV cache: the first one
is predicted from the number of tokens before the dash, the last one from that behind it. onnxruntime-genai recomputes
the prompt with LongRoPE's other factors as soon as a sequence is longer than the original context; llama.cpp is opened
for one side of it, and cannot cross (-). The runtime's limit for small-128k is that of the real one, 8,192:
`test_small_onnx.py` crosses it.

| model | format | {spans} |
|---|---|{span_rules}
{decoded}

llama.cpp ignores Phi-3-mini-4k's window of 2,047 tokens, which is why a GGUF file's default context ends there. In a
GGUF file of Phi-3.5-MoE, tokens for which another expert is within 2 % of a chosen one differ, and so does what attends
to them: `experts_shared` in a report says how many they are.

## Phi-3.5-MoE in ONNX on GPUs

By structure only: the graphs pass the lists in `providers/`, and run on the CPU provider (`test_phimoe_onnx.py`), on no
GPU. For CUDA the graph is the CPU's, with 16-bit floats where nothing is compared or summed; its list has no ReduceMax
and no Equal of the graph's opset, so the best score comes from ArgMax and GatherElements. WebGPU has no NonZero and no
Max, and compares no 64-bit integers (onnxruntime's core/providers/webgpu), so there every expert computes every token
and Where leaves out what was not chosen: exact, with all experts' weights read for every token. onnxruntime's own QMoE
is not used: its `use_sparse_mixer` is CUDA's alone (the CPU's kernel ignores it), so that nothing here could show that
it is the model's. For DirectML there is no graph.
"""


def _page(positions: list[str], decoded: list[str], methods: list[str], notes: list[str]) -> str:
    return PAGE.format(
        machine=cpu_name(),
        methods="\n".join(methods),
        notes="\n".join(notes),
        lengths=" | ".join(map(str, LENGTHS)),
        rules="---|" * len(LENGTHS),
        positions="\n".join(positions),
        decoded="\n".join(decoded),
        spans=" | ".join(f"{prompt}-{prompt + count - 1}" for prompt, count in SPANS),
        span_rules="---|" * len(SPANS),
    )


if __name__ == "__main__":
    main()
