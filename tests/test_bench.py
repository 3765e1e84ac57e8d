"""Speed: what is timed, the arithmetic on it, and what the command writes. No test holds a time against anything."""

import csv
import io
import json
import os
import statistics
import subprocess
import sys
from contextlib import contextmanager
from math import isnan, nan
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import onnx
import pytest
from _genai import write_genai
from _gguf import write_gguf
from _models import GROUPED, write_model

from phi3edge import bandwidth, speed
from phi3edge.errors import MissingExtraError, RunnerError, UsageError
from phi3edge.runners import Traffic, llama_cpp, ort_genai
from phi3edge.runners._energy import Meter
from phi3edge.runners._timing import Sample, samples
from phi3edge.speed import Benchmark, Measurement, Run, Sweep, spread

LLAMA_BENCH_FIELDS = [
    "build_commit",
    "build_number",
    "cpu_info",
    "gpu_info",
    "backends",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "n_batch",
    "n_ubatch",
    "n_threads",
    "cpu_mask",
    "cpu_strict",
    "poll",
    "type_k",
    "type_v",
    "n_gpu_layers",
    "n_cpu_moe",
    "split_mode",
    "main_gpu",
    "no_kv_offload",
    "flash_attn",
    "devices",
    "tensor_split",
    "tensor_buft_overrides",
    "load_mode",
    "lazy_mode",
    "embeddings",
    "no_op_offload",
    "no_host",
    "repack",
    "fit_target",
    "fit_min_ctx",
    "n_prompt",
    "n_gen",
    "n_depth",
    "test_time",
    "avg_ns",
    "stddev_ns",
    "avg_ts",
    "stddev_ts",
    "samples_ns",
    "samples_ts",
]  # test::get_fields and jsonl_printer of llama-bench.cpp


class FakeSession:
    """Notes what is asked of it; each kind of work takes its own time on a clock of its own."""

    TIMES = {"start": 1_000_000, "feed": 100, "choose": 7, "step": 10}

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.now = 0

    def _work(self, name: str, *arguments) -> None:
        self.calls.append((name, *arguments))
        self.now += self.TIMES[name]

    def start(self, depth: int, decoding: bool) -> None:
        self._work("start", depth, decoding)

    def feed(self, count: int) -> None:
        self._work("feed", count)

    def choose(self) -> None:
        self._work("choose")

    def step(self) -> None:
        self._work("step")

    def clock(self) -> int:
        return self.now

    def measure(self, **work) -> list[Sample]:
        rows = samples(self, **work, clock=self.clock, meter=lambda: self.now / 10)
        return [Sample(*row.tolist()) for row in rows]


def sample(prompt_ns: float = 0, first_ns: float = 0, decode_ns: float = 0, joules: float = nan, others: float = nan):
    return Sample(prompt_ns, first_ns, decode_ns, joules, others)


def test_a_prompt_is_warmed_up_whole_and_its_depth_is_not_timed() -> None:
    session = FakeSession()
    found = session.measure(prompt=512, decode=0, depth=64, repeats=2, warm_up=True)
    once = [("start", 64, False), ("feed", 512), ("choose",)]
    assert session.calls == [("start", 0, False), ("feed", 512), ("choose",), *once, *once]
    assert [(s.prompt_ns, s.first_token_ns, s.decode_ns) for s in found] == [(100, 107, 0)] * 2
    assert [s.joules for s in found] == [pytest.approx(10.7)] * 2  # the depth's energy is not counted either


def test_decoding_is_warmed_up_by_one_token() -> None:
    session = FakeSession()
    found = session.measure(prompt=0, decode=3, depth=0, repeats=1, warm_up=True)
    assert session.calls == [("start", 0, True), ("step",), ("start", 0, True), *[("step",)] * 3]
    assert [(s.prompt_ns, s.first_token_ns, s.decode_ns) for s in found] == [(0, 0, 30)]


def test_without_warm_up_the_first_sample_is_the_first_work() -> None:
    session = FakeSession()
    (found,) = session.measure(prompt=8, decode=2, depth=0, repeats=1, warm_up=False)
    assert session.calls == [("start", 0, False), ("feed", 8), ("choose",), ("step",), ("step",)]
    assert (found.prompt_ns, found.first_token_ns, found.decode_ns) == (100, 107, 20)


def test_spread() -> None:
    values = [10.0, 11.0, 14.0, 12.0, 100.0]
    found = spread(values)
    assert (found.median, found.mad) == (12.0, 2.0)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.stddev == pytest.approx(np.std(values, ddof=1))
    assert spread([3.0]) == speed.Spread(3.0, 0.0, 3.0, 0.0)


