"""`phi3edge compare`: anybody's artifacts side by side, run or as they were reported."""

import json
import os
import shutil
import subprocess
import sys

import _pages
import pytest
from _models import MHA, write_model

from phi3edge import comparison
from phi3edge.build import export
from phi3edge.errors import ConfigError, UsageError
from phi3edge.metrics import Metric
from phi3edge.report import to_json


def run(*arguments, cwd):
    command = [sys.executable, "-m", "phi3edge", "compare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "COLUMNS": "160"})


@pytest.fixture
def reported(tmp_path):
    """Two folders with reports, the second of which failed its gates."""
    _pages.write_folder(tmp_path / "good", _pages.report())
    _pages.write_folder(tmp_path / "bad", _pages.report(passed=False))
    return tmp_path


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Ours and a file of nobody's, of one checkpoint, compared in a process of its own."""
    folder = tmp_path_factory.mktemp("work")
    model = write_model(folder / "tiny", MHA)
    export(str(model), "cpu", recipe="f32", out=folder / "ours")
    [file] = export(str(model), "cpu", recipe="q8_0", out=folder / "theirs").files
    shutil.copy(file, folder / "peer.gguf")
    done = run(
        "ours",
        "peer.gguf",
        "--checkpoint",
        model,
        "--chunks",
        2,
        "--threads",
        1,
        "--html",
        "c.html",
        "--json",
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_artifacts_run_side_by_side(ran):
    folder, said = ran
    assert sorted(said["reports"]) == ["ours", "peer"]
    kl = {name: report["metrics"]["kl_mean"]["value"] for name, report in said["reports"].items()}
    assert kl["ours"] < 1e-5 < kl["peer"]
    [pair] = said["pairs"]
    assert (pair["a"], pair["b"]) == ("ours", "peer")
    assert pair["kl"]["value"] == pytest.approx(kl["peer"], rel=0.2)  # ours is the reference
    html = (folder / "c.html").read_text(encoding="utf-8")
    assert "2 artifacts of tiny" in html
    assert "made by</dt><dd>not known: no manifest" in html
    assert not list((folder / "theirs").glob("*.html"))


def test_reports_are_shown_without_running(reported):
    done = run("--reports", "good", "bad/report.json", "--html", "c.html", cwd=reported)
    assert done.returncode == 1, done.stderr  # one failed its gate
    assert "FAIL: kl_mean" in done.stdout
    assert (reported / "c.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    said = json.loads(run("--reports", "good", "bad", "--json", cwd=reported).stdout)
    assert said["passed"] is False
    assert list(said["reports"]) == ["good", "bad"]


def test_a_page_is_refused_before_anything_runs(reported):
    for given, message in (
        (("good", "bad", "--html", "c.txt"), "expected a file whose name ends in .html"),
        (("good", "bad", "--html", "no/c.html"), "there is no folder no"),
        (("good",), "expected two artifacts or more, got one"),
        (("--reports", "good", "nothing"), "no report at nothing"),
        (("--reports", "good", "good/eval.json"), "eval.json is not a report of schema 2"),
    ):
        done = run(*given, cwd=reported)
        assert done.returncode == 2, given
        assert message in done.stderr
        assert not list(reported.glob("*.html"))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text", {"sha256": "e" * 64}, "b has text eeeeeeeeeeee, a dddddddddddd"),
        ("protocol", {"stride": 256}, "b has stride 256, a 512"),
        ("protocol", {"chunks": 3}, "b has chunks 3, a 16"),
    ],
)
def test_reports_of_different_texts_or_protocols_are_refused(part, changes, message):
    a = _pages.report()
    b = a.model_copy(update={part: getattr(a, part).model_copy(update=changes)})
    with pytest.raises(UsageError, match=message):
        comparison.beside({"a": a, "b": b})


def test_reports_of_another_reference_are_refused_but_not_another_machines():
    a = _pages.report()
    for factor, same in ((1.0005, True), (1.002, False)):
        ppl = Metric(value=a.metrics["reference_ppl"].value * factor)
        b = a.model_copy(update={"metrics": a.metrics | {"reference_ppl": ppl}})
        if same:
            assert comparison.beside({"a": a, "b": b}).pairs == []
        else:
            with pytest.raises(UsageError, match="b is of another reference than a"):
                comparison.beside({"a": a, "b": b})


def test_a_comparison_reads_back(tmp_path):
    made = _pages.comparison()
    path = tmp_path / "comparison.json"
    path.write_text(comparison.to_json(made), encoding="utf-8")
    assert comparison.read_comparison(path) == made
    path.write_text(to_json(_pages.report()), encoding="utf-8")
    with pytest.raises(ConfigError, match="is not a comparison"):
        comparison.read_comparison(path)
