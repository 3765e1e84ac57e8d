"""A folder of lm-evaluation-harness tasks with local data: what a machine without a hub evaluates."""

import json
from pathlib import Path

import yaml

WORDS = (
    "the", "an", "in", "he", "ring", "sea", "paper", "moon", "stone", "river", "house", "green", "bread", "light",
    "winter", "ink", "tree",
)  # fmt: skip


def _word(n: int) -> str:
    return WORDS[n * 7 % len(WORDS)]


def _lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def write_tasks(folder: Path, questions: int = 12) -> Path:
    """Tasks choice, endings (several tokens each), answer (generated), text (rolling); group both, of the first two."""
    folder.mkdir()
    choices = [
        {
            "question": f"{_word(n)} and {_word(n + 1)} the {_word(n + 2)}",
            "endings": [f"{_word(n + k)} {_word(2 * n + k)}ing" for k in range(3)],
            "answer": n % 4,
            "ending": n % 3,
        }
        for n in range(questions + 4)
    ]
    data = {
        "train": _lines(folder / "train.jsonl", choices[:4]),
        "test": _lines(folder / "test.jsonl", choices[4:]),
    }
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data},
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "Question: {{question}}\nAnswer:",
    }
    accuracy = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    several = {"output_type": "multiple_choice", "num_fewshot": 2, "metric_list": accuracy}
    tasks = {
        "choice": common | several | {"doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "answer"},
        "endings": common | several | {"doc_to_choice": "{{endings}}", "doc_to_target": "ending"},
        "answer": common
        | {
            "output_type": "generate_until",
            "num_fewshot": 1,
            "doc_to_target": "{{endings[0]}}",
            "generation_kwargs": {"until": ["\n", "k"], "do_sample": False, "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
        "text": {
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {
                    "test": _lines(
                        folder / "text.jsonl",
                        [{"text": " ".join(_word(n * i) for i in range(40 + 30 * n))} for n in range(1, 5)],
                    )
                }
            },
            "test_split": "test",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
    }
    for name, content in tasks.items():
        write_task(folder, name, content)
    group = {"group": "both", "task": ["choice", "endings"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


def write_task(folder: Path, name: str, content: dict) -> None:
    """A task's YAML file."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "metadata": {"version": 1.5}, **content}))
