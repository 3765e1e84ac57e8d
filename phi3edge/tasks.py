"""Tasks of lm-evaluation-harness by name: the ones that come with it, and a user's own YAML files.

No code comes from a hub: data sets are read without their scripts, metrics that would be fetched are refused, and so
are tasks that run what a model wrote. A folder of one's own is trusted: Python functions that its YAML names run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi3edge.errors import ConfigError, HubError, MissingExtraError, Phi3EdgeError, UnsupportedError, UsageError
from phi3edge.registry import did_you_mean

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

SEEDS = {"random": 0, "numpy": 1234, "fewshot": 1234}
"""lm-evaluation-harness's own defaults: with others its published figures could not be met."""


def require_harness() -> None:
    """Raise MissingExtraError unless lm-evaluation-harness is installed; imports nothing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("evaluating tasks", "eval")


@dataclass(frozen=True, slots=True)
class Tasks:
    """Loaded tasks, their data sets with them.

    Attributes:
        found: what lm-evaluation-harness's `TaskManager.load` gives: tasks by name, and groups.
        chat: prompts are rendered as chats.
    """

    found: Any
    chat: bool

    def requests(self, limit: int | None, template: Callable[..., str]) -> list[Instance]:
        """All requests of the tasks, and the sampling of examples set back, so that another call makes the same.

        Args:
            limit: at most so many documents of each task.
            template: renders a chat.

        Raises:
            UsageError: a task cannot make its prompts: too few examples, a field that its data lacks.
        """
        made: list[Instance] = []
        for name, task in self.found["tasks"].items():
            try:
                task.build_all_requests(
                    limit=limit,
                    apply_chat_template=self.chat,
                    fewshot_as_multiturn=self.chat,
                    chat_template=template if self.chat else None,
                )
            except Phi3EdgeError:
                raise
            except Exception as error:  # whatever a task's templates and functions raise
                raise UsageError(f"task {name} cannot make its prompts: {_one_line(error)}") from error
            made += task.instances
        self.rewind()
        return made

    def rewind(self) -> None:
        """Sets the sampling of examples back to its beginning."""
        for task in self.found["tasks"].values():
            task.set_fewshot_seed(seed=SEEDS["fewshot"])


def load_tasks(names: Sequence[str], folder: Path | None, num_fewshot: int | None, chat: bool) -> Tasks:
    """Finds tasks by name and reads their data sets.

    Args:
        names: of tasks, groups or tags.
        folder: with YAML files of tasks, which come before lm-evaluation-harness's own; paths in them are relative to
            it.
        num_fewshot: examples in a prompt; None for what each task says. A task that says 0 stays at 0, as in
            lm-evaluation-harness: its prompt has no place for examples.
        chat: render prompts as chats.

    Raises:
        MissingExtraError: lm-evaluation-harness is not installed.
        ConfigError: no task of that name; the message names the nearest.
        HubError: a data set is neither on this machine nor to be had from a hub.
        UnsupportedError: a task that runs a model's code, needs code from a hub, or shows images or sounds.
        UsageError: a folder or task that cannot be read.
    """
    require_harness()
    _quiet()
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--task-folder {folder} is not a folder", "expected one with lm-evaluation-harness's YAML")
    manager = _manager(names, folder)
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(f"unknown task {name!r}", did_you_mean(name, manager.all_tasks))
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    found: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    with _working_folder(folder or Path.cwd()):
        for name in names:
            one = _load(manager, name)
            if twice := found["tasks"].keys() & one["tasks"].keys():
                raise UsageError(f"{name} has the task {min(twice)}, which was named before", "name each task once")
            for kind, entries in one.items():
                found[kind].update(entries)
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UnsupportedError(f"task {name} runs code that the model writes, which phi3edge does not do")
        if getattr(task, "MULTIMODAL", False):
            raise UnsupportedError(f"task {name} shows images or sounds; only text is evaluated")
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    tasks = Tasks(found, chat)
    tasks.rewind()
    return tasks


@contextlib.contextmanager
def no_remote_code() -> Iterator[None]:
    """Refuses, for as long as it lasts, metrics whose code would come from a hub."""
    import evaluate

    def refuse(path: str, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(f"a task needs the metric {path!r}, whose code comes from a hub; it is not run")

    original, evaluate.load = evaluate.load, refuse
    try:
        yield
    finally:
        evaluate.load = original


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """An index of tasks: of the folder alone if it has them all, since reading all of the harness's takes long."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        try:
            own = TaskManager(include_path=str(folder.resolve()), include_defaults=False)
        except Exception as error:  # YAML errors
            raise UsageError(f"{folder} holds a task that cannot be read: {_one_line(error)}") from error
        if all(name in own.all_tasks for name in names):
            return own
    return TaskManager(include_path=str(folder.resolve()) if folder else None)


def _load(manager: Any, name: str) -> dict[str, dict[str, Any]]:
    """The tasks and groups that a name stands for, with their data."""
    try:
        return manager.load([name])
    except Phi3EdgeError:
        raise
    except ConnectionError as error:
        raise HubError(
            f"the data of task {name} is not on this machine, and no hub can be reached: {_one_line(error)}",
            "run it once where the hub is reachable, or give local task files: --task-folder DIR",
        ) from error
    except Exception as error:  # of datasets, YAML, Jinja and the task's own functions
        raise UsageError(f"task {name} cannot be loaded: {_one_line(error)}") from error


def _quiet() -> None:
    """Keeps the libraries' remarks and bars off the terminal; what matters is raised."""
    import datasets
    import lm_eval.api.task
    from tqdm import tqdm

    for library in ("lm_eval", "datasets", "evaluate", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, **_: tqdm(items, disable=True)


@contextlib.contextmanager
def _working_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
