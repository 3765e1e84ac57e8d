"""What each method of rounding costs, on each codec: the blocks' linears are rounded, all else stays float.

    python bench/methods.py [--checkpoint demo | --dither FOLDER] [--text FILE] [--methods awq gptq] [--codecs q4_0]

--dither takes a variant of the demo without grid or channel scales, and writes it there unless it is there already.
KL and perplexity are those of the packed rows, computed in torch over the second halves of the chunks. One JSON line
for each; KL in nats a token, seconds of rounding alone. Calibration text that the model writes is kept in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from _dithered_demo import write_dithered_demo
from decode import kept
from torch import Tensor

from phi3edge.accumulate import Accumulator
from phi3edge.calibrate import round_model
from phi3edge.calibration import CalibrationText, calibration_text
from phi3edge.checkpoint import Checkpoint
from phi3edge.codecs import codec, row_bytes
from phi3edge.families import parse_config
from phi3edge.forward import LINEARS, Decoder, Weights, load_block, load_outer
from phi3edge.quantize import Rows
from phi3edge.reference import load_tokenizer
from phi3edge.rewrite import Rewritten
from phi3edge.rounding import TOKENS, default_sequences
from phi3edge.sources import resolve
from phi3edge.text import cut, default_text, read_text
from phi3edge.types import ModelSpec, QuantPlan, Statistics, TensorPlan

METHODS = ("rtn", "rtn-statistics", "awq", "awq+gptq", "gptq-plain", "gptq")
"""gptq-plain is gptq in the checkpoint's own basis; rtn-statistics weighs columns by their inputs' mean squares."""

Rounded = tuple[Checkpoint | Rewritten, Rows]
"""Where the weights that were not rounded are read, and the rows of those that were."""


def main() -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--dither", type=Path)
    parser.add_argument("--text", type=Path, help="to score on; default: documentation inside Python")
    parser.add_argument("--calibration", help="as in phi3edge export")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--codecs", nargs="*", default=["q4_0", "q4_k", "uint4_b32"])
    args = parser.parse_args()
    name = str(kept(args.dither, write_dithered_demo)) if args.dither else args.checkpoint
    with torch.inference_mode(), resolve(name) as checkpoint, tempfile.TemporaryDirectory() as cache:
        spec = parse_config(checkpoint.config, checkpoint.generation_config, checkpoint.name)
        tokens = min(TOKENS, spec.context_length)
        sequences = args.sequences or default_sequences(spec)
        text = calibration_text(args.calibration, checkpoint.path, spec, sequences, tokens)
        scored = read_text(args.text) if args.text else default_text()
        ids = load_tokenizer(checkpoint.path)(scored.text)["input_ids"]
        evaluation = Evaluation(checkpoint, spec, cut(ids, args.chunks, tokens, tokens, scored.name))
        os.environ["PHI3EDGE_CACHE"] = cache  # what is rounded already would take no time
        said = {"calibration": text.name, "sequences": len(text.ids), "text": scored.name, "chunks": args.chunks}
        print(json.dumps({"checkpoint": name, **said, "perplexity": round(evaluation.float_perplexity, 4)}), flush=True)
        for codec_name in args.codecs:
            for method in args.methods:
                start = time.perf_counter()
                plan = plan_of(spec, codec_name, method.split("-")[0])
                found = rounded(checkpoint, plan, method, text)
                seconds = time.perf_counter() - start
                kl, perplexity = evaluation.score(plan, *found)
                row = {"kl": round(kl, 5), "perplexity": round(perplexity, 4), "seconds": round(seconds, 1)}
                print(json.dumps({"method": method, "codec": codec_name, **row}), flush=True)


def plan_of(spec: ModelSpec, name: str, method: str) -> QuantPlan:
    """The codec for the linears of the blocks."""
    tensors = []
    for t in spec.tensors:
        chosen, how = (name, method) if t.role in LINEARS else ("f32", "cast")
        tensors.append(TensorPlan(t, chosen, how, t.size // t.shape[-1] * row_bytes(chosen, t.shape[-1])))
    return QuantPlan(spec, "bench", tuple(tensors))


def rounded(checkpoint: Checkpoint, plan: QuantPlan, method: str, text: CalibrationText) -> Rounded:
    """The model, rounded."""
    if method.startswith("rtn"):
        weighted = method == "rtn-statistics"
        squares = {k: s.squares for k, s in statistics_of(checkpoint, plan.model, text.ids)} if weighted else {}
        return checkpoint, nearest(checkpoint, plan, squares)
    source = Rewritten(checkpoint, plan.model) if method == "gptq" else checkpoint
    return source, round_model(source, plan, text).rows


def nearest(checkpoint: Checkpoint, plan: QuantPlan, squares: dict[str, np.ndarray]) -> Rows:
    """All of it in memory."""
    packed = {}
    for t in plan.tensors:
        if t.method == "rtn":
            name, module = t.tensor.name, codec(t.codec)
            packed[name] = module.pack(module.quantize(checkpoint.read(name), squares.get(name)))
    return lambda t, start, stop: packed[t.tensor.name][start:stop] if t.method == "rtn" else None


def statistics_of(checkpoint: Checkpoint, spec: ModelSpec, ids: np.ndarray) -> Iterator[tuple[str, Statistics]]:
    """Of the float model's linears, by tensor name."""
    decoder, names = Decoder(spec), {(t.role, t.layer): t.name for t in spec.tensors}
    hidden = [load_outer(checkpoint, spec, "embedding")[torch.from_numpy(row[None])] for row in ids]
    for layer in range(spec.layers):
        weights = load_block(checkpoint, spec, layer)
        sums = {role: Accumulator(weights[role].shape[1], moments=False) for role in LINEARS}

        def observe(role: str, x: Tensor, sums: dict[str, Accumulator] = sums) -> None:
            sums[role].add(x)

        hidden = [decoder.block(h, weights, observe) for h in hidden]
        yield from ((names[role, layer], found.statistics()) for role, found in sums.items())


