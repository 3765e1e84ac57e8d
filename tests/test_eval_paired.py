import math

import numpy as np
import pytest

from phi3edge.paired import Figure, Flips, difference, figure, flips, mean, weighted


def perplexity(values) -> float:
    return math.exp(-sum(v for v, _ in values) / sum(w for _, w in values))


def test_a_mean_and_its_error() -> None:
    found = figure([1, 0, 1, 1], mean)
    assert found.value == 0.75
    assert found.standard_error == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)
    assert figure([1.0], mean).standard_error is None


def test_a_difference_is_of_pairs() -> None:
    ours, theirs = [1, 1, 0, 1, 0], [1, 1, 0, 0, 0]
    found = difference(ours, theirs, mean)
    assert found.value == pytest.approx(0.2)
    assert found.standard_error == pytest.approx(np.std([0, 0, 0, 1, 0], ddof=1) / math.sqrt(5))
    alike = difference(ours, ours, mean)
    assert (alike.value, alike.standard_error) == (0, 0)


def test_the_error_of_a_mean_by_leaving_one_out_is_the_usual_one() -> None:
    values = np.random.default_rng(0).normal(size=50).tolist()
    by_leaving_out = figure(values, lambda kept: sum(kept) / len(kept))
    assert by_leaving_out.standard_error == pytest.approx(figure(values, mean).standard_error)


def test_the_error_of_a_perplexity_is_its_spread_over_samples() -> None:
    random = np.random.default_rng(0)

    def sample(shift: float, words: np.ndarray, noise: np.ndarray) -> list[tuple[float, int]]:
        return [(-(2 + shift + n) * w, int(w)) for w, n in zip(words, noise, strict=True)]

    values, differences, errors = [], [], []
    for _ in range(200):
        words, noise, own = random.integers(50, 150, 300), random.normal(0, 0.3, 300), random.normal(0, 0.02, 300)
        ours, theirs = sample(0.1, words, noise + own), sample(0, words, noise)
        values.append(perplexity(ours))
        differences.append(perplexity(ours) - perplexity(theirs))
        if len(errors) < 3:
            errors.append(
                (figure(ours, perplexity).standard_error, difference(ours, theirs, perplexity).standard_error)
            )
    alone, paired = np.mean(errors, axis=0)
    assert alone == pytest.approx(np.std(values), rel=0.25)
    assert paired == pytest.approx(np.std(differences), rel=0.25)
    assert paired < alone / 3


def test_flips() -> None:
    found = flips([1.0, 0, 1, 0, True], [1, 1, 0, 0, True])
    assert found == Flips(questions=5, to_wrong=1, to_right=1)
    assert found + found == Flips(questions=10, to_wrong=2, to_right=2)
    assert flips([0.5, 1], [1, 1]) is None


def test_a_weighted_mean_of_independent_figures() -> None:
    parts = [Figure(value=0.5, standard_error=0.1), Figure(value=0.8, standard_error=0.2)]
    found = weighted(parts, [300, 100])
    assert found.value == pytest.approx(0.575)
    assert found.standard_error == pytest.approx(math.hypot(0.075, 0.05))
    assert weighted([parts[0], Figure(value=1, standard_error=None)], [1, 1]).standard_error is None