def test_figures_of_a_prompt() -> None:
    test = Measurement(128, 0, 0, "", (sample(2e9, 3e9, joules=256), sample(4e9, 5e9, joules=512)))
    assert test.name == "pp128"
    assert test.ns == [2 * 10**9, 4 * 10**9]
    assert test.tokens_per_s == [64, 32]
    assert test.first_token_s == [3, 5]  # with the choice of the token, which tokens per second leave out
    assert test.joules_per_token == [2, 4]


def test_figures_of_decoding() -> None:
    test = Measurement(0, 4, 100, "", (sample(decode_ns=2e9),))
    assert test.name == "tg4 @ d100"
    assert test.tokens_per_s == [2]
    assert test.first_token_s == []
    assert test.joules_per_token is None  # not told, which is not none
    assert test.mean_length == 102.5  # of 101, 102, 103 and 104


def test_roofline() -> None:
    decoding = Measurement(0, 3, 10, "", (sample(decode_ns=3e9), sample(decode_ns=6e9), sample(decode_ns=1.5e9)))
    prompt = Measurement(16, 0, 0, "", (sample(1e9, 1e9),))
    run = Run({"threads": 1}, bandwidth=4000.0, peak_memory=None, traffic=Traffic(976, 2.0), tests=(decoding, prompt))
    assert run.bytes_per_token(decoding) == 976 + 2 * 12
    assert run.roofline_share(decoding) == pytest.approx(1.0 * 1000 / 4000)
    assert run.bytes_per_token(prompt) is run.roofline_share(prompt) is None


@pytest.mark.parametrize(
    ("others", "share"), [((0.5, 0.7), 0.15), ((-0.01, 0.0), 0.0), ((nan, 0.1), None)], ids=["busy", "idle", "unknown"]
)
def test_what_others_took(others, share, monkeypatch) -> None:
    monkeypatch.setattr(speed, "usable_cores", lambda: 2)
    tests = tuple(Measurement(0, 1, 0, "", (sample(decode_ns=2e9, others=each),)) for each in others)
    run = Run({"threads": 1}, 1e12, None, Traffic(1, 0), tests)
    assert run.others_share() == (None if share is None else pytest.approx(share))
    found = Benchmark(Path("x.gguf"), 1, "f16", True, (run,))
    assert any("other processes took" in remark for remark in speed.notes(found)) == bool(share)


def test_what_others_took_is_not_known_of_an_instant() -> None:
    run = Run({"threads": 1}, 1.0, None, Traffic(1, 0), (Measurement(0, 1, 0, "", (sample(decode_ns=1e6, others=1),)),))
    assert run.others_share() is None


