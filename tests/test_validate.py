import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from _gguf import gguf_name, write_gguf
from _models import GROUPED, write_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from phi3edge import reference
from phi3edge.build import export
from phi3edge.errors import CheckpointError, ConfigError, MissingExtraError, RunnerError, UsageError
from phi3edge.families import parse_config
from phi3edge.gates import Limit
from phi3edge.metrics import Metric
from phi3edge.proof import Protocol, validate_artifact
from phi3edge.reference import Wanted
from phi3edge.report import Report, baseline, from_json, render, to_data, to_json
from phi3edge.text import Text, default_text
from phi3edge.types import Source
from phi3edge.validate import Windows, validate

CHUNKS, TOKENS = 3, 64
TEXT = Text("sample", default_text().text[:6000], "0" * 64)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("PHI3EDGE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("checkpoint") / "tiny", GROUPED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def exact(checkpoint: Path, folder: Path) -> Path:
    return write_gguf(checkpoint, folder / "exact.gguf")


def run(artifact: Path, checkpoint: Path, **options) -> Report:
    windows = Windows(options.pop("chunks", CHUNKS), TOKENS, options.pop("stride", None))
    gates = {name: Limit(limit=limit) for name, limit in options.pop("gates", {}).items()}
    options = {"text": TEXT, "threads": 1, "kv_type": "f32"} | options
    return validate(artifact, checkpoint, windows=windows, gates=gates, **options)[0]


@pytest.fixture(scope="module")
def report(exact: Path, checkpoint: Path) -> Report:
    gates = {"ppl_ratio": 1.01, "kl_mean": 1e-4, "top1": 0.98, "load_s": 60, "decode_tokens_per_s": 0.1}
    source = Source("someone/tiny", "0123abc")
    return run(exact, checkpoint, gates=gates, name="someone/tiny", source=source)


def test_an_exact_artifact_passes(report: Report) -> None:
    assert report.passed
    metrics = report.metrics
    assert metrics["ppl_ratio"].value == pytest.approx(1, abs=1e-3)
    assert 0 <= metrics["kl_mean"].value < 2e-6
    assert metrics["top5"].value == 1
    assert metrics["flips"].value <= 1 - metrics["top1"].value < 0.02
    assert metrics["kl_median"].value <= metrics["kl_p90"].value <= metrics["kl_p99"].value <= metrics["kl_max"].value
    assert metrics["tokenizer_mismatches"].value == 0
    assert metrics["eog_missing"].value == 0
    assert metrics["peak_memory_bytes"].value > metrics["bytes"].value
    assert {g.name for g in report.gates} >= {"ppl_ratio", "tokenizer_mismatches", "eog_missing"}
    assert report.tokens.chat
    assert report.tokens.checked > 80
    assert report.tokens.eos_ids == [0, 3]


def test_figures_are_those_of_a_direct_computation(checkpoint: Path, folder: Path) -> None:
    noisy = write_gguf(checkpoint, folder / "noisy.gguf", noise=0.1)
    other = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tensors = {t.name: t.data for t in gguf.GGUFReader(noisy).tensors}
    weights = {name: torch.from_numpy(np.array(tensors[gguf_name(name)])) for name in other.state_dict()}
    other.load_state_dict(weights)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(checkpoint)(TEXT.text)["input_ids"]
    nll, reference_nll, kl, agree, among, flips = [], [], [], [], [], []
    for n in range(CHUNKS):
        chunk = torch.tensor([ids[n * TOKENS : (n + 1) * TOKENS]])
        with torch.no_grad():
            p, q = (torch.log_softmax(m(chunk).logits[0].double(), -1) for m in (model, other))
        for position in range(TOKENS // 2, TOKENS - 1):
            nll.append(-q[position, chunk[0, position + 1]].item())
            reference_nll.append(-p[position, chunk[0, position + 1]].item())
            kl.append((p[position].exp() * (p[position] - q[position])).sum().item())
            agree.append(bool(p[position].argmax() == q[position].argmax()))
            among.append(p[position].argmax().item() in q[position].topk(5).indices.tolist())
            flips.append(len({p[position].argmax().item(), q[position].argmax().item(), chunk[0, position + 1].item()}))
            flips[-1] = flips[-1] == 2 and not agree[-1]
    report = run(noisy, checkpoint)
    metrics = {name: metric.value for name, metric in report.metrics.items()}
    assert report.protocol.scored_tokens == len(nll) == CHUNKS * (TOKENS // 2 - 1)
    assert metrics["reference_ppl"] == pytest.approx(np.exp(np.mean(reference_nll)), rel=1e-5)
    assert metrics["ppl"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert metrics["ppl_ratio"] == pytest.approx(metrics["ppl"] / metrics["reference_ppl"], rel=1e-9)
    assert abs(metrics["kl_mean"] - np.mean(kl)) < 4 * report.protocol.kl_drawing_error < 0.05 * np.mean(kl)
    assert metrics["kl_mean"] > 1e-3
    assert metrics["kl_p99"] == pytest.approx(np.quantile(kl, 0.99), rel=0.1)
    assert metrics["top1"] == pytest.approx(np.mean(agree), abs=0.011)
    assert metrics["top5"] == pytest.approx(np.mean(among), abs=0.011)
    assert metrics["flips"] == pytest.approx(np.mean(flips), abs=0.011)
    assert sum(report.histogram.counts) == len(kl)
    assert report.worst[0].kl == pytest.approx(metrics["kl_max"], rel=1e-6)
    assert len(report.worst) == 12
    assert sorted(report.worst, key=lambda w: -w.kl) == report.worst
    assert all(w.before + w.token in TEXT.text for w in report.worst)
    error = np.exp(np.mean(nll)) * np.std(nll, ddof=1) / len(nll) ** 0.5
    assert report.metrics["ppl"].standard_error == pytest.approx(error, rel=1e-3)


def test_a_missed_gate_fails_and_names_itself(checkpoint: Path, folder: Path) -> None:
    artifact = write_gguf(checkpoint, folder / "q4.gguf", gguf.GGMLQuantizationType.Q4_0)
    report = run(artifact, checkpoint, gates={"kl_mean": 1e-4, "top1": 0.05})
    verdicts = {g.name: g.passed for g in report.gates}
    assert verdicts == {"tokenizer_mismatches": True, "eog_missing": True, "kl_mean": False, "top1": True}
    assert not report.passed
    assert show(report).rstrip().endswith("failed: kl_mean (1 of 4 gates)")


def test_an_unknown_metric_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'kl_maen'") as error:
        validate(tmp_path / "none.gguf", tmp_path, gates={"kl_maen": Limit(limit=0.1)})
    assert "'kl_mean'" in error.value.hint


def test_another_tokenizer_is_found_out(checkpoint: Path, folder: Path) -> None:
    report = run(write_gguf(checkpoint, folder / "merges.gguf", merges=False), checkpoint)
    assert not report.passed
    assert report.metrics["tokenizer_mismatches"].value == len(report.tokens.mismatches) > 0
    wrong = report.tokens.mismatches[0]
    assert (
        wrong.reference == AutoTokenizer.from_pretrained(checkpoint)(wrong.text, add_special_tokens=False)["input_ids"]
    )
    assert wrong.artifact != wrong.reference
    assert repr(wrong.text)[:40] in show(report)


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}", "{% for m in %}"]
)
def test_another_chat_template_is_found_out(checkpoint: Path, folder: Path, template: str) -> None:
    report = run(write_gguf(checkpoint, folder / "chat.gguf", template=template), checkpoint)
    (mismatch,) = report.tokens.mismatches
    assert "<|assistant|>\nParis." in mismatch.text
    assert not report.passed


def test_a_chat_template_that_the_runtime_cannot_render_is_found_out(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    from _genai import write_genai

    shouting = Path(shutil.copytree(checkpoint, tmp_path / "in"))
    config = json.loads((shouting / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    (shouting / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    report = run(write_genai(shouting, tmp_path / "out"), shouting)
    (mismatch,) = report.tokens.mismatches
    assert "PARIS." in mismatch.text
    assert not report.passed


def test_a_missing_end_token_is_found_out(exact: Path, tmp_path: Path) -> None:
    chatty = write_model(tmp_path / "chatty", GROUPED, eos_token_id=[0, 7])
    report = run(exact, chatty)
    assert report.tokens.eos_ids == [0, 3, 7]
    assert report.metrics["eog_missing"].value == 1
    assert not report.passed
    assert "does not stop at token ids [7]" in show(report)


def test_an_artifact_of_another_model(checkpoint: Path, exact: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", GROUPED, vocab_size=384)
    with pytest.raises(RunnerError, match="320 tokens in its vocabulary, the checkpoint 384"):
        run(exact, other)


def test_what_cannot_be_scored(checkpoint: Path, exact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="100 chunks of 64 need 6400"):
        run(exact, checkpoint, chunks=100, text=Text("short", "in the hand", ""))
    with pytest.raises(UsageError, match=r"no runtime here runs model\.bin"):
        run(tmp_path / "model.bin", checkpoint)
    with pytest.raises(CheckpointError, match="cannot read the tokenizer"):
        run(exact, tmp_path)


def test_the_reference_pass_is_kept_and_bound_to_its_checkpoint(
    checkpoint: Path, report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = reference.load_tokenizer(checkpoint)
    ids = np.array(tokenizer(TEXT.text)["input_ids"][:128]).reshape(2, 64)
    wanted = Wanted(ids, 32, [[1, 2, 3]], 4, [(ids[0], [5, 6, 40])])
    first = reference.reference_pass(checkpoint, wanted)
    monkeypatch.setattr(reference, "_run", lambda *_: pytest.fail("ran again"))
    again = reference.reference_pass(checkpoint, wanted)
    assert again.greedy == first.greedy
    np.testing.assert_array_equal(again.distributions.tokens, first.distributions.tokens)
    assert first.distributions.tokens.shape == (2, 31, 256)
    assert first.long[0].tokens.shape == (3, 256)
    np.testing.assert_array_equal(first.long[0].top1[2], first.distributions.top1[0, 8])  # position 40 of one text
    config = checkpoint / "config.json"
    before = reference._key(checkpoint, wanted)
    for change in (
        {"chunks": ids + 1},
        {"chunks": ids.reshape(1, -1)},
        {"first": 31},
        {"greedy_tokens": 5},
        {"long": [(ids[1], [5, 6, 40])]},
        {"long": [(ids[0], [5, 6])]},
        {"long": []},
    ):
        assert before != reference._key(checkpoint, replace(wanted, **change))
    old = config.read_text()
    config.write_text(old.replace("10000.0", "10001.0"))
    assert before != reference._key(checkpoint, wanted)
    config.write_text(old)
    assert before == reference._key(checkpoint, wanted)
    monkeypatch.setattr("transformers.__version__", "0")
    assert before != reference._key(checkpoint, wanted)


def test_another_models_weights_are_another_pass_even_with_the_same_size_and_time(tmp_path: Path) -> None:
    keys = set()
    for seed in (1, 2):
        folder = write_model(tmp_path / str(seed), GROUPED, seed=seed)
        for shard in folder.glob("*.safetensors"):
            os.utime(shard, (0, 0))
        keys.add(reference._key(folder, Wanted(np.zeros((1, 8), np.int64), 4, [[1]], 2, [])))
    assert len(keys) == 2


def test_the_oldest_passes_go_when_they_take_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_bytes(bytes(1000))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(reference, "CACHE_BYTES", 2500)
    reference._prune(tmp_path, tmp_path / "old")
    assert {f.name for f in tmp_path.iterdir()} == {"old", "new"}


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError) as error:
        reference.load_tokenizer(checkpoint)
    assert "[reference]" in error.value.hint


def test_every_token_is_scored_once_with_a_stride(checkpoint: Path, folder: Path) -> None:
    noisy = write_gguf(checkpoint, folder / "strided.gguf", noise=0.1)
    report = run(noisy, checkpoint, chunks=4, stride=16)
    assert report.protocol.scored_tokens == 4 * 16
    assert report.protocol.context_tokens == 48
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(checkpoint)(TEXT.text)["input_ids"]
    nll = []
    for token in range(48, 48 + 4 * 16):
        start = (token - 48) // 16 * 16
        with torch.no_grad():
            p = torch.log_softmax(model(torch.tensor([ids[start:token]])).logits[0, -1].double(), -1)
        nll.append(-p[ids[token]].item())
    assert report.metrics["reference_ppl"].value == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert run(noisy, checkpoint, chunks=None).protocol.chunks == len(ids) // TOKENS


@pytest.mark.parametrize(("tokens", "stride"), [(64, 33), (64, 65), (64, 0), (3, None)])
def test_windows_that_score_tokens_unevenly_are_refused(tokens: int, stride: int | None) -> None:
    with pytest.raises(UsageError):
        Windows(2, tokens, stride)


def test_behind_a_sliding_window_the_runtime_is_another_model(tmp_path: Path) -> None:
    """llama.cpp has no window for phi3: the figures must show it, and only behind it."""
    model = write_model(tmp_path / "window", GROUPED, sliding_window=100)
    config = json.loads((model / "config.json").read_text())
    report = run(write_gguf(model, tmp_path / "window.gguf"), model, context=160, spec=parse_config(config, None, "w"))
    assert [(b.first, b.last, b.allocated) for b in report.positions] == [
        (84, 99, 160),
        (100, 115, 160),
        (143, 158, 160),
    ]
    before, behind, end = (b.kl.value for b in report.positions)
    assert before < 1e-6
    assert min(behind, end) > 100 * before
    assert report.metrics["kl_positions"].value == max(behind, end)
    assert "100 to 115" in show(report)


def test_a_context_that_ends_with_the_window_shows_what_is_behind_it(tmp_path: Path) -> None:
    """The default of a target: exact as far as it is meant for, and what a longer context would be is in the report."""
    model = write_model(tmp_path / "window", GROUPED, sliding_window=100)
    made = export(str(model), "iphone", recipe="f32", kv_cache="f32", out=tmp_path / "out")
    assert made.prepared.fit.context == 100
    assert gguf.GGUFReader(made.artifact).fields["phi3.context_length"].contents() == 100
    assert any("window, so beyond 100 tokens" in note for note in made.notes)
    report, *_ = validate_artifact(made.folder, protocol=Protocol(windows=Windows(2, 64), threads=1))
    assert [(b.first, b.last, b.allocated) for b in report.positions] == [
        (84, 99, 200),
        (100, 115, 200),
        (183, 198, 200),
    ]
    before, behind, end = (b.kl.value for b in report.positions)
    assert before < 1e-6
    assert min(behind, end) > 100 * before
    assert report.metrics["kl_positions"].value == before


def test_it_stops_where_the_reference_stops(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """An end token that the answers happen to come to; the artifact knows another one."""
    artifact = write_gguf(checkpoint, folder / "stops.gguf")
    said = run(artifact, checkpoint)
    assert "stop_agreement" not in said.metrics or said.metrics["stop_agreement"].value == 1
    tokenizer = reference.load_tokenizer(checkpoint)
    wanted = Wanted(np.ones((1, 8), np.int64), 4, [[1, 2, 3]], 12, [])
    token = reference.reference_pass(checkpoint, wanted).greedy[0][-1]
    ending = write_model(tmp_path / "ending", GROUPED, eos_token_id=[0, token])
    found = reference.reference_pass(ending, wanted)
    assert found.ended == [True]
    assert token not in found.greedy[0]
    assert tokenizer.decode([token])


def test_a_baseline_of_something_else_is_refused(report: Report) -> None:
    ppl = report.metrics["reference_ppl"].value
    same = baseline(report, report.text, report.protocol, report.environment, ppl)
    assert same.same_runtime
    assert same.metrics == report.metrics
    other = report.environment.model_copy(update={"software": {"llama.cpp": "0"}})
    assert not baseline(report, report.text, report.protocol, other, ppl).same_runtime
    for text, protocol, value, match in (
        (
            report.text.model_copy(update={"sha256": "f" * 64}),
            report.protocol,
            ppl,
            "text 0{12}, this.* f{12}",
        ),
        (report.text, report.protocol.model_copy(update={"chunks": 9}), ppl, "chunks 3, this validation 9"),
        (report.text, report.protocol.model_copy(update={"stride": 9}), ppl, "stride 64, this validation 9"),
        (report.text, report.protocol, 1.01 * ppl, "another reference"),
        (report.text, report.protocol, float("nan"), "another reference"),
    ):
        with pytest.raises(UsageError, match=match):
            baseline(report, text, protocol, report.environment, value)


def test_report_round_trip(report: Report) -> None:
    assert from_json(to_json(report)) == report
    data = json.loads(to_json(report))
    assert data["schema_version"] == 2
    assert data["checkpoint"] == {"name": "someone/tiny", "repository": "someone/tiny", "revision": "0123abc"}
    assert len(data["artifact"][0]["sha256"]) == 64
    broken = report.model_copy(update={"metrics": {**report.metrics, "ppl": Metric(value=float("nan"))}})
    assert np.isnan(from_json(to_json(broken)).metrics["ppl"].value)
    assert json.loads(json.dumps(to_data(broken), allow_nan=False))["metrics"]["ppl"]["value"] == "NaN"
    assert "not a number" in show(broken)


def test_report_holds_no_path_of_this_machine(report: Report, checkpoint: Path, exact: Path, cache: Path) -> None:
    text = to_json(report)
    for place in (checkpoint.parent, exact.parent, cache, Path.home(), Path.cwd()):
        assert str(place) not in text


def test_a_report_that_is_not_one(report: Report) -> None:
    data = json.loads(to_json(report))
    with pytest.raises(ConfigError, match="extra"):
        from_json(json.dumps(data | {"extra": 1}))
    with pytest.raises(ConfigError, match="schema_version"):
        from_json(json.dumps(data | {"schema_version": 1}))
    with pytest.raises(ConfigError, match="contradicts"):
        from_json(json.dumps(data | {"passed": False}))
    with pytest.raises(ConfigError, match="JSON"):
        from_json("{")


def test_report_as_a_table(report: Report) -> None:
    table = show(report)
    assert table.splitlines()[0] == "exact.gguf  against  someone/tiny"
    assert "KL, 99th percentile" in table
    assert "≥ 98.0 %  pass" in table
    assert table.rstrip().endswith("passed: 7 of 7 gates")
    assert max(map(len, table.splitlines())) <= 100


def show(report: Report) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(render(report))
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())
