import hashlib
import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import datasets
import lm_eval.tasks
import numpy as np
import pytest
import torch
import yaml
from _cards import manifest
from _genai import write_genai
from _gguf import write_gguf
from _models import Shape, write_model
from _tasks import write_task, write_tasks
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from typer.testing import CliRunner

from phi3edge import harness
from phi3edge.answers import Answers
from phi3edge.cli.app import app
from phi3edge.errors import ConfigError, HubError, MissingExtraError, RunnerError, UnsupportedError, UsageError
from phi3edge.evaluate import CONTEXT, Evaluation, Score, evaluate, render
from phi3edge.harness import ReferenceModel, Requests
from phi3edge.reference import load_model, load_tokenizer
from phi3edge.runners import Runner, llama_cpp, ort_genai, shared_length

SHAPE = Shape(dtype="float32", hidden=128, intermediate=256, kv_heads=2)
ROOM = 200  # shorter than the texts of the task `text`: their windows count
TASKS = ["both", "answer", "text"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("PHI3EDGE_CACHE", str(folder))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        yield folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("checkpoint") / "tiny", SHAPE)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Path:
    """A GGUF in float32 in a folder with a manifest, as an export leaves it."""
    folder = checkpoint.parent / "exported"
    folder.mkdir()
    file = write_gguf(checkpoint, folder / "exact.gguf")
    said = manifest("gguf") | {
        "files": [{"name": file.name, "bytes": file.stat().st_size, "sha256": "0" * 64}],
        "model": manifest("gguf")["model"] | {"checkpoint": str(checkpoint)},
        "target": "desktop",
        "context": 512,
        "kv_cache": "f32",
        "notes": [],
    }
    (folder / "phi3edge.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def onnx(checkpoint: Path) -> Path:
    return write_genai(checkpoint, checkpoint.parent / "onnx")


@pytest.fixture(scope="module")
def noisy(checkpoint: Path) -> Path:
    return write_gguf(checkpoint, checkpoint.parent / "noisy.gguf", noise=0.3)


@pytest.fixture(scope="module")
def ask(checkpoint: Path, tasks: Path):
    """What lm-evaluation-harness finds by itself, with its own Hugging Face model."""
    model = HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=1, max_length=ROOM)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def found(names: list[str], **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tasks)
            return simple_evaluate(
                model=model, tasks=names, task_manager=manager, bootstrap_iters=1000, log_samples=True, **options
            )

    return found


@pytest.fixture(scope="module")
def oracle(ask):
    return ask(TASKS)


def run(artifact: Path, checkpoint: Path, tasks: Path, names: list[str] | None = None, **options) -> Evaluation:
    options = {"context": ROOM, "threads": 1, "kv_type": "f32", **options}
    return evaluate(artifact, names or TASKS, str(checkpoint), task_folder=tasks, **options)[0]


def scores(found: Evaluation) -> dict[tuple[str, str, str], Score]:
    return {(task.name, score.metric, score.filter): score for task in found.tasks for score in task.scores}