class Evaluation:
    """The float model's hidden states on the text, and what is held against them."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, ids: np.ndarray) -> None:
        """For ids of shape (chunks, tokens)."""
        self._spec, self._decoder, self._ids = spec, Decoder(spec), torch.from_numpy(ids)
        self._checkpoint = checkpoint
        self._states = self._run(lambda layer: load_block(checkpoint, spec, layer), checkpoint)
        self.float_perplexity = self._compare(self._states, checkpoint)[1]

    def score(self, plan: QuantPlan, source: Checkpoint | Rewritten, rows: Rows) -> tuple[float, float]:
        """Mean KL from the float model, and perplexity, of a model with the packed rows in it."""

        def weights(layer: int) -> Weights:
            block = {t.tensor.role: t for t in plan.tensors if t.tensor.layer == layer}
            return load_block(source, self._spec, layer) | {
                role: weight for role, t in block.items() if (weight := unpacked(t, rows)) is not None
            }

        return self._compare(self._run(weights, source), source)

    def _run(self, weights: Callable[[int], Weights], source: Checkpoint | Rewritten) -> Tensor:
        hidden = load_outer(source, self._spec, "embedding")[self._ids]
        for layer in range(self._spec.layers):
            block = weights(layer)
            hidden = torch.cat([self._decoder.block(h[None], block) for h in hidden])
        return hidden

    def _compare(self, states: Tensor, source: Checkpoint | Rewritten) -> tuple[float, float]:
        """The second half of each chunk is scored, as `phi3edge validate` does."""
        half = self._ids.shape[1] // 2
        outer = [
            [load_outer(c, self._spec, role) for role in ("output_norm", "head")] for c in (self._checkpoint, source)
        ]
        kl, nll = [], []
        for row, *both in zip(self._ids, self._states, states, strict=True):
            p, q = (
                (self._decoder.norm(h[half:-1], gain) @ head.T).log_softmax(-1)
                for h, (gain, head) in zip(both, outer, strict=True)
            )
            kl.append((p.exp() * (p - q)).sum(-1).mean())
            nll.append(-q.gather(1, row[half + 1 :, None]).mean())
        return float(torch.stack(kl).mean()), float(torch.stack(nll).mean().exp())


def unpacked(planned: TensorPlan, rows: Rows) -> Tensor | None:
    """A rounded tensor in its own shape; None for one that is not."""
    packed = rows(planned, 0, (1, *planned.tensor.shape)[-2])
    if packed is None:
        return None
    module = codec(planned.codec)
    return torch.from_numpy(module.dequantize(module.unpack(packed)).reshape(planned.tensor.shape))


if __name__ == "__main__":
    main()
