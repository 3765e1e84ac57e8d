"""Byte budgets for a mixture of experts beside one codec for all, at the same bytes, on small random models.

    python bench/mixture_budget.py [--seeds 2]

Losses are predicted on random tokens; the KL of each plan is measured in float32 on others, of the weights rounded to
nearest, computed as llama.cpp computes them. One JSON line for each model and codec, in nats per token.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from _moe import write_phimoe

from phi3edge.budget import Budget
from phi3edge.budget_plan import plan_within
from phi3edge.calibration import CalibrationText
from phi3edge.centring import Centred
from phi3edge.checkpoint import open_checkpoint
from phi3edge.codecs import codec, is_float
from phi3edge.families import parse_config
from phi3edge.forward import Readable
from phi3edge.mixture import LlamaCppDecoder, Mixture
from phi3edge.plan import make_plan
from phi3edge.progress import silent
from phi3edge.recipes import load_recipe
from phi3edge.targets import load_target
from phi3edge.types import QuantPlan

CODECS = ("iq4_xs", "q4_k", "q5_k", "q6_k")
SEQUENCES, TOKENS = 24, 64


class Rounded:
    """Weights as codecs round them, by tensor name; the others as they are."""

    def __init__(self, source: Readable, codecs: Mapping[str, str]) -> None:
        self._source, self._codecs = source, codecs

    def read(self, name: str) -> np.ndarray:
        """A whole tensor, float32."""
        weight, module = self._source.read(name), codec(self._codecs.get(name, "f32"))
        return weight if weight.ndim == 1 else module.dequantize(module.quantize(weight))


def compare(seed: int) -> None:
    """One model with each codec, and with the mix for its bytes."""
    (name, recipe), (_, target) = load_recipe("budget"), load_target("cpu")
    with tempfile.TemporaryDirectory() as work, open_checkpoint(write_phimoe(Path(work) / "m", seed=seed)) as found:
        os.environ["PHI3EDGE_CACHE"] = work
        spec = parse_config(found.config, found.generation_config, "mixture")
        ids, other = (np.random.default_rng(n).integers(0, spec.vocab_size, (SEQUENCES, TOKENS)) for n in (5, 6))
        source, decoder = Centred(found, spec), LlamaCppDecoder(spec)

        def log_probs(codecs: Mapping[str, str]) -> torch.Tensor:
            with torch.inference_mode():
                model = Mixture(Rounded(source, codecs), spec, True, decoder)
                return model(torch.from_numpy(other)).logits.log_softmax(-1)

        exact = log_probs({})

        def measured(plan: QuantPlan) -> float:
            lost = exact - log_probs({t.tensor.name: t.codec for t in plan.tensors if not is_float(t.codec)})
            return round(float((exact.exp() * lost).sum(-1).mean()), 5)

        for one in CODECS:
            alike = make_plan(spec, one, recipe.model_copy(update={"codecs": {"linear": one, "norm": "f32"}}))
            mix, _ = plan_within(
                Budget(bytes=alike.weight_bytes),
                source,
                spec,
                name,
                recipe,
                target,
                "gguf",
                lambda plan: plan.weight_bytes,
                CalibrationText(ids, "random tokens"),
                False,
                "cpu",
                silent,
            )
            row = {"seed": seed, "bytes": alike.weight_bytes, "codec": one, "kl": measured(alike)}
            print(
                json.dumps(row | {"kl_of_the_mix": measured(mix), "predicted": round(mix.predicted_kl, 5)}), flush=True
            )


def main() -> None:
    """See the file's head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    for seed in range(parser.parse_args().seeds):
        compare(seed)


if __name__ == "__main__":
    main()
