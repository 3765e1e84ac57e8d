"""How far one file's figures differ between ways to compute it: the noise that a gate must allow for.

    python bench/noise.py CHECKPOINT ARTIFACT.gguf... [--text FILE] [--chunks 8]

Each file is scored with llama.cpp's plain kernels, and with the repacked weights and flash attention that an app gets:
kernels that differ as those of two builds or two kinds of CPU do. One JSON line a file: each metric's figures and their
difference, and the KL of the two against each other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from phi3edge.distributions import keep, log_softmax
from phi3edge.reference import Wanted, load_tokenizer, reference_pass
from phi3edge.runners import llama_cpp
from phi3edge.scores import Scores, mean_of
from phi3edge.text import cut, default_text, read_text

NAMES = ("ppl_ratio", "kl_mean", "kl_median", "kl_p90", "kl_p99", "top1", "top5", "flips")
TOKENS = 512


def main() -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--chunks", type=int, default=8)
    args = parser.parse_args()
    text = read_text(args.text) if args.text else default_text()
    ids = cut(load_tokenizer(args.checkpoint)(text.text)["input_ids"], args.chunks, TOKENS, TOKENS, text.name)
    wanted = Wanted(ids, TOKENS // 2, [], 0, [])
    reference = reference_pass(args.checkpoint, wanted)
    for artifact in args.artifacts:
        ways = [Scores(), Scores()]
        between: list[np.ndarray] = []
        with (
            llama_cpp.open(artifact, context=TOKENS, plain=True) as plain,
            llama_cpp.open(artifact, context=TOKENS, plain=False) as usual,
        ):
            for i, chunk in enumerate(ids):
                first = wanted.first
                both = [log_softmax(runner.logits(chunk[:-1], first)) for runner in (plain, usual)]
                for scores, log_probs in zip(ways, both, strict=True):
                    known = (reference.distributions[i], reference.text_log_probs[i])
                    scores.add(i, first, chunk[first + 1 :], *known, log_probs)
                between.append(keep(both[0], np.random.default_rng(0)).kl(both[1])[0])
        figures = [scores.metrics() for scores in ways]
        row = {}
        for name in NAMES:
            a, b = (f[name].value for f in figures)
            row[name] = [round(x, 6) for x in (a, b, b - a)]
        print(json.dumps({"artifact": artifact.name, "kl_between": round(mean_of(between).value, 6), **row}))


if __name__ == "__main__":
    main()
