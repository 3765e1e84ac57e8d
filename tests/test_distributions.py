"""What is kept of a distribution, and the divergence computed from it, against the whole."""

import numpy as np
import pytest

from phi3edge.distributions import DRAWN, TOP, Keeper, keep, log_softmax, open_kept


def rows(seed: int, count: int, vocabulary: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, vocabulary)).astype(np.float32) * scale


def exact_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    p, q = p.astype(np.float64), q.astype(np.float64)
    return (np.exp(p) * (p - q)).sum(-1)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3, 1.0])
def test_kl_is_that_of_the_whole_distributions_within_its_stated_error(noise: float) -> None:
    logits = rows(0, 400, 5000)
    p = log_softmax(logits)
    q = log_softmax(logits + noise * rows(1, 400, 5000, 1.0))
    kept = keep(p, np.random.default_rng(0))
    assert kept.rest.mean() > 0.05  # a good part of the mass is drawn from
    found, variance = kept.kl(q)
    assert (found >= 0).all()
    error = np.sqrt(variance.sum()) / len(found)
    assert abs(found.mean() - exact_kl(p, q).mean()) <= 4 * error + 2e-8
    if noise:
        assert error < 0.01 * found.mean()
        np.testing.assert_allclose(found, exact_kl(p, q), atol=6 * np.sqrt(variance.max()))


def test_the_top_alone_is_a_lower_bound() -> None:
    p, q = log_softmax(rows(0, 50, 3000)), log_softmax(rows(2, 50, 3000))
    kept = keep(p, np.random.default_rng(0))
    kept.rest[:] = kept.rest  # the same object that is used below
    top = type(kept)(kept.tokens[:, :TOP], kept.surprisals[:, :TOP], kept.rest)
    assert (top.kl(q)[0] < exact_kl(p, q)).all()
    assert (kept.kl(q)[0] > top.kl(q)[0]).all()


def test_another_seed_draws_otherwise_and_the_mean_of_many_is_exact() -> None:
    p, q = log_softmax(rows(0, 1, 4000, 1.0)), log_softmax(rows(2, 1, 4000, 1.0))
    found = [keep(p, np.random.default_rng(seed)).kl(q)[0][0] for seed in range(400)]
    assert len(set(found)) > 300
    assert np.mean(found) == pytest.approx(exact_kl(p, q)[0], abs=4 * np.std(found) / 20)


def test_a_small_vocabulary_is_kept_whole() -> None:
    p, q = log_softmax(rows(0, 20, TOP)), log_softmax(rows(1, 20, TOP))
    kept = keep(p, np.random.default_rng(0))
    assert kept.tokens.shape == (20, TOP)
    assert not kept.rest.any()
    found, variance = kept.kl(q)
    np.testing.assert_allclose(found, exact_kl(p, q), rtol=1e-3)
    assert not variance.any()


def test_tokens_without_mass_do_no_harm() -> None:
    logits = rows(0, 10, 1000)
    logits[:, 500:] = -np.inf  # a padded vocabulary
    p = log_softmax(logits)
    q = log_softmax(np.where(np.isinf(logits), -30.0, logits))
    kept = keep(p, np.random.default_rng(0))
    assert (kept.tokens < 500).all()
    assert (kept.kl(q)[0] < 1e-6).all()
    none = logits.copy()
    none[:, 0] = -np.inf
    assert np.isinf(kept.kl(log_softmax(none))[0][kept.tokens[:, :TOP].__eq__(0).any(-1)]).all()


def test_a_broken_artifact_has_no_figure() -> None:
    p = log_softmax(rows(0, 3, 1000))
    assert np.isnan(keep(p, np.random.default_rng(0)).kl(np.full((3, 1000), np.nan, np.float32))[0]).all()


def test_likeliest_tokens_and_their_probabilities() -> None:
    p = log_softmax(rows(0, 5, 1000))
    tokens, probabilities = keep(p, np.random.default_rng(0)).likeliest(4)
    np.testing.assert_array_equal(tokens, np.argsort(-p, -1)[:, :4])
    np.testing.assert_allclose(probabilities, np.exp(np.sort(p, -1)[:, :-5:-1]), rtol=3e-4)


@pytest.mark.parametrize(("vocabulary", "ids"), [(32064, np.uint16), (100_352, np.uint32)])
def test_files_take_a_kilobyte_a_token(tmp_path, vocabulary: int, ids: type) -> None:
    p = log_softmax(rows(0, 6, vocabulary))
    with Keeper(tmp_path, (2, 3), vocabulary) as keeper:
        first = keeper.add(p[:4])
        keeper.add(p[4:])
    kept = open_kept(tmp_path)
    assert kept.tokens.dtype == ids
    assert kept.tokens.shape == (2, 3, TOP + DRAWN)
    np.testing.assert_array_equal(kept.tokens.reshape(6, -1)[:4], first.tokens)
    np.testing.assert_array_equal(kept.top1, p.argmax(-1).reshape(2, 3))
    taken = sum(f.stat().st_size for f in tmp_path.iterdir()) - 3 * 128
    assert taken == 6 * ((TOP + DRAWN) * (2 + ids().itemsize) + 4)
