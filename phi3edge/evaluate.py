"""Standard tasks on an artifact and on its checkpoint, through lm-evaluation-harness.

Both models get the same prompts, as token ids of the checkpoint's tokenizer, and their answers are held against each
other document by document: the difference of two accuracies over the same questions is known far better than either,
and the questions whose answer changed show what a small difference hides.

Every answer is kept in the cache as it comes, by artifact, runtime, and the tokens asked: an interrupted run goes on,
and a second one with more documents pays for those alone.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from phi3edge import __version__, card, folders, manifest
from phi3edge._toml import Strict
from phi3edge.answers import Answers
from phi3edge.artifact import Artifact, find_artifact
from phi3edge.cache import cache_dir
from phi3edge.errors import RunnerError, UsageError
from phi3edge.files import sha256, write_text
from phi3edge.paired import Figure, Flips, difference, figure, flips, mean, weighted
from phi3edge.progress import Stages, reporting, silent
from phi3edge.reference import eos_ids, fingerprint, load_tokenizer, require_reference, vocabulary_size
from phi3edge.runners import Runner, runner_for
from phi3edge.sources import resolve
from phi3edge.tasks import SEEDS, Tasks, load_tasks, no_remote_code, require_harness
from phi3edge.types import JSON

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from rich.console import Group

    from phi3edge.checkpoint import Checkpoint
    from phi3edge.harness import Adapter, Cost

CONTEXT = 4096
"""The longest prompt, and a perplexity's window, unless the checkpoint has fewer positions or a user says otherwise."""

_LEAST = 160  # tokens of context that the measurement of speed takes
_CHECKED = 4000  # characters of each task's first prompt that are tokenized by the artifact, too
_UNITS = ((3600, "h"), (60, "min"), (1, "s"))
_NOT_OF_ANSWERS = {
    "threads",
    "context",
    "load_s",
    "chat_template",
    "vocabulary_size",
    "eog_ids",
    "system",
    "wait_policy",
}
"""What a runner says of itself that changes no answer, or that the artifact's files fix."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will cost one model, before it starts.

    Attributes:
        model: its name.
        cost: in requests and tokens.
        seconds: by the speed measured just now; at most, where answers are generated.
    """

    model: str
    cost: Cost
    seconds: float

    def __str__(self) -> str:
        cost = self.cost
        kept = f", {cost.answered} of them answered before" if cost.answered else ""
        if cost.answered == cost.requests:
            return f"{self.model}: {cost.requests} requests, all answered before"
        generated = f" and at most {cost.generated_tokens} generated" if cost.generated_tokens else ""
        time = next(f"{self.seconds / n:.0f} {unit}" for n, unit in _UNITS if self.seconds >= 2 * n or n == 1)
        return (
            f"{self.model}: {cost.requests} requests{kept}; {cost.passes} prompts, {cost.computed_tokens} tokens to "
            f"evaluate ({cost.prompt_tokens} if they shared none){generated}: "
            f"{'at most' if cost.generated_tokens else 'about'} {time}"
        )


class Score(Strict):
    """A metric of a task.

    Attributes:
        metric: its name, in lm-evaluation-harness.
        filter: how an answer was read before it was judged.
        higher_is_better: None where the task does not say.
        artifact: of the artifact.
        reference: of the checkpoint in float32, if it ran.
        difference: the artifact's less the reference's, with the error of paired documents.
        flips: answers that changed, where answers are right or wrong.
    """

    metric: str
    filter: str
    higher_is_better: bool | None
    artifact: Figure
    reference: Figure | None
    difference: Figure | None
    flips: Flips | None


class TaskScores(Strict):
    """A task, or a group of tasks.

    Attributes:
        name: its name.
        version: the task's own.
        tasks: of a group, its tasks; else empty.
        num_fewshot: examples in a prompt; None for a group whose tasks differ.
        documents: how many were asked.
        of: how many there are.
        sha256: of documents, prompts and targets, as lm-evaluation-harness computes it; None for a group.
        scores: its metrics.
    """

    name: str
    version: str
    tasks: list[str]
    num_fewshot: int | None
    documents: int
    of: int
    sha256: str | None
    scores: list[Score]


class Evaluation(Strict):
    """What an evaluation found; the content of eval.json.

    Attributes:
        schema_version: of this.
        artifact: its files, each with name, bytes and sha256.
        checkpoint: the reference's name, repository and revision.
        reference: whether the checkpoint ran, too.
        chat: whether prompts were rendered as chats.
        limit: documents of each task at most.
        context: the most tokens of a prompt, and a perplexity's window.
        seeds: of the sampling of examples.
        tasks: tasks and groups, in the order they were named.
        runtime: what ran the artifact, and how.
        versions: of the software.
    """

    schema_version: Literal[1] = 1
    artifact: list[JSON]
    checkpoint: JSON
    reference: bool
    chat: bool
    limit: int | None
    context: int
    seeds: dict[str, int]
    tasks: list[TaskScores]
    runtime: JSON
    versions: dict[str, str]


