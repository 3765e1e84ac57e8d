"""Every figure that a validation can give: its name, what it is, and how to show it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from phi3edge.errors import ConfigError
from phi3edge.registry import did_you_mean
from phi3edge.units import size

Sense = Literal["max", "min"]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a metric is.

    Attributes:
        label: for people.
        sense: "max" if a gate on it is an upper limit, "min" if a lower one.
        unit: how to show it: "", "nats", "%", "tokens/s", "s", "bytes" or "count".
        noise: by how much one file's figure can differ between two builds of a runtime, or two kinds of CPU.
    """

    label: str
    sense: Sense
    unit: str
    noise: float = 0.0


# Noise of a KL: up to 0.035 between two builds of llama.cpp on one Q4_K_S file (ferrox issue 115). The others': about
# twice what bench/noise.py finds between llama.cpp's plain and repacked kernels.
METRICS = {
    "ppl": Kind("perplexity", "max", ""),
    "reference_ppl": Kind("perplexity of the reference", "max", ""),
    "ppl_ratio": Kind("perplexity / reference's", "max", "", noise=0.02),
    "kl_mean": Kind("KL, mean", "max", "nats", noise=0.035),
    "kl_predicted": Kind("KL, mean, as planned", "max", "nats"),
    "kl_median": Kind("KL, median", "max", "nats", noise=0.035),
    "kl_p90": Kind("KL, 90th percentile", "max", "nats", noise=0.035),
    "kl_p99": Kind("KL, 99th percentile", "max", "nats", noise=0.16),
    "kl_max": Kind("KL, maximum", "max", "nats"),
    "top1": Kind("same most likely token", "min", "%", noise=0.025),
    "top5": Kind("reference's choice among its 5 likeliest", "min", "%", noise=0.01),
    "flips": Kind("right answers turned wrong, or wrong ones right", "max", "%", noise=0.015),
    "kl_positions": Kind("KL where long contexts break, worst", "max", "nats", noise=0.035),
    "experts_shared": Kind("tokens with another expert near a chosen one", "max", "%"),
    "kl_unshared": Kind("KL of the other tokens, mean", "max", "nats", noise=0.035),
    "greedy_agreement": Kind("same greedy answers", "min", "%"),
    "greedy_tokens": Kind("greedy tokens until the first difference", "min", "count"),
    "stop_agreement": Kind("stops where the reference stops", "min", "%"),
    "tokenizer_mismatches": Kind("texts tokenized differently", "max", "count"),
    "eog_missing": Kind("end tokens unknown to it", "max", "count"),
    "prompt_tokens_per_s": Kind("prompt", "min", "tokens/s"),
    "decode_tokens_per_s": Kind("decode", "min", "tokens/s"),
    "time_to_first_token_s": Kind("time to first token", "max", "s"),
    "load_s": Kind("load", "max", "s"),
    "peak_memory_bytes": Kind("peak memory", "max", "bytes"),
    "bytes": Kind("size", "max", "bytes"),
    "reference_bytes": Kind("size of the checkpoint's weights", "max", "bytes"),
}
"""Every metric, in the order of the report. KL is KL(reference || artifact) per token."""


class Metric(BaseModel):
    """A figure, and the standard error of its mean where it is one."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")  # JSON has no such numbers

    value: float
    standard_error: float | None = None


def require_known(names: Iterable[str]) -> None:
    """Refuse a metric that does not exist.

    Raises:
        ConfigError: names it, and the nearest one.
    """
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"unknown metric {name!r} in the gates", did_you_mean(name, list(METRICS)))


def show_value(value: float, unit: str) -> str:
    """A figure as a person reads it; `unit` as in Kind."""
    if math.isnan(value):
        return "not a number"
    if unit == "%":
        return f"{100 * value:.1f} %"
    if unit == "bytes":
        return size(value)
    if unit == "count":
        return f"{value:g}" if value == round(value) else f"{value:.1f}"
    if unit == "tokens/s":
        return f"{value:.1f} {unit}"
    if unit == "nats":
        return f"{value:.4f}" if value >= 1e-4 or value == 0 else f"{value:.1e}"
    return f"{value:.3f} {unit}".rstrip()
