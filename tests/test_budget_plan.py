"""Budgets from end to end: what is written keeps them, in both formats, and says what was predicted."""

import itertools
from pathlib import Path

import gguf
import pytest
from _models import GROUPED, TIED, Shape, write_model

from phi3edge import manifest
from phi3edge.budget import Budget
from phi3edge.build import Exported, export, prepare
from phi3edge.errors import ConfigError, DoesNotFitError, UsageError
from phi3edge.plan import require_kernels
from phi3edge.recipes import load_recipe
from phi3edge.rounding import Rounding
from phi3edge.targets import load_target
from phi3edge.types import QuantPlan
from phi3edge.validate import Windows, validate

WORDS = ["rivers", "stones", "letters", "engines", "gardens", "winters", "markets", "ladders"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny", GROUPED))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    path.write_text(". ".join(" ".join(words) for words in itertools.permutations(WORDS, 4)))
    return str(path)


def make(model: str, text: str, out: Path, budget: int, format_: str = "gguf", **options: object) -> Exported:
    limit = Budget(bytes=budget)
    return export(model, "cpu", format_=format_, budget=limit, rounding=Rounding(calibration=text), out=out, **options)


def mix(plan: QuantPlan) -> dict[str, str]:
    return {t.tensor.name: t.codec for t in plan.tensors}


@pytest.mark.parametrize(("format_", "budgets"), [("gguf", (749_153, 886_880)), ("onnx", (890_000, 1_090_001))])
def test_files_fill_the_budget_and_never_take_more(
    model: str, text: str, tmp_path: Path, format_: str, budgets: tuple[int, int]
) -> None:
    predicted = []
    for budget in budgets:
        made = make(model, text, tmp_path / str(budget), budget, format_)
        files = manifest.read_manifest(made.folder)["files"]
        assert sum(path.stat().st_size for path in made.files) == sum(entry["bytes"] for entry in files)
        assert 0.97 * budget < sum(entry["bytes"] for entry in files) <= budget
        predicted.append(made.prepared.plan.predicted_kl)
    assert predicted[0] > predicted[1] > 0


def test_a_split_file_counts_with_all_its_headers(model: str, text: str, tmp_path: Path) -> None:
    made = make(model, text, tmp_path / "out", 800_000, split_max_size=400_000)
    assert len(made.files) > 2
    assert 0.97 * 800_000 < sum(path.stat().st_size for path in made.files) <= 800_000


def test_the_plan_is_what_is_written_and_the_same_each_time(model: str, text: str, tmp_path: Path) -> None:
    limit = Budget(bytes=800_000)
    planned = prepare(model, "cpu", format_="gguf", budget=limit, rounding=Rounding(calibration=text))
    made = make(model, text, tmp_path / "a", 800_000)
    again = make(model, text, tmp_path / "b", 800_000)
    assert made.prepared.plan == planned.plan
    assert made.artifact.read_bytes() == again.artifact.read_bytes()
    written = [t.tensor_type.name.lower() for t in gguf.GGUFReader(made.artifact).tensors]
    assert written == list(mix(planned.plan).values())
    assert len(set(written)) > 3  # a mix indeed


def test_manifest_and_report_say_what_was_predicted(model: str, text: str, tmp_path: Path) -> None:
    made = make(model, text, tmp_path / "out", 800_000)
    said = manifest.read_manifest(made.folder)["plan"]
    assert said["predicted_kl"] == pytest.approx(sum(entry["predicted_kl"] for entry in said["chosen"]))
    assert said["predicted_kl"] == pytest.approx(sum(row["predicted_kl"] or 0 for row in said["roles"]))
    assert {entry["name"]: entry["codec"] for entry in said["chosen"]}.items() <= mix(made.prepared.plan).items()
    assert any("Predicted KL" in line for line in made.notes)
    report, _ = validate(made.artifact, Path(model), windows=Windows(2), predicted_kl=said["predicted_kl"], threads=1)
    assert report.metrics["kl_predicted"].value == said["predicted_kl"]
    assert said["predicted_kl"] / 3 < report.metrics["kl_mean"].value < said["predicted_kl"] * 3


def test_bits_per_weight_count_the_weights_alone(model: str, text: str) -> None:
    plan = prepare(
        model, "cpu", format_="gguf", budget=Budget(bits_per_weight=4.9), rounding=Rounding(calibration=text)
    ).plan
    assert 4.8 < plan.bits_per_weight <= 4.9


def test_a_budget_above_everything_takes_the_best_codecs(model: str, text: str) -> None:
    plan = prepare(model, "cpu", recipe="phone-1.8", format_="gguf", rounding=Rounding(calibration=text)).plan
    assert load_recipe("phone-1.8")[1].budget.size == int(1.8 * 2**30)
    assert {t.codec for t in plan.tensors} == {"f32", "q8_0"}


def test_only_codecs_with_kernels_on_the_target_are_taken(model: str, text: str) -> None:
    plan = prepare(model, "webgpu", budget=Budget(bits_per_weight=6), rounding=Rounding(calibration=text)).plan
    require_kernels(plan, "webgpu", load_target("webgpu")[1], "onnx")
    assert len({t.codec for t in plan.tensors}) > 2


def test_rows_that_are_no_whole_blocks_take_the_fallbacks(text: str, tmp_path: Path) -> None:
    odd = str(write_model(tmp_path / "odd", Shape(hidden=192, intermediate=288, heads=4, kv_heads=2)))
    made = make(odd, text, tmp_path / "out", 560_000)
    assert made.artifact.stat().st_size <= 560_000
    assert {t.codec for t in made.prepared.plan.tensors} <= {"f32", "iq4_nl", "q5_0", "q5_1", "q8_0"}


def test_a_tied_embedding_is_chosen_for_both_of_its_uses(text: str, tmp_path: Path) -> None:
    tied = str(write_model(tmp_path / "tied", TIED))
    plan = prepare(
        tied, "cpu", format_="gguf", budget=Budget(bits_per_weight=4.6), rounding=Rounding(calibration=text)
    ).plan
    assert mix(plan)["model.embed_tokens.weight"] != "q2_k"  # which is for embeddings that are nothing else


def test_gptq_is_predicted_in_the_basis_that_it_rounds_in(model: str, text: str) -> None:
    limit, plain = Budget(bits_per_weight=4.9), Rounding(calibration=text)
    rtn = prepare(model, "cpu", format_="gguf", budget=limit, rounding=plain).plan
    gptq = prepare(model, "cpu", format_="gguf", budget=limit, rounding=Rounding("gptq", text)).plan
    assert rtn.predicted_kl is not None
    assert gptq.predicted_kl is not None
    assert 0.1 < gptq.predicted_kl / rtn.predicted_kl < 0.9


def test_what_cannot_be_is_refused_in_one_line(model: str, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match=r"smallest codecs it takes \d+ bytes .* budget is 1000 "):
        prepare(model, "cpu", budget=Budget(bytes=1000))
    with pytest.raises(UsageError, match="takes no budget"):
        prepare(model, "cpu", recipe="q4_k_m", budget=Budget(bytes=10**9))
    with pytest.raises(UsageError, match="none is given"):
        prepare(model, "cpu", recipe="budget")
    own = tmp_path / "own.toml"
    lines = ['summary = "x"', 'formats = ["gguf"]', "[codecs]", 'linear = "q4_0"', 'norm = "f32"', "[budget]"]
    for change, says in (('codecs = ["q4_9"]', "q4_9"), ('codecs = ["q4_0"]\nroles = { norm = ["f32"] }', "norm")):
        own.write_text("\n".join([*lines, change]))
        with pytest.raises(ConfigError, match=says):
            load_recipe(str(own))
    own.write_text("\n".join([*lines, 'codecs = ["uint4_b32"]']))
    with pytest.raises(ConfigError, match="no kernel for any codec"):
        prepare(model, "cpu", recipe=str(own), budget=Budget(bytes=10**9))