def evaluate(
    artifact: Path,
    tasks: Sequence[str],
    checkpoint: str | None = None,
    *,
    reference: bool = False,
    num_fewshot: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    task_folder: Path | None = None,
    context: int | None = None,
    kv_type: str | None = None,
    threads: int | None = None,
    timeout: float = 600,
    confirm: Callable[[Sequence[Estimate]], None] = lambda estimates: None,
    stages: Stages = silent,
) -> tuple[Evaluation, Path | None]:
    """Evaluate tasks on an artifact and, if wanted, on its checkpoint.

    Args:
        artifact: a folder that `export` wrote, or a file or folder that a runtime opens.
        tasks: names of lm-evaluation-harness's tasks, groups or tags.
        checkpoint: the checkpoint's name; None for the one that the manifest names.
        reference: run the checkpoint in float32, too.
        num_fewshot: examples in a prompt; None for what each task says.
        limit: at most so many documents of each task.
        chat: render prompts by the checkpoint's chat template, examples as turns.
        task_folder: with a user's own tasks, see `load_tasks`.
        context: the most tokens of a prompt; None for 4096, or the checkpoint's positions if these are fewer.
        kv_type: type of the KV cache; None for what the manifest says, else f16.
        threads: of the runtime; None for one per usable core.
        timeout: seconds that one answer of the runtime may take.
        confirm: is told what each model will cost before any task starts; what it raises ends the run.
        stages: shows progress.

    Returns:
        The evaluation, and the file it was written to: None if the artifact is in no folder of ours, or was held
        against another checkpoint than its own.

    Raises:
        MissingExtraError: lm-evaluation-harness, the runtime, torch or transformers is not installed.
        UsageError: nothing to run, a prompt longer than the context, no chat template.
        ConfigError, HubError, UnsupportedError: a task that is unknown, has no data here, or needs what is not run.
        RunnerError: the runtime fails, or the artifact has another vocabulary or other token ids.
        CheckpointError: transformers cannot load the checkpoint.
    """
    require_harness()
    require_reference()
    found = find_artifact(artifact)
    runtime = runner_for(found.file)
    runtime.require_runtime()
    source = _source(found, checkpoint, stages)
    tokenizer = load_tokenizer(source.path)
    if chat and not tokenizer.chat_template:
        raise UsageError(f"{source.name} has no chat template", "leave --chat away")
    room = _room(source.path, context)
    versions, estimates = _versions(), list[Estimate]()
    with no_remote_code(), ExitStack() as answers:
        with stages("tasks", None):
            loaded = load_tasks(tasks, task_folder, num_fewshot, chat)
        from phi3edge.harness import ReferenceModel, Requests, RunnerModel, render_chat

        requests = Requests(tokenizer, room)
        with stages("prompts", None):
            asked = loaded.requests(limit, partial(render_chat, tokenizer))
            needs = max(part.needs for request in asked for part in requests.of(request))
        with stages("hash", None):
            files: list[JSON] = [
                {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}
                for file in runtime.files(found.file)
            ]
        beside = None
        if reference:
            kept = answers.enter_context(closing(Answers(_kept(fingerprint(source.path), versions["transformers"]))))
            beside = ReferenceModel(source.path, eos_ids(source.path), requests, kept, stages)
            estimates.append(_estimate(beside, f"{source.name} (reference)", asked))
            beside.release()  # its memory, while the artifact runs
        with stages("load", None):
            cache = kv_type or (found.said or {}).get("kv_cache", "f16")
            runner = runtime.open(
                found.file, context=max(needs, _LEAST), threads=threads, kv_type=cache, timeout=timeout
            )
        with runner:
            info = runner.info()
            how = {key: value for key, value in info.items() if key not in _NOT_OF_ANSWERS}
            _require_same_tokens(runner, found.file.name, source.path, asked, tokenizer)
            kept = answers.enter_context(closing(Answers(_kept([file["sha256"] for file in files], how))))
            model = RunnerModel(runner, requests, kept, stages)
            confirm([_estimate(model, artifact.name, asked), *estimates])
            ours = _judge(model, loaded, limit)
        theirs = _judge(beside, loaded, limit) if beside else None
    evaluation = Evaluation(
        artifact=files,
        checkpoint={
            "name": source.name,
            "repository": source.source.repository,
            "revision": source.source.revision,
        },
        reference=reference,
        chat=chat,
        limit=limit,
        context=room,
        seeds=SEEDS,
        tasks=_scores(loaded, ours, theirs),
        runtime={**how, "threads": info["threads"]},
        versions={**versions, info["runtime"]: info["version"]},
    )
    if found.said is None or checkpoint is not None:
        return evaluation, None
    write_text(found.folder / folders.EVAL, to_json(evaluation))
    card.write(found.folder)
    return evaluation, found.folder / folders.EVAL


