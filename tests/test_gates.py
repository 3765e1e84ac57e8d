"""Limits on metrics: absolute, of the reference, of a baseline; and what is refused."""

from pathlib import Path

import pytest

from phi3edge.errors import ConfigError, UsageError
from phi3edge.gates import Baseline, Limit, judge, load_gates
from phi3edge.metrics import Metric


def verdict(name: str, value: float | None, limit: Limit, baseline: Baseline | None = None, **others: float):
    metrics = {} if value is None else {name: Metric(value=value)}
    metrics |= {other: Metric(value=v) for other, v in others.items()}
    (gate,) = judge(metrics, {name: limit}, baseline)
    return gate


@pytest.mark.parametrize(
    ("name", "limit", "value", "passed"),
    [
        ("kl_mean", 0.1, 0.1, True),
        ("kl_mean", 0.1, 0.11, False),
        ("top1", 0.7, 0.7, True),
        ("top1", 0.7, 0.69, False),
        ("ppl_ratio", 1.2, float("nan"), False),
        ("top1", 0.7, float("nan"), False),
        ("decode_tokens_per_s", 1, None, False),
        ("kl_mean", 1, None, False),
    ],
)
def test_absolute_limits(name: str, limit: float, value: float | None, passed: bool) -> None:
    gate = verdict(name, value, Limit(limit=limit))
    assert gate.passed is passed
    assert gate.limit == limit
    assert gate.value is None if value is None else gate.value == pytest.approx(value, nan_ok=True)


def test_of_the_reference() -> None:
    assert verdict("ppl", 11.9, Limit(of_reference=1.2), reference_ppl=10.0).passed
    gate = verdict("ppl", 12.1, Limit(of_reference=1.2), reference_ppl=10.0)
    assert (gate.passed, gate.limit) == (False, 12.0)
    assert gate.rule == "1.2 of the reference's"
    assert not verdict("bytes", 1.0, Limit(of_reference=0.3)).passed  # not measured
    with pytest.raises(ConfigError, match="'top1' is of_reference, which only ppl and bytes can be"):
        verdict("top1", 1.0, Limit(of_reference=1.2))


def test_of_a_baseline_and_its_noise() -> None:
    earlier = {"kl_mean": Metric(value=0.1), "top1": Metric(value=0.8)}
    same, other = Baseline("x", earlier, True), Baseline("x", earlier, False)
    limit = Limit(of_baseline=1.05)
    assert verdict("kl_mean", 0.105, limit, same).passed
    assert not verdict("kl_mean", 0.106, limit, same).passed
    assert verdict("kl_mean", 0.139, limit, other).passed  # another build of the runtime: 0.035 more
    assert not verdict("kl_mean", 0.141, limit, other).passed
    assert not verdict("kl_mean", 0.111, Limit(of_baseline=1.05, noise=0.005), other).passed
    assert verdict("top1", 0.79, Limit(of_baseline=0.98), same).passed
    assert not verdict("top1", 0.78, Limit(of_baseline=0.98), same).passed
    assert "0.0350 for another build" in verdict("kl_mean", 0.1, limit, other).rule
    with pytest.raises(UsageError, match="none was given"):
        verdict("kl_mean", 0.1, limit)
    with pytest.raises(UsageError, match="has no top5"):
        verdict("top5", 0.1, limit, same)


def test_the_strictest_of_several_limits_holds() -> None:
    earlier = Baseline("x", {"kl_mean": Metric(value=0.1), "top1": Metric(value=0.8)}, True)
    assert verdict("kl_mean", 0.0, Limit(limit=0.09, of_baseline=1.0), earlier).limit == 0.09
    assert verdict("kl_mean", 0.0, Limit(limit=0.2, of_baseline=1.0), earlier).limit == 0.1
    assert verdict("top1", 0.0, Limit(limit=0.5, of_baseline=1.0), earlier).limit == 0.8


def test_a_file_of_gates(tmp_path: Path) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(
        "[gates]\ntop1 = 0.75\nkl_mean = { of_baseline = 1.05 }\n"
        '[artifacts."demo-iphone"]\nbaseline = "base/demo.json"\n[artifacts."demo-iphone".gates]\ntop1 = 0.9\n'
    )
    found = load_gates(path)
    assert found.of("other") == {"top1": Limit(limit=0.75), "kl_mean": Limit(of_baseline=1.05)}
    assert found.of("demo-iphone")["top1"] == Limit(limit=0.9)
    assert found.artifacts["demo-iphone"].baseline == "base/demo.json"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("[gates]\nkl_maen = 0.1", "kl_maen.*kl_mean"),
        ("[gates]\nkl_mean = 'low'", "gates.kl_mean"),
        ("[gates]\nkl_mean = true", "gates.kl_mean"),
        ("[gates]\nkl_mean = nan", "finite"),
        ("[gates]\nkl_mean = {}", "expected a number, or a table"),
        ("[gates]\nkl_mean = { noise = 0.1, limit = 1 }", "needs of_baseline"),
        ("[gates]\ntop1 = { of_reference = 1 }", "only ppl and bytes"),
        ("[gates]\nkl_mean = { limt = 0.1 }", "limt"),
        ("[gate]\nkl_mean = 1", "unknown key 'gate'"),
        ("gates", "not valid TOML"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=match):
        load_gates(path)
