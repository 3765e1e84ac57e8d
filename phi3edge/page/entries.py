"""What there is to show of an artifact: its report, and what else lies in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from phi3edge import folders, manifest
from phi3edge.errors import ConfigError, OutputError
from phi3edge.gates import Gate, Limit
from phi3edge.metrics import Metric
from phi3edge.recipes import gates_of
from phi3edge.report import Report
from phi3edge.targets import Target, load_target
from phi3edge.types import JSON
from phi3edge.validate import ALWAYS


class _Read(BaseModel):
    """Of a file of another command: the fields shown here, whatever else it holds."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Role(_Read):
    """Tensors of one role and codec in the plan; see phi3edge.plan.summarize."""

    role: str
    codec: str
    wanted: str | None = None
    method: str
    tensors: int
    bytes: int
    predicted_kl: float | None = None


class Plan(_Read):
    """The manifest's "plan"."""

    bits_per_weight: float
    weight_bytes: int
    predicted_kl: float | None = None
    roles: list[Role]


class Linear(_Read):
    """A calibrated linear: relative error of its outputs on the calibration text."""

    name: str
    role: str
    layer: int | None = None
    codec: str
    error: float | None = None


class Calibration(_Read):
    """The manifest's "calibration"."""

    text: str
    sha256: str | None = None
    sequences: int | None = None
    tokens: int | None = None
    linears: list[Linear] = []
    expert_tokens: list[list[int]] = []


class NextCodec(_Read):
    """The next bigger codecs for the same unit, and what they are estimated to save and add."""

    codecs: list[str]
    bytes: int
    kl_saved: float


class LayerRow(_Read):
    """One block or one role; see phi3edge.layers.Row.

    Attributes:
        kl_without: the artifact's KL with this back in full precision.
        kl_only: the KL of the full-precision model with only this of the artifact.
    """

    layer: int | None = None
    role: str | None = None
    codecs: list[str] = []
    bytes: int
    kl_without: float
    kl_only: float
    next: NextCodec | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"block {self.layer}" if self.layer is not None else self.role or "all"


class Layers(_Read):
    """layers.json; see phi3edge.layers.Losses."""

    text: str
    chunks: int
    kl: float
    rows: list[LayerRow]


class Speed(_Read):
    """Tokens per second over the repeats."""

    median: float
    mad: float | None = None


class Test(_Read):
    """One row of a benchmark."""

    test: str
    prompt: int
    decode: int
    depth: int
    tokens_per_s: Speed
    time_to_first_token_s: float | None = None
    joules_per_token: float | None = None
    roofline_share: float | None = None


class Run(_Read):
    """All tests of a benchmark with one number of threads and batch."""

    runtime: str | None = None
    version: str | None = None
    threads: int | None = None
    batch: int | None = None
    bandwidth_bytes_per_s: float | None = None
    peak_memory_bytes: float | None = None
    tests: list[Test]


class Bench(_Read):
    """bench.json: what `phi3edge bench --json` prints."""

    cpu: str
    notes: list[str] = []
    runs: list[Run]


class Flips(_Read):
    """Questions whose answer changed; see phi3edge.paired.Flips."""

    to_wrong: int
    to_right: int


class Score(_Read):
    """A metric of a task; see phi3edge.evaluate.Score."""

    metric: str
    filter: str
    artifact: Metric
    reference: Metric | None = None
    difference: Metric | None = None
    flips: Flips | None = None


class TaskScores(_Read):
    """A task or a group of tasks; see phi3edge.evaluate.TaskScores."""

    name: str
    num_fewshot: int | None = None
    documents: int
    of: int
    scores: list[Score]


class Evaluation(_Read):
    """eval.json; see phi3edge.evaluate.Evaluation."""

    limit: int | None = None
    tasks: list[TaskScores]


class Model(_Read):
    """The manifest's "model"."""

    name: str | None = None
    family: str | None = None
    parameters: int | None = None
    checkpoint: str
    repository: str | None = None
    revision: str | None = None
    licence: str | None = None


class Input(_Read):
    """A file of the checkpoint that the artifact was made from."""

    name: str
    bytes: int
    sha256: str


class Recipe(_Read):
    """The manifest's "recipe"."""

    name: str
    summary: str | None = None
    method: str | None = None
    gates: JSON = {}


class Manifest(_Read):
    """What phi3edge.json says, as far as it is shown."""

    model: Model
    format: str = "gguf"
    target: str
    context: int
    kv_cache: str | None = None
    recipe: Recipe
    plan: Plan | None = None
    calibration: Calibration | None = None
    notes: list[str] = []
    seed: int | None = None
    inputs: list[Input] = Field(default=[])
    versions: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Entry:
    """An artifact on the page.

    Attributes:
        name: for people; its heading.
        report: what its validation found.
        manifest: how it was made; None for an artifact that phi3edge did not make.
        target: what the manifest names; None where that is not known here.
        layers: where quality is lost, if `phi3edge layers` ran.
        bench: its speed, if `phi3edge bench` ran.
        evaluation: its scores on tasks, if `phi3edge eval` ran.
    """

    name: str
    report: Report
    manifest: Manifest | None = None
    target: Target | None = None
    layers: Layers | None = None
    bench: Bench | None = None
    evaluation: Evaluation | None = None

    @property
    def bytes(self) -> int:
        """Of all files of the artifact."""
        return sum(file.bytes for file in self.report.artifact)

    def origin(self, gate: Gate) -> str:
        """Who set a gate's limit, as far as it is known: the report says only how it came about."""
        said = self.manifest
        for who, limits in (
            (f"recipe {said.recipe.name}" if said else "", gates_of(said.recipe.gates) if said else {}),
            (f"target {said.target}" if said else "", self.target.gates if self.target else {}),
            ("always", ALWAYS),
        ):
            if _sets(limits.get(gate.name), gate):
                return who
        return "set for this validation"


def _sets(limit: Limit | None, gate: Gate) -> bool:
    return limit is not None and (bool(gate.rule) or limit.limit == gate.limit)


def read_entry(name: str, report: Report, folder: Path | None) -> Entry:
    """An artifact with what lies beside its report.

    Args:
        name: for people.
        report: of it.
        folder: where its manifest and other files are; None if there are none.

    Raises:
        OutputError: a file there that is not what its name says, or a manifest of another artifact.
    """
    if folder is None or not (folder / manifest.NAME).is_file():
        return Entry(name, report)
    files = manifest.read_manifest(folder)["files"]
    if files[0]["sha256"] not in {file.sha256 for file in report.artifact}:
        raise OutputError(
            f"the report of {name} is of other files than {folder / manifest.NAME} tells of", "validate it again"
        )
    said = _read(folder / manifest.NAME, Manifest)
    return Entry(
        name,
        report,
        said,
        _target(said.target) if said else None,
        _read(folder / folders.LAYERS, Layers),
        _read(folder / folders.BENCH, Bench),
        _read(folder / folders.EVAL, Evaluation),
    )


M = TypeVar("M", bound=_Read)


def _read(path: Path, schema: type[M]) -> M | None:
    if not path.is_file():
        return None
    try:
        return schema.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise OutputError(f"cannot show {path}: {where}: {first['msg']}", "make it again, or remove it") from None


def _target(name: str) -> Target | None:
    """A target that the manifest names: perhaps a file of somebody else's, which is not here."""
    try:
        return load_target(name)[1]
    except ConfigError:
        return None