def zone(folder: Path, name: str, joules: float, most: float = 1000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(name + "\n")
    (folder / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")
    (folder / "max_energy_range_uj").write_text(f"{most * 1e6:.0f}\n")
    return folder


def test_energy_is_the_packages_and_runs_over(tmp_path: Path) -> None:
    first = zone(tmp_path / "intel-rapl:0", "package-0", 990)
    second = zone(tmp_path / "intel-rapl:1", "package-1", 5)
    zone(tmp_path / "intel-rapl:0:0", "core", 1)
    zone(tmp_path / "intel-rapl:2", "psys", 1)
    meter = Meter(tmp_path)
    assert meter() == 0
    zone(first, "package-0", 15)  # 25 more, past the end of its range
    zone(second, "package-1", 9)
    zone(tmp_path / "intel-rapl:0:0", "core", 500)
    zone(tmp_path / "intel-rapl:2", "psys", 500)
    assert meter() == pytest.approx(29)


def test_energy_that_is_not_told_is_not_none(tmp_path: Path) -> None:
    assert isnan(Meter(tmp_path / "missing")())
    (zone(tmp_path / "intel-rapl:0", "package-0", 5) / "energy_uj").unlink()  # as without the right to read it
    assert isnan(Meter(tmp_path)())


def test_bandwidth_is_the_best_pass(monkeypatch) -> None:
    times = iter(x for seconds in (8, 2, 4, 8, 8, 8, 8, 8) for x in (0.0, float(seconds)))
    monkeypatch.setattr(bandwidth, "LEAST", 2**20)
    monkeypatch.setattr(bandwidth, "cache_bytes", lambda: 2**19)
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(times))
    assert bandwidth.read_bandwidth(3) == 2**21 / 2  # four times the caches, in two seconds


def test_bandwidth_needs_numba(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(MissingExtraError):
        bandwidth.read_bandwidth(1)


def test_caches_that_cores_share_count_once(tmp_path: Path) -> None:
    for core, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        cache = tmp_path / f"cpu{core}" / "cache" / "index3"
        cache.mkdir(parents=True)
        (cache / "size").write_text("32768K\n")
        (cache / "shared_cpu_list").write_text(shared + "\n")
    assert bandwidth.cache_bytes(tmp_path) == 2 * 32 * 2**20
    assert bandwidth.cache_bytes(tmp_path / "missing") == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("checkpoint") / "tiny", GROUPED)


@pytest.fixture(scope="module")
def gguf_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(checkpoint, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def genai_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_genai(checkpoint, tmp_path_factory.mktemp("onnx") / "tiny")


def kv_numbers(checkpoint: Path) -> int:
    """Numbers that the KV cache holds of one token."""
    config = json.loads((checkpoint / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * width


def test_a_token_reads_one_row_of_a_gguf_embedding(checkpoint: Path, gguf_file: Path) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file).tensors}
    embedding = tensors["token_embd.weight"]
    rows = int(embedding.shape[1])
    others = sum(int(tensor.n_bytes) for name, tensor in tensors.items() if name != "token_embd.weight")
    found = llama_cpp.traffic(gguf_file, "q8_0")
    assert found.weights == others + int(embedding.n_bytes) // rows
    assert found.kv_per_token == kv_numbers(checkpoint) * 34 / 32
    assert found.bytes(100) == found.weights + 100 * found.kv_per_token


def test_a_tied_gguf_embedding_is_read_whole_and_experts_as_used(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tied.gguf", "phimoe")
    writer.add_block_count(3)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_expert_count(8)
    writer.add_expert_used_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((10, 64), np.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros((8, 32, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = llama_cpp.traffic(tmp_path / "tied.gguf", "f16")
    assert found.weights == 4 * (10 * 64 + 2 * 32 * 64)
    assert found.kv_per_token == 2 * 3 * 2 * 16 * 2


def onnx_bytes(folder: Path) -> dict[str, tuple[int, int]]:
    """Bytes and rows of each initializer."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    size = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.INT64: 8, onnx.TensorProto.INT32: 4}
    return {t.name: (int(np.prod(t.dims)) * size[t.data_type], t.dims[0] if t.dims else 1) for t in graph.initializer}


def test_a_token_reads_one_row_of_an_onnx_embedding(checkpoint: Path, genai_folder: Path) -> None:
    sizes = onnx_bytes(genai_folder)
    graph = onnx.load(genai_folder / "model.onnx", load_external_data=False).graph
    by_row = {node.input[0] for node in graph.node if node.op_type == "Gather"} & sizes.keys()
    by_row |= {name for node in graph.node if node.op_type == "GroupQueryAttention" for name in node.input[7:9]}
    assert len(by_row) == 3  # the embedding, cosines, sines
    expected = sum(nbytes / rows if name in by_row else nbytes for name, (nbytes, rows) in sizes.items())
    found = ort_genai.traffic(genai_folder)
    assert found.weights == pytest.approx(expected, abs=sum(8 for _ in graph.node))  # constants of nodes count too
    assert found.weights < 0.95 * sum(nbytes for nbytes, _ in sizes.values())
    assert found.kv_per_token == 4 * kv_numbers(checkpoint)


def test_a_shared_onnx_embedding_is_read_whole(tmp_path: Path, checkpoint: Path) -> None:
    folder = write_genai(checkpoint, tmp_path / "tied")
    model = onnx.load(folder / "model.onnx")
    (gather,) = (node for node in model.graph.node if node.op_type == "Gather" and "embed" in node.input[0])
    before = ort_genai.traffic(folder).weights
    (weight,) = (t for t in model.graph.initializer if t.name == gather.input[0])
    model.graph.node.append(onnx.helper.make_node("Transpose", [weight.name], ["head"]))  # as a tied head reads it
    onnx.save(model, folder / "model.onnx")
    whole = int(np.prod(weight.dims)) * 4
    assert ort_genai.traffic(folder).weights - before == whole - whole // weight.dims[0]


class FakeRuntime:
    """A runtime that answers at once, and what it was asked."""

    def __init__(self) -> None:
        self.opened: list[dict] = []
        self.worked: list[tuple] = []

    def require_runtime(self) -> None:
        pass

    def files(self, model: Path) -> list[Path]:
        return [model]

    def traffic(self, model: Path, kv_type: str) -> Traffic:
        return Traffic(100, 1.0)

    @contextmanager
    def open(self, model: Path, **options):
        self.opened.append(options)
        info = {"kv_type": options["kv_type"], "threads": options["threads"], "batch": 1, "load_s": 1.0}
        yield SimpleNamespace(info=lambda: info, peak_memory=lambda: 5, samples=self._samples)

    def _samples(self, prompt: int, decode: int, **rest):
        self.worked.append((prompt, decode, rest["depth"]))
        return iter([sample(1e9, 1e9, 1e9)] * rest["repeats"])


@pytest.fixture
def fake(monkeypatch, tmp_path: Path) -> FakeRuntime:
    runtime = FakeRuntime()
    monkeypatch.setattr(speed, "runner_for", lambda model: runtime)
    monkeypatch.setattr(speed, "read_bandwidth", lambda threads: 1e9 * threads)
    return runtime


def test_every_combination_is_measured(fake: FakeRuntime, gguf_file: Path) -> None:
    steps: list[tuple[str, int | None, int]] = []

    @contextmanager
    def stages(name: str, total: int | None):
        yield lambda units: steps.append((name, total, units))

    sweep = Sweep((128, 512), (64, 0), (0, 1024), (1, 2), (None, 256), (None,), repeats=3)
    found = speed.benchmark(gguf_file, sweep, stages)
    once = [(128, 0, 0), (512, 0, 0), (0, 64, 0), (128, 0, 1024), (512, 0, 1024), (0, 64, 1024)]
    assert fake.worked == 4 * once
    assert [(o["threads"], o["batch"]) for o in fake.opened] == [(1, None), (1, 256), (2, None), (2, 256)]
    assert {o["context"] for o in fake.opened} == {512 + 1024 + speed.SPARE}
    assert [run.bandwidth for run in found.runs] == [1e9, 1e9, 2e9, 2e9]
    assert sum(units for name, _, units in steps if name == "measure") == 4 * len(once) * 3
    assert {total for name, total, _ in steps if name == "measure"} == {4 * len(once) * 3}
    assert all(len(test.samples) == 3 for _, test in found.rows())


@pytest.mark.parametrize(
    "sweep", [Sweep((0,), (0,)), Sweep(depths=()), Sweep((-1,)), Sweep(threads=(0,)), Sweep(repeats=0)]
)
def test_a_sweep_of_nothing_is_refused(sweep: Sweep) -> None:
    with pytest.raises(UsageError):
        sweep.lengths()


@pytest.mark.parametrize("kind", [llama_cpp, ort_genai])
def test_samples_keep_to_the_context_and_leave_nothing_behind(kind, gguf_file: Path, genai_folder: Path) -> None:
    artifact = gguf_file if kind is llama_cpp else genai_folder
    ids = np.random.default_rng(3).integers(0, 320, 50)
    options = {"threads": 1, "kv_type": "f32", "timeout": 120}
    with kind.open(artifact, context=64 + speed.SPARE, **options) as runner:
        before = runner.logits(ids)
        found = [list(runner.samples(0, 24, depth=40, repeats=3)), list(runner.samples(24, 0, depth=40, repeats=2))]
        assert [len(each) for each in found] == [3, 2]
        assert all(s.decode_ns > 0 for s in found[0])
        assert all(s.first_token_ns >= s.prompt_ns > 0 for s in found[1])
        np.testing.assert_array_equal(runner.logits(ids, reuse=True), before)
        with pytest.raises(RunnerError, match="context"):
            list(runner.samples(64, 0, depth=40))


def test_an_export_in_two_formats_is_asked_for_one(tmp_path: Path) -> None:
    for name in ("gguf", "onnx"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "phi3edge.json").touch()
    done = run(tmp_path)
    assert done.returncode == 2
    assert "name one of them" in done.stderr


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "phi3edge", "bench", *map(str, arguments)]
    env = {**os.environ, "COLUMNS": "160", "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


SMALL = ("--prompt", "32,48", "--decode", "4", "--depth", "0,40", "--threads", "1", "--repeats", "2")


@pytest.fixture(scope="module", params=["gguf_file", "genai_folder"])
def artifact(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_json(artifact: Path) -> None:
    done = run(artifact, *SMALL, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["model"] == str(artifact)
    (measured,) = found["runs"]
    assert measured["threads"] == 1
    assert measured["context"] == 88 + speed.SPARE
    assert measured["load_s"] > 0
    assert measured["peak_memory_bytes"] > measured["weight_bytes_per_token"] > 0
    names = ["pp32", "pp48", "tg4", "pp32 @ d40", "pp48 @ d40", "tg4 @ d40"]
    assert [test["test"] for test in measured["tests"]] == names
    for test in measured["tests"]:
        count, ns = test["prompt"] + test["decode"], test["samples_ns"]
        assert len(ns) == 2
        assert test["samples_tokens_per_s"] == pytest.approx([1e9 * count / each for each in ns])
        assert test["tokens_per_s"]["median"] == pytest.approx(statistics.median(test["samples_tokens_per_s"]))
        if test["prompt"]:
            assert len(test["samples_first_token_s"]) == 2
            assert all(a >= b / 1e9 for a, b in zip(test["samples_first_token_s"], ns, strict=True))
            assert test["roofline_share"] is None
            continue
        length = test["depth"] + (test["decode"] + 1) / 2
        read = measured["weight_bytes_per_token"] + length * measured["kv_bytes_per_token"]
        assert test["bytes_per_token"] == pytest.approx(read)
        share = test["tokens_per_s"]["median"] * read / measured["bandwidth_bytes_per_s"]
        assert test["roofline_share"] == pytest.approx(share)


def test_jsonl_has_the_fields_of_llama_bench(artifact: Path) -> None:
    done = run(artifact, *SMALL, "--jsonl")
    assert done.returncode == 0
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["n_prompt"], row["n_gen"], row["n_depth"]) for row in rows] == [
        (32, 0, 0),
        (48, 0, 0),
        (0, 4, 0),
        (32, 0, 40),
        (48, 0, 40),
        (0, 4, 40),
    ]
    for row in rows:
        assert list(row) == LLAMA_BENCH_FIELDS
        assert row["avg_ns"] == int(np.mean(row["samples_ns"]))
        assert row["avg_ts"] == pytest.approx(np.mean(row["samples_ts"]))
        assert row["stddev_ts"] == pytest.approx(np.std(row["samples_ts"], ddof=1))
        assert row["n_threads"] == 1
        assert row["model_size"] > 1000
        assert row["model_type"].startswith("phi3")


def test_csv(gguf_file: Path) -> None:
    done = run(gguf_file, *SMALL, "--batch", "32,64", "--micro-batch", "16", "--csv")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(row["batch"], row["micro_batch"]) for row in rows] == [("32", "16")] * 6 + [("64", "16")] * 6
    assert rows[0]["test"] == "pp32"
    assert all(float(row["tokens_per_s_median"]) > 0 for row in rows)


def test_the_table_says_what_is_not_known(gguf_file: Path) -> None:
    done = run(gguf_file, "--prompt", "0", "--decode", "4", "--threads", "1", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert "tg4" in done.stdout
    assert "pp5" not in done.stdout
    assert "llama.cpp" in done.stdout
    told = not isnan(Meter()())
    assert ("energy not available here" in done.stdout) is not told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", "many"), "--prompt"),
        (("--batch", "0"), "--batch"),
        (("--json", "--csv"), "exclude"),
        (("--prompt", "0", "--decode", "0"), "nothing to measure"),
        (("--batch", "16", "--micro-batch", "32"), "micro-batch"),
        (("--kv-cache", "q9"), "q9"),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments, words: str, gguf_file: Path) -> None:
    done = run(gguf_file, "--threads", "1", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_onnx_has_no_micro_batches(genai_folder: Path) -> None:
    done = run(genai_folder, "--threads", "1", "--micro-batch", "32")
    assert done.returncode == 2
    assert "micro-batches" in done.stderr


def test_what_is_no_artifact_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    for path in (tmp_path / "missing.gguf", checkpoint):
        done = run(path)
        assert done.returncode == 2, path
        assert "Traceback" not in done.stderr


def test_figures_go_into_a_folder_of_ours_and_nowhere_else(tmp_path: Path) -> None:
    found = Benchmark(tmp_path / "x.gguf", 1, "f16", True, ())
    assert speed.write(found, tmp_path) is None
    assert not list(tmp_path.iterdir())
    (tmp_path / "phi3edge.json").write_text("{}")
    written = speed.write(found, tmp_path / "x.gguf")
    assert written == tmp_path / "bench.json"
    assert json.loads(written.read_text())["model"] == "x.gguf"
    assert str(tmp_path) not in written.read_text()
