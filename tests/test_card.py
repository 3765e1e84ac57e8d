"""Model cards: what a hub reads in them, and that they say what the folder says, and nothing of this machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from _cards import CALIBRATED, REPOSITORY, REVISION, manifest, write_artifact

from phi3edge import card
from phi3edge.errors import ConfigError, OutputError


def front_matter(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(("format_", "library"), [("gguf", "gguf"), ("onnx", "onnxruntime-genai")])
def test_the_hub_learns_licence_base_and_format(tmp_path: Path, format_: str, library: str) -> None:
    folder = write_artifact(tmp_path / "tiny", format_)
    assert card.write(folder) == folder / "README.md"
    assert front_matter((folder / "README.md").read_text()) == {
        "license": "mit",
        "base_model": REPOSITORY,
        "base_model_relation": "quantized",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [format_, "phi3", "phi3edge"],
    }


def test_a_local_model_names_no_base_and_no_folder(tmp_path: Path) -> None:
    model = manifest("gguf")["model"] | {
        "checkpoint": str(tmp_path / "my model"),
        "repository": None,
        "revision": None,
        "licence": "a: strange #one",
    }
    text = card.render(write_artifact(tmp_path / "tiny", model=model))
    found = front_matter(text)
    assert "base_model" not in found
    assert found["license"] == "a: strange #one"
    assert str(tmp_path) not in text
    assert 'phi3edge export "my model" --target iphone' in text


def test_it_says_files_figures_and_what_was_not_run(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "tiny", passed=True)
    text = card.render(folder)
    for file in manifest("gguf")["files"]:
        assert file["sha256"] in text
    assert REVISION in text
    for row in ("| perplexity | 6.250 | 0.125 |", "| KL, mean | 0.0123 | 0.0004 |", "| decode | 21.5 tokens/s |  |"):
        assert row in text
    assert "4080 tokens of python-3.11 docs" in text
    assert "all 1 gates passed" in text
    assert "- A note that is worth reading.\n- Not run: The GPU's kernels." in text


def test_a_failed_gate_is_said(tmp_path: Path) -> None:
    assert "gates failed: kl_mean" in card.render(write_artifact(tmp_path / "tiny", passed=False))


def test_without_a_report_nothing_is_claimed(tmp_path: Path) -> None:
    assert "## Measured" not in card.render(write_artifact(tmp_path / "tiny"))


def test_how_to_run_it(tmp_path: Path) -> None:
    gguf = card.render(write_artifact(tmp_path / "gguf"))
    assert "llama-cli -m tiny-q8_0.gguf -c 2048 -fa on -ctk q8_0 -ctv q8_0\n" in gguf
    onnx = card.render(write_artifact(tmp_path / "onnx", "onnx"))
    code = onnx.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "pip install 'onnxruntime-genai>=0.9'" in onnx


def test_how_to_make_it_again() -> None:
    said = manifest("gguf")
    expected = (
        f"phi3edge export {REPOSITORY}@{REVISION} --target iphone --recipe q8_0 --format gguf --context 2048 "
        "--kv-cache q8_0 --method gptq"
    )
    assert card.command(said) == expected
    assert card.command(said | {"calibration": CALIBRATED}) == f"{expected} --calibration wiki.txt --sequences 48"
    own = CALIBRATED | {"text": "written by the model itself, seed 0"}
    assert card.command(said | {"calibration": own}) == f"{expected} --sequences 48"
    statistics = {"text": "wiki.txt", "sha256": None, "statistics": "imatrix.gguf"}
    assert card.command(said | {"calibration": statistics}) == f"{expected} --statistics imatrix.gguf"
    chosen = said | {"plan": said["plan"] | {"chosen": [{"name": "x"}]}, "target": "mine"}
    assert "--target mine.toml" in card.command(chosen)
    assert f"--budget {said['files'][0]['bytes']}" in card.command(chosen)


def test_the_calibration_text_is_named_with_its_hash(tmp_path: Path) -> None:
    text = card.render(write_artifact(tmp_path / "tiny", calibration=CALIBRATED))
    assert f"24576 tokens of wiki.txt (SHA-256 of its token ids: `{'c' * 64}`)" in text


def test_what_it_cannot_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"has no phi3edge\.json"):
        card.write(tmp_path)
    folder = write_artifact(tmp_path / "tiny")
    (folder / "report.json").write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(ConfigError, match="not a report of schema"):
        card.write(folder)
    assert not (folder / "README.md").exists()


def test_scores_of_tasks_beside_the_references(tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "tiny")
    score = {"metric": "acc", "artifact": {"value": 0.6789, "standard_error": 0.004}}
    task = {"name": "mmlu", "num_fewshot": 5, "documents": 100, "of": 14042}
    tasks = [
        task | {"scores": [score | {"reference": {"value": 0.688, "standard_error": None}}]},
        task | {"name": "arc", "documents": 14042, "num_fewshot": None, "scores": [score | {"reference": None}]},
    ]
    (folder / "eval.json").write_text(json.dumps({"tasks": tasks, "versions": {"lm-eval": "0.4.13"}}))
    text = card.render(folder)
    assert "| mmlu | 5 | 100 of 14042 | acc | 0.6789 | 0.0040 | 0.6880 |  |" in text
    assert "| arc |  | 14042 | acc | 0.6789 | 0.0040 |  |  |" in text
    assert "With lm-eval 0.4.13" in text
    (folder / "eval.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"eval\.json is not what phi3edge eval writes"):
        card.write(folder)