def kept(cache: Path) -> list[dict]:
    """All answers in the cache."""
    lines = [line for file in sorted((cache / "eval").glob("*.jsonl")) for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("kind", ["exact", "onnx"])
def test_figures_are_those_of_the_harness_own_model(
    kind: str, checkpoint: Path, tasks: Path, oracle, request: pytest.FixtureRequest
) -> None:
    found = run(request.getfixturevalue(kind), checkpoint, tasks, reference=True)
    theirs = oracle["results"]
    assert [task.name for task in found.tasks] == ["both", "choice", "endings", "answer", "text"]
    for (task, metric, reading), score in scores(found).items():
        expected = theirs[task][f"{metric},{reading}"]
        assert score.artifact.value == pytest.approx(expected, rel=2e-4), (task, metric)
        assert score.reference is not None
        assert score.reference.value == pytest.approx(expected, rel=1e-5)
        assert score.difference is not None
        assert score.difference.value == pytest.approx(0, abs=2e-4 * max(1, expected))
        if metric.startswith("acc") and task != "both":
            assert score.artifact.standard_error == pytest.approx(theirs[task][f"{metric}_stderr,{reading}"])
            assert score.flips is not None
            assert (score.flips.questions, score.flips.to_wrong, score.flips.to_right) == (12, 0, 0)
    shots = {task.name: task.num_fewshot for task in found.tasks}
    assert shots == {"both": 2, "choice": 2, "endings": 2, "answer": 1, "text": 0}
    assert all(task.version == "1.5" for task in found.tasks if not task.tasks)


@pytest.mark.parametrize(("kind", "tolerance"), [("exact", 1e-3), ("onnx", 1e-5)])  # llama.cpp rounds more
def test_answers_are_those_of_the_harness_own_model(
    kind: str,
    tolerance: float,
    checkpoint: Path,
    tasks: Path,
    oracle,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    original = harness.Adapter._answer
    monkeypatch.setattr(
        harness.Adapter, "_answer", lambda self, *a: asked.append((a, original(self, *a))) or asked[-1][1]
    )
    run(request.getfixturevalue(kind), checkpoint, tasks)
    by_prompt = {}
    for (requests, _), answers in asked:
        for one, answer in zip(requests, answers, strict=True):
            by_prompt[json.dumps(one.args)] = answer
    compared = 0
    for name in ("choice", "endings", "answer"):
        for sample in oracle["samples"][name]:
            for arguments, (theirs,) in zip(sample["arguments"], sample["resps"], strict=True):
                (ours,) = by_prompt[json.dumps(arguments)]
                if name == "answer":
                    assert ours == theirs
                else:
                    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
                    assert ours[1] is theirs[1]
                compared += 1
    assert compared == 12 * (4 + 3 + 1)


def test_prompts_are_chats_on_request(exact: Path, checkpoint: Path, tasks: Path, ask) -> None:
    theirs = ask(["endings"], apply_chat_template=True, limit=5, num_fewshot=1)
    (prompt, _) = theirs["samples"]["endings"][0]["arguments"][0]
    assert (prompt.count("<|user|>\n"), prompt.count("<|assistant|>\n")) == (2, 2)
    found = run(exact, checkpoint, tasks, ["endings"], chat=True, limit=5, num_fewshot=1)
    (task,) = found.tasks
    assert found.chat
    assert (task.num_fewshot, task.documents) == (1, 5)
    for score in task.scores:
        assert score.artifact.value == pytest.approx(theirs["results"]["endings"][f"{score.metric},none"])
    samples = theirs["samples"]["endings"]
    text = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    assert task.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_flips_and_differences_of_a_damaged_artifact(noisy: Path, checkpoint: Path, tasks: Path) -> None:
    found = scores(run(noisy, checkpoint, tasks, reference=True))
    for name in ("choice", "endings"):
        score = found[name, "acc", "none"]
        assert score.flips
        assert score.difference
        assert score.reference
        changed = score.flips.to_right - score.flips.to_wrong
        assert score.difference.value == pytest.approx(changed / 12)
        assert score.artifact.value - score.reference.value == pytest.approx(score.difference.value)
    both = found["both", "acc", "none"]
    parts = [found[name, "acc", "none"] for name in ("choice", "endings")]
    assert both.flips
    assert both.flips.questions == 24
    assert both.flips.to_wrong == sum(part.flips.to_wrong for part in parts if part.flips)
    assert both.artifact.value == pytest.approx(np.mean([part.artifact.value for part in parts]))
    assert any(part.flips and part.flips.to_wrong + part.flips.to_right for part in parts)
    perplexity = found["text", "word_perplexity", "none"]
    assert perplexity.flips is None
    assert perplexity.difference
    assert perplexity.difference.standard_error
    assert perplexity.difference.value != 0


def test_an_interrupted_run_goes_on(
    checkpoint: Path, tasks: Path, exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path))
    original, added = Answers.add, []

    def add(self, *answer) -> None:
        if len(added) == 10:
            raise KeyboardInterrupt
        original(self, *answer)
        added.append(answer)

    monkeypatch.setattr(Answers, "add", add)
    with pytest.raises(KeyboardInterrupt):
        run(exact, checkpoint, tasks)
    before = kept(tmp_path)
    assert len(before) == 10
    (file,) = (tmp_path / "eval").glob("*.jsonl")
    with file.open("a") as torn:
        torn.write('{"key": "half of a li')
    monkeypatch.setattr(Answers, "add", original)
    costs = []
    whole = run(exact, checkpoint, tasks, confirm=lambda estimates: costs.append(estimates[0].cost))
    assert costs[0].answered == 10
    after = kept(tmp_path)
    assert after[:10] == before
    assert len(after) == costs[0].requests == len({entry["key"] for entry in after})
    assert {entry["asked"].split("/")[0] for entry in after} == {"choice", "endings", "answer", "text"}

    again = run(exact, checkpoint, tasks, confirm=lambda estimates: costs.append(estimates[0].cost))
    assert costs[1].answered == costs[1].requests
    assert (costs[1].passes, costs[1].computed_tokens) == (0, 0)
    assert len(kept(tmp_path)) == len(after)
    assert again == whole


def test_more_documents_pay_for_themselves_alone(
    checkpoint: Path, tasks: Path, exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI3EDGE_CACHE", str(tmp_path))
    costs = []
    options = {"confirm": lambda estimates: costs.append(estimates[0].cost), "names": ["endings"]}
    few = run(exact, checkpoint, tasks, limit=3, **options)
    run(exact, checkpoint, tasks, limit=5, **options)
    assert [cost.requests for cost in costs] == [9, 15]
    assert [cost.answered for cost in costs] == [0, 9]
    assert (few.tasks[0].documents, few.tasks[0].of) == (3, 12)


def test_the_cost_counts_shared_beginnings_once(exact: Path, checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    costs = []

    def stop(estimates) -> None:
        costs.extend(estimates)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHI3EDGE_CACHE", str(tmp_path))
        for name in ("choice", "endings"):
            with pytest.raises(InterruptedError):
                run(exact, checkpoint, tasks, [name], confirm=stop)
    choice, endings = (estimate.cost for estimate in costs)
    assert (choice.requests, choice.passes) == (48, 12)  # answers of one token after the space: one pass
    assert (endings.requests, endings.passes) == (36, 36)
    assert endings.computed_tokens < endings.prompt_tokens / 2
    assert all(estimate.seconds > 0 for estimate in costs)
    assert "48 requests; 12 prompts" in str(costs[0])
    assert not list((tmp_path / "eval").glob("*.jsonl")) or not kept(tmp_path)


def test_a_kept_reference_is_not_loaded_again(
    exact: Path, checkpoint: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(exact, checkpoint, tasks, reference=True)

    def load(path: Path) -> None:
        raise AssertionError("the reference was loaded")

    monkeypatch.setattr(harness, "load_model", load)
    assert run(exact, checkpoint, tasks, reference=True).tasks == first.tasks


def test_eval_json_is_written_beside_an_artifact_of_ours(
    exact: Path, tasks: Path, noisy: Path, checkpoint: Path
) -> None:
    options = {"task_folder": tasks, "context": ROOM, "threads": 1}
    found, written = evaluate(exact, ["endings"], **options)
    assert written == exact / "eval.json"
    assert Evaluation.model_validate_json(written.read_text()) == found
    (task,) = found.tasks
    assert len(task.sha256 or "") == 64
    assert found.versions["lm_eval"]
    assert found.artifact[0]["name"] == "exact.gguf"
    assert not found.reference
    assert evaluate(noisy, ["endings"], str(checkpoint), **options)[1] is None
    console = Console(width=120)
    with console.capture() as shown:
        console.print(render(found))
    assert "endings" in shown.get()
    assert f"{task.scores[0].artifact.value:.4f} ± " in shown.get()


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_a_context_that_is_reused_gives_the_same_logits(
    kind: str, exact: Path, onnx: Path, request: pytest.FixtureRequest
) -> None:
    def opened() -> Runner:
        if kind == "gguf":
            return llama_cpp.open(exact / "exact.gguf", context=700, threads=1, kv_type="f32", plain=True)
        return ort_genai.open(onnx, context=512, threads=1)

    random = np.random.default_rng(0)
    base = random.integers(4, 264, 90)
    with opened() as runner, opened() as fresh:
        for length, keep in ((90, 0), (90, 60), (60, 60), (30, 30), (80, 30), (80, 80), (20, 1)):
            ids = np.concatenate([base[:keep], random.integers(4, 264, length - keep)])
            for start in (0, max(keep - 2, 0), length - 1):
                ours = runner.logits(ids, start, reuse=True)
                np.testing.assert_allclose(ours, fresh.logits(ids, start), atol=2e-4)
            prompt = ids.tolist()
            assert runner.generate(prompt, 6, reuse=True) == fresh.generate(prompt, 6)
            longer = prompt + fresh.generate(prompt, 3)
            assert runner.generate(longer, 6, reuse=True) == fresh.generate(longer, 6)
            base = np.concatenate([ids, base])[:90]


@pytest.mark.parametrize("window", [None, 40])
def test_the_reference_reuses_only_what_its_cache_still_holds(window: int | None, tmp_path: Path) -> None:
    checkpoint = write_model(tmp_path / "model", SHAPE, sliding_window=window)
    with closing(Answers(tmp_path / "answers.jsonl")) as answers:
        model = ReferenceModel(checkpoint, (0, 3), Requests(load_tokenizer(checkpoint), 512), answers)
        fresh = load_model(checkpoint)
        random = np.random.default_rng(0)
        base = random.integers(4, 264, 100)
        for length, keep in ((30, 0), (35, 20), (35, 35), (90, 35), (60, 50), (30, 10), (38, 30)):
            base[keep:] = random.integers(4, 264, 100 - keep)
            ids = base[:length].astype(np.int32)
            with torch.inference_mode():
                expected = fresh(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
            for start in (0, max(keep - 3, 0), length - 1):
                np.testing.assert_allclose(np.concatenate(list(model.rows(ids, start))), expected[start:], atol=1e-4)
            assert len(model.extend(ids.tolist(), 3)) <= 3


def test_shared_length() -> None:
    assert shared_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_length([1, 2], [1, 2, 3]) == 2
    assert shared_length([], [1]) == shared_length([2], [1]) == 0


class TestErrors:
    def test_unknown_task(self, exact: Path, checkpoint: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # of the harness's 14 000 files, those of MMLU: to read all takes 10 seconds
        monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(Path(lm_eval.tasks.__file__).parent / "mmlu" / "x"))
        with pytest.raises(ConfigError, match="unknown task 'mmlu_anatomi'") as error:
            run(exact, checkpoint, tasks, ["mmlu_anatomi"])
        assert "mmlu_anatomy" in str(error.value.hint)

    def test_named_twice(self, exact: Path, checkpoint: Path, tasks: Path) -> None:
        with pytest.raises(UsageError, match="choice has the task choice"):
            run(exact, checkpoint, tasks, ["both", "choice"])

    def test_not_installed(self, exact: Path, checkpoint: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(MissingExtraError) as error:
            run(exact, checkpoint, tasks)
        assert "[eval]" in str(error.value.hint)

    def test_another_vocabulary(self, checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
        other = write_model(tmp_path / "other", Shape(hidden=64, intermediate=64, heads=1, kv_heads=1, vocab=328))
        with pytest.raises(RunnerError, match="has 328 tokens in its vocabulary, the checkpoint 320"):
            run(write_gguf(other, tmp_path / "other.gguf"), checkpoint, tasks)

    def test_other_token_ids(self, checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
        other = write_gguf(checkpoint, tmp_path / "other.gguf", merges=False)
        with pytest.raises(RunnerError, match="reads a prompt of endings as other tokens"):
            run(other, checkpoint, tasks, ["endings"])

    def test_too_long_a_prompt(self, exact: Path, checkpoint: Path, tasks: Path) -> None:
        with pytest.raises(
            UsageError, match=r"choice/\d+: a prompt of 1[6-9]\d tokens is longer than the context of 160"
        ):
            run(exact, checkpoint, tasks, ["choice"], num_fewshot=4, context=160)
        with pytest.raises(UsageError, match="513 is more than the checkpoint's 512 positions"):
            run(exact, checkpoint, tasks, context=513)
        assert CONTEXT > 512

    def test_too_few_examples(self, exact: Path, checkpoint: Path, tasks: Path) -> None:
        with pytest.raises(UsageError, match="task choice cannot make its prompts"):
            run(exact, checkpoint, tasks, ["choice"], num_fewshot=5, context=512)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"generation_kwargs": {"do_sample": True, "temperature": 0.7}}, "asks for sampled answers"),
            ({"generation_kwargs": {"repetition_penalty": 1.1}}, "asks for repetition_penalty"),
            ({"unsafe_code": True}, "runs code that the model writes"),
        ],
    )
    def test_what_is_not_run(
        self, exact: Path, checkpoint: Path, tasks: Path, tmp_path: Path, change: dict, message: str
    ) -> None:
        own = write_tasks(tmp_path / "own")
        content = yaml.safe_load((own / "answer.yaml").read_text())
        write_task(own, "answer", content | change)
        with pytest.raises(UnsupportedError, match=message):
            run(exact, checkpoint, own, ["answer"])

    def test_no_template(self, exact: Path, checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
        bare = write_model(tmp_path / "bare", SHAPE)
        settings = json.loads((bare / "tokenizer_config.json").read_text())
        del settings["chat_template"]
        (bare / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(UsageError, match="bare has no chat template"):
            run(exact, bare, tasks, chat=True)

    def test_no_hub(self, exact: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        own = write_tasks(tmp_path / "own")
        content = yaml.safe_load((own / "choice.yaml").read_text())
        del content["dataset_kwargs"]
        write_task(own, "choice", content | {"dataset_path": "someone/questions"})
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="the data of task choice is not on this machine") as error:
            run(exact, checkpoint, own, ["choice"])
        assert "--task-folder" in str(error.value.hint)


def test_the_command(exact: Path, tasks: Path, cache: Path) -> None:
    arguments = ["eval", str(exact), "--tasks", "endings", "--limit", "2", "--task-folder", str(tasks)]
    cost = CliRunner().invoke(app, [*arguments, "--dry-run", "--json"])
    assert cost.exit_code == 0, cost.output
    assert json.loads(cost.stdout)[0]["cost"]["requests"] == 6
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache / "datasets")}
    command = [sys.executable, "-m", "phi3edge", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout
    assert "6 requests" in done.stderr
    assert "it/s" not in done.stderr  # no bars of other libraries
    assert "eval.json" in done.stderr