def _source(artifact: Artifact, checkpoint: str | None, stages: Stages) -> Checkpoint:
    """What the artifact was made from."""
    if artifact.said is None and checkpoint is None:
        raise UsageError(
            f"{artifact.file.name} has no {manifest.NAME} beside it that says what it is", "give --checkpoint"
        )
    with reporting(stages) as told:
        source = resolve(checkpoint or (artifact.said or {})["model"]["checkpoint"], told)
    source.close()  # what is needed of it is read from its folder
    return source


def _room(checkpoint: Path, context: int | None) -> int:
    """The most tokens of a prompt."""
    positions = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    if context is not None and context > positions:
        raise UsageError(f"--context {context} is more than the checkpoint's {positions} positions")
    return context or min(CONTEXT, positions)


def _require_same_tokens(
    runner: Runner, name: str, checkpoint: Path, asked: Sequence[Instance], tokenizer: Any
) -> None:
    """Refuse an artifact that would read the prompts differently."""
    size, wanted = runner.info()["vocabulary_size"], vocabulary_size(checkpoint)
    if size != wanted:
        raise RunnerError(
            f"{name} has {size} tokens in its vocabulary, the checkpoint {wanted}",
            "is it an export of this checkpoint?",
        )
    first = {request.task_name: request.args[0] for request in reversed(asked)}
    for task, prompt in first.items():
        text = prompt[:_CHECKED]
        ids, theirs = runner.tokenize(text, special=True, bos=False), tokenizer.encode(text, add_special_tokens=False)
        if ids != theirs:
            at = next(
                (n for n, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), min(len(ids), len(theirs))
            )
            raise RunnerError(
                f"{name} reads a prompt of {task} as other tokens than the checkpoint, from token {at} on: "
                f"{ids[at : at + 3]}, expected {theirs[at : at + 3]}",
                "phi3edge validate says more; export the artifact again",
            )


def _kept(*model: object) -> Path:
    """The file of a model's answers: by all that they depend on, but for the request."""
    digest = hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / "eval" / f"{digest}.jsonl"


def _estimate(model: Adapter, name: str, asked: Sequence[Instance]) -> Estimate:
    cost = model.cost(asked)
    if cost.answered == cost.requests:
        return Estimate(name, cost, 0.0)
    prompt, decode = model.speed()
    return Estimate(name, cost, cost.computed_tokens / prompt + cost.generated_tokens / decode)


def _judge(model: Adapter, tasks: Tasks, limit: int | None) -> Mapping[str, Any]:
    """Answers, and judges the answers; what lm-evaluation-harness found."""
    from lm_eval.evaluator import evaluate as judge

    found = judge(
        lm=model,
        task_dict=tasks.found,
        limit=limit,
        bootstrap_iters=0,  # standard errors are computed here: of pairs, too
        log_samples=True,
        apply_chat_template=tasks.chat,
        fewshot_as_multiturn=tasks.chat,
    )
    tasks.rewind()
    return found


def _scores(tasks: Tasks, ours: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> list[TaskScores]:
    """Figures of every task, and of the groups over them."""
    found: dict[str, TaskScores] = {}
    for name, task in tasks.found["tasks"].items():
        samples = ours["samples"][name]
        mine = _values(samples)
        other = _values(theirs["samples"][name]) if theirs else {}
        better = task.higher_is_better()
        found[name] = TaskScores(
            name=name,
            version=str(ours["versions"][name]),
            tasks=[],
            num_fewshot=ours["n-shot"][name],
            documents=len({sample["doc_id"] for sample in samples}),
            of=ours["n-samples"][name]["original"],
            sha256=_task_hash(samples),
            scores=[
                _score(key, better.get(key[0]), values, other.get(key), _aggregation(task, key[0]))
                for key, values in mine.items()
            ],
        )
    groups = [_group(name, group, found) for name, group in tasks.found["groups"].items() if group.has_aggregation]
    return [*groups, *found.values()]


def _values(samples: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Any]]:
    """Each document's value, by metric and filter, in the documents' order."""
    found: dict[tuple[str, str], list[Any]] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        for metric in sample["metrics"]:
            found.setdefault((metric, sample["filter"]), []).append(sample[metric])
    return found


def _aggregation(task: Any, metric: str) -> Callable[[Sequence[Any]], float]:
    from lm_eval.api.metrics import mean as their_mean

    aggregate = task.aggregation().get(metric, their_mean)
    return mean if aggregate is their_mean else aggregate


