"""`phi3edge ci`: verdicts, files and exit codes, on a real artifact in llama.cpp."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from _models import GROUPED, write_model

from phi3edge import ci
from phi3edge.build import export
from phi3edge.ci import Checked, check, exit_code
from phi3edge.errors import UsageError
from phi3edge.proof import Protocol
from phi3edge.report import read_report
from phi3edge.validate import Windows

ONE = Protocol(windows=Windows(2), threads=1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = write_model(tmp_path_factory.mktemp("model") / "tiny", GROUPED)
    return export(str(model), "cpu", format_="gguf", recipe="q4_0", out=tmp_path_factory.mktemp("made") / "one").folder


@pytest.fixture(scope="module")
def found(artifact: Path) -> Checked:
    [one] = check([artifact], ONE)
    assert one.passed
    return one


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "phi3edge", "ci", *map(str, arguments), "--chunks", "2", "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_a_failed_gate_is_exit_code_1_and_in_every_file(artifact: Path, tmp_path: Path) -> None:
    gates = tmp_path / "gates.toml"
    gates.write_text("[gates]\nkl_mean = 1e-9\nstop_agreement = 0.5\n[artifacts.one.gates]\ntop1 = 0.01\n")
    step = tmp_path / "step.md"
    step.write_text("before\n")
    done = run(artifact, "--gates", gates, "--out", tmp_path / "out", "--json", GITHUB_STEP_SUMMARY=str(step))
    assert done.returncode == 1, done.stderr
    said = json.loads(done.stdout)
    assert said == json.loads((tmp_path / "out/ci.json").read_text())
    assert said["passed"] is False
    suites = ElementTree.parse(tmp_path / "out/junit.xml").getroot()
    [suite] = suites
    cases = {case.get("name"): case.find("failure") for case in suite}
    failed = {name for name, failure in cases.items() if failure is not None}
    assert "kl_mean" in failed
    assert cases["top1"] is None
    assert suite.get("failures") == str(len(failed))
    assert suite.get("tests") == str(len(cases))
    assert "gate \u2264 1.0e-09" in cases["kl_mean"].get("message")
    if "stop_agreement" not in said["artifacts"][0]["report"]["metrics"]:  # no answer of the reference ended
        assert cases["stop_agreement"].get("message").startswith("not measured")
    summary = (tmp_path / "out/summary.md").read_text()
    assert summary.startswith("### \u274c one")
    assert "**FAIL**" in summary
    assert step.read_text() == "before\n" + summary


def test_baselines_are_written_and_then_held_to(artifact: Path, tmp_path: Path, found: Checked) -> None:
    gates = tmp_path / "gates.toml"
    gates.write_text("[gates]\nkl_mean = { of_baseline = 1.01 }\n")
    [without] = check([artifact], ONE, gates=gates)
    assert "relative to a baseline, and none was given" in without.error
    assert exit_code([found, without]) == 2
    baselines = tmp_path / "base"
    [updated] = check([artifact], ONE, gates=gates, baselines=baselines, update=True)
    assert updated.passed
    [held] = check([artifact], ONE, gates=gates, baselines=baselines)
    assert held.passed
    assert {g.name: g.rule for g in held.report.gates}["kl_mean"] == "1.01 of the baseline's"
    kept = baselines / "one.json"
    report = read_report(kept)
    better = report.metrics["kl_mean"].model_copy(update={"value": report.metrics["kl_mean"].value / 2})
    kept.write_text(report.model_copy(update={"metrics": {**report.metrics, "kl_mean": better}}).model_dump_json())
    [worse] = check([artifact], ONE, gates=gates, baselines=baselines)
    assert [g.name for g in worse.report.gates if not g.passed] == ["kl_mean"]
    assert exit_code([worse]) == 1
    [other] = check([artifact], replace(ONE, windows=Windows(1)), gates=gates, baselines=baselines)
    assert "has chunks 2, this validation 1" in other.error
    with pytest.raises(UsageError, match="no folder for them"):
        check([artifact], ONE, update=True)


def test_an_artifact_that_cannot_be_validated_is_an_error_of_its_own(artifact: Path, tmp_path: Path) -> None:
    found = check([tmp_path / "none", artifact], ONE)
    assert [one.passed for one in found] == [False, True]
    assert exit_code(found) == 2
    suites = ElementTree.fromstring(ci.junit(found))
    assert suites[0].get("errors") == "1"
    assert "does not exist" in suites[0][0].find("error").get("message")
    assert "not validated" in ci.summary(found)


def test_names_are_text_not_markup(found: Checked) -> None:
    evil = replace(found, name="a|b<script>\n#c*")
    text = ci.summary([evil])
    assert "a\\|b\\<script\\> \\#c\\*" in text.splitlines()[0]
    assert ElementTree.fromstring(ci.junit([evil]))[0].get("name").startswith("a|b<script>")
