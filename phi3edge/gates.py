"""Gates: limits on a report's metrics, as data in targets, recipes and a user's own gates.toml.

    [gates]
    top1 = 0.75                          # at least (the metric's sense says which way)
    kl_mean = { of_baseline = 1.05 }     # at most 5 % above the baseline report's
    ppl = { of_reference = 1.2 }         # at most 1.2 times the reference's perplexity
    bytes = { limit = 2.3e9, of_baseline = 1.01 }

A metric that was not measured, or is not a number, fails its gate. A baseline's figure that was taken with another
build of the runtime, or on another CPU, differs for that alone: by the metric's noise (see metrics.METRICS), which the
gate then allows for, or by the gate's own `noise`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from phi3edge import _toml
from phi3edge._toml import Strict
from phi3edge.errors import ConfigError, UsageError
from phi3edge.metrics import METRICS, Metric, Sense, require_known, show_value


class Limit(Strict):
    """What a metric is held to: the strictest of the limits given.

    Attributes:
        limit: absolute, in the metric's own unit; a share (0.7), not a percentage.
        of_reference: factor of the reference's figure, for ppl and bytes.
        of_baseline: factor of the baseline report's figure.
        noise: what the baseline's figure may be off by, in place of the metric's own noise between builds.
    """

    limit: float | None = Field(default=None, allow_inf_nan=False)
    of_reference: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    of_baseline: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    noise: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _limits(self) -> Limit:
        if self.limit is None and self.of_reference is None and self.of_baseline is None:
            raise ValueError("expected a number, or a table with limit, of_reference or of_baseline")
        if self.noise is not None and self.of_baseline is None:
            raise ValueError("noise is of a comparison with a baseline: it needs of_baseline")
        return self


def _number(value: Any) -> Any:
    return {"limit": value} if isinstance(value, (int, float)) and not isinstance(value, bool) else value


Gates = dict[str, Annotated[Limit, BeforeValidator(_number)]]
"""Limits by metric: in a file, a number or a table."""


def check_gates(gates: Mapping[str, Limit]) -> None:
    """Refuse a gate on a metric that does not exist, or relative to a reference that has no such figure.

    Raises:
        ConfigError: names the gate.
    """
    require_known(gates)
    for name, limit in gates.items():
        if limit.of_reference is not None and f"reference_{name}" not in METRICS:
            having = [n.removeprefix("reference_") for n in METRICS if n.startswith("reference_")]
            raise ConfigError(f"the gate {name!r} is of_reference, which only {' and '.join(having)} can be")


def known_gates(value: Gates) -> Gates:
    """For a validator of a file that holds gates."""
    try:
        check_gates(value)
    except ConfigError as error:
        raise ValueError(f"{error.message}" + (f"; {error.hint}" if error.hint else "")) from None
    return value


class Gate(Strict):
    """A limit, and whether the figure keeps it.

    Attributes:
        sense: "max" if the value may be at most the limit, "min" if it must be at least that.
        limit: what it came to, the noise included.
        rule: how it came about, for people.
        value: the figure; None where it was not measured, which fails.
    """

    name: str
    sense: Sense
    limit: float | None
    rule: str
    value: float | None
    passed: bool


@dataclass(frozen=True, slots=True)
class Baseline:
    """An earlier report's figures.

    Attributes:
        name: for people.
        same_runtime: whether they were taken with the same build of the runtime, on the same kind of CPU.
    """

    name: str
    metrics: Mapping[str, Metric]
    same_runtime: bool


def require_baseline(gates: Mapping[str, Limit], baseline: object | None) -> None:
    """Refuse gates relative to a baseline where there is none.

    Raises:
        UsageError: names the gate.
    """
    needing = [name for name, limit in gates.items() if limit.of_baseline is not None]
    if needing and baseline is None:
        raise UsageError(f"the gate {needing[0]!r} is relative to a baseline, and none was given", "--baseline REPORT")


def judge(metrics: Mapping[str, Metric], gates: Mapping[str, Limit], baseline: Baseline | None = None) -> list[Gate]:
    """Hold figures against limits. A figure that is missing or not a number fails.

    Raises:
        ConfigError: a gate on an unknown metric, or one relative to a figure that the reference cannot have.
        UsageError: a gate relative to a baseline, without one, or to a figure that the baseline does not have.
    """
    check_gates(gates)
    require_baseline(gates, baseline)
    return [_judge(name, limit, metrics, baseline) for name, limit in gates.items()]


def _judge(name: str, limit: Limit, metrics: Mapping[str, Metric], baseline: Baseline | None) -> Gate:
    kind = METRICS[name]
    limits: list[tuple[float, str]] = []
    missing = None
    if limit.limit is not None:
        limits.append((limit.limit, ""))
    if limit.of_reference is not None:
        if own := metrics.get(f"reference_{name}"):
            limits.append((limit.of_reference * own.value, f"{limit.of_reference:g} of the reference's"))
        else:
            missing = "the reference's figure was not measured"
    if limit.of_baseline is not None:
        assert baseline is not None
        if name not in baseline.metrics:
            raise UsageError(f"the baseline {baseline.name} has no {name}", "make it again, or drop that gate")
        noise = (0.0 if baseline.same_runtime else kind.noise) if limit.noise is None else limit.noise
        bound = limit.of_baseline * baseline.metrics[name].value + (noise if kind.sense == "max" else -noise)
        allowed = f", {show_value(noise, kind.unit)} for another build" if noise else ""
        limits.append((bound, f"{limit.of_baseline:g} of the baseline's{allowed}"))
    value = metrics[name].value if name in metrics else None
    if missing is not None or not limits:
        return Gate(name=name, sense=kind.sense, limit=None, rule=missing or "", value=value, passed=False)
    bound, rule = (min if kind.sense == "max" else max)(limits)
    passed = value is not None and (value <= bound if kind.sense == "max" else value >= bound)  # NaN: False
    return Gate(name=name, sense=kind.sense, limit=bound, rule=rule, value=value, passed=passed)


class ArtifactGates(Strict):
    """What one artifact is held to beside the gates of all: its own, and its baseline's file."""

    baseline: str | None = None
    gates: Gates = {}

    _gates = field_validator("gates")(known_gates)


class GatesFile(Strict):
    """A user's gates.toml: gates of every artifact, and those of some by the name of their folder or file."""

    gates: Gates = {}
    artifacts: dict[str, ArtifactGates] = {}

    _gates = field_validator("gates")(known_gates)

    def of(self, artifact: str) -> Gates:
        """The gates of an artifact: those of all, and its own over them."""
        own = self.artifacts.get(artifact)
        return {**self.gates, **(own.gates if own else {})}


def load_gates(path: Path) -> GatesFile:
    """Read a user's gates.toml.

    Raises:
        ConfigError: no such file, invalid TOML, an unknown key or metric.
    """
    return _toml.load("gates", str(path), GatesFile)[1]