def _score(
    key: tuple[str, str],
    higher_is_better: bool | None,
    ours: Sequence[Any],
    theirs: Sequence[Any] | None,
    aggregate: Callable[[Sequence[Any]], float],
) -> Score:
    return Score(
        metric=key[0],
        filter=key[1],
        higher_is_better=higher_is_better,
        artifact=figure(ours, aggregate),
        reference=figure(theirs, aggregate) if theirs else None,
        difference=difference(ours, theirs, aggregate) if theirs else None,
        flips=flips(ours, theirs) if theirs and aggregate is mean else None,
    )


def _group(name: str, group: Any, tasks: Mapping[str, TaskScores]) -> TaskScores:
    """A group's figures: means over its tasks, weighted as the group says."""
    leaves = [tasks[task.task_name] for task in group.get_all_tasks()]
    scores = []
    for wanted in group.aggregate_metric_list:
        keys = dict.fromkeys((s.metric, s.filter) for leaf in leaves for s in leaf.scores)
        for metric, reading in keys:
            if metric != wanted.metric or (wanted.filter_list and reading not in wanted.filter_list):
                continue
            have = [(leaf, s) for leaf in leaves for s in leaf.scores if (s.metric, s.filter) == (metric, reading)]
            weights = [leaf.documents if wanted.weight_by_size else 1 for leaf, _ in have]
            paired = all(s.reference for _, s in have)
            scores.append(
                Score(
                    metric=metric,
                    filter=reading,
                    higher_is_better=have[0][1].higher_is_better,
                    artifact=weighted([s.artifact for _, s in have], weights),
                    reference=weighted([s.reference for _, s in have if s.reference], weights) if paired else None,
                    difference=weighted([s.difference for _, s in have if s.difference], weights) if paired else None,
                    flips=_sum([s.flips for _, s in have]),
                )
            )
    shots = {leaf.num_fewshot for leaf in leaves}
    return TaskScores(
        name=name,
        version=str(group.version),
        tasks=[leaf.name for leaf in leaves],
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        documents=sum(leaf.documents for leaf in leaves),
        of=sum(leaf.of for leaf in leaves),
        sha256=None,
        scores=scores,
    )


def _sum(found: Sequence[Flips | None]) -> Flips | None:
    total = Flips(questions=0, to_wrong=0, to_right=0)
    for one in found:
        if one is None:
            return None
        total += one
    return total


def _task_hash(samples: Sequence[Mapping[str, Any]]) -> str:
    """lm-evaluation-harness's own hash of a task: of its documents, prompts and targets."""
    text = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    packages = ("lm_eval", "datasets", "transformers", "torch", "numpy")
    return {
        "phi3edge": __version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def to_json(evaluation: Evaluation) -> str:
    """The evaluation as JSON text, indented."""
    return json.dumps(to_data(evaluation), indent=2, ensure_ascii=False) + "\n"


def to_data(evaluation: Evaluation) -> JSON:
    """What `to_json` writes, as plain data."""
    return json.loads(evaluation.model_dump_json())


def render(evaluation: Evaluation) -> Group:
    """A table, a row for each metric of each task, for rich's console."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = ["documents", "shots", "metric", "artifact"]
    columns += ["reference", "difference", "to wrong", "to right"] if evaluation.reference else []
    table.add_column("task", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="left" if column == "metric" else "right", no_wrap=True)
    grouped = {name for task in evaluation.tasks for name in task.tasks}
    for task in evaluation.tasks:
        documents = f"{task.documents}" if task.documents == task.of else f"{task.documents} of {task.of}"
        shots = "differ" if task.num_fewshot is None else str(task.num_fewshot)
        for number, score in enumerate(task.scores):
            name = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
            cells = [documents, shots, name, _show(score.artifact)]
            if score.reference and score.difference:
                changed = score.flips
                cells += [_show(score.reference), _show(score.difference, "+")]
                cells += [str(changed.to_wrong), str(changed.to_right)] if changed else ["", ""]
            indent = "  " if task.name in grouped else ""
            table.add_row(indent + task.name if number == 0 else "", *cells)
    head = Text.assemble((evaluation.checkpoint["name"], "bold"), f", {evaluation.artifact[0]['name']}")
    how = "prompts as chats" if evaluation.chat else "prompts without a chat template"
    harness = f"lm-evaluation-harness {evaluation.versions['lm_eval']}, {how}; ± is one standard error"
    return Group(head, Text(harness, "dim"), Text(), table)


def _show(value: Figure, sign: str = "") -> str:
    digits = 4 if abs(value.value) < 10 else 2
    error = "" if value.standard_error is None else f" ± {value.standard_error:.{digits}f}"
    return f"{value.value:{sign}.{digits}f}{error}"
