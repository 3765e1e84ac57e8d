"""The table of Phi-3-mini-4k's model card (and of arXiv 2404.14219), re-run on artifacts and their checkpoint.

Run: python bench/eval_table.py dist/phi-3-mini-iphone [more artifacts] [--limit 100] [--only mmlu,arc_easy]

Examples per prompt are the report's. Its prompts come from a pipeline of its own, and some of its tasks were answered
by generation where lm-evaluation-harness scores log-probabilities: expect the reference's column near the report's,
not on it. What an artifact loses is its difference from the reference beside it, with the error of paired questions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from phi3edge.evaluate import Estimate, Score, evaluate

TABLE = {  # task: examples, metric, filter, and what the model card of April 2024 says for mini-4k, in percent
    "mmlu": (5, "acc", "none", 68.8),
    "hellaswag": (5, "acc_norm", "none", 76.7),
    "gsm8k_cot": (8, "exact_match", "flexible-extract", 82.5),
    "arc_challenge": (10, "acc_norm", "none", 84.9),
    "arc_easy": (10, "acc_norm", "none", 94.6),
    "piqa": (5, "acc_norm", "none", 84.2),
}


def main() -> None:
    """Runs what is wanted, a task at a time, and prints a row for each task and artifact."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--checkpoint", help="default: what the manifests name")
    parser.add_argument("--only", help="tasks, with commas between")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    print("| task | examples | report | reference | artifact | difference | to wrong | to right |")
    print("|---|---|---|---|---|---|---|---|")
    for task in given.only.split(",") if given.only else TABLE:
        shots, metric, reading, published = TABLE[task]
        for artifact in given.artifacts:
            found, _ = evaluate(
                artifact,
                [task],
                given.checkpoint,
                reference=True,
                num_fewshot=shots,
                limit=given.limit,
                threads=given.threads,
                confirm=_tell,
            )
            scores = found.tasks[0].scores
            score = next(s for s in scores if (s.metric, s.filter) == (metric, reading))
            print(f"| {task} | {shots} | {published} | {_row(artifact.name, score)} |", flush=True)


def _row(name: str, score: Score) -> str:
    assert score.reference is not None
    assert score.difference is not None
    changed = [score.flips.to_wrong, score.flips.to_right] if score.flips else ["", ""]
    figures = (score.reference, score.artifact, score.difference)
    shown = [f"{100 * f.value:.1f} ± {100 * (f.standard_error or 0):.1f}" for f in figures]
    shown[1] = f"{name}: {shown[1]}"
    return " | ".join(map(str, (*shown, *changed)))


def _tell(estimates: list[Estimate]) -> None:
    for estimate in estimates:
        print(estimate, file=sys.stderr)


if __name__ == "__main__":
    main()
