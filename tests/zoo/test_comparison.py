"""Intervals and differences of a small comparison against SciPy's bootstrap and against loops."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from zoo.comparison import RESAMPLES, Array, Comparison, bounds, draw, draw_seeds, tail_probability
from zoo.errors import UnknownNameError


@dataclass(frozen=True)
class Means(Comparison):
    """Means over units; one metric is undefined."""

    noun = "method"
    scores: dict[str, Array]
    draws: Array

    def names(self) -> Collection[str]:
        return self.scores

    def metric_names(self) -> list[str]:
        return ["mean", "nothing"]

    def main_names(self) -> list[str]:
        return ["mean"]

    def values(self, model: str, key: str) -> Array:
        self.check(model, key)
        return self.scores[model].mean(axis=1) * (1 if key == "mean" else np.nan)

    def resample(self, model: str, key: str) -> Array:
        self.check(model, key)
        return self.draws @ self.scores[model].T / len(self.draws[0]) * (1 if key == "mean" else np.nan)


@pytest.fixture
def means() -> Means:
    random = np.random.default_rng(3)
    scores = {"one": random.normal(1, 1, (1, 200)), "three": random.normal(0.8, 1, (3, 200))}
    return Means(scores, draw(200, random))


def test_an_interval_of_one_seed_is_scipys(means: Means) -> None:
    found = means.interval("one", "mean")
    expected = stats.bootstrap(means.scores["one"], np.mean, method="percentile", n_resamples=4000, rng=0)
    assert found.mean == pytest.approx(means.scores["one"].mean())
    assert found[1:] == pytest.approx(expected.confidence_interval, abs=0.02)


def test_a_difference_is_paired_in_units_and_free_in_seeds(means: Means) -> None:
    shifted = Means({**means.scores, "shifted": means.scores["one"] + 0.1}, means.draws)
    # The same units for both: the difference never varies.
    assert shifted.difference("shifted", "one", "mean") == pytest.approx((0.1, 0.1, 0.1, 2 / (1 + RESAMPLES)))
    mean, low, high, p_value = means.difference("one", "three", "mean")
    assert low < mean < high and mean == pytest.approx(means.scores["one"].mean() - means.scores["three"].mean())
    assert means.difference("three", "one", "mean").p_value == pytest.approx(p_value, abs=0.05)
    assert means.difference("one", "one", "mean") == (0, 0, 0, 1)


def test_tables(means: Means) -> None:
    rows = means.rows()
    assert [row["method"] for row in rows] == ["one", "three", "+- over 3 seeds"]
    assert rows[2]["mean"] == pytest.approx(means.values("three", "mean").std(ddof=1))
    assert list(rows[0]) == ["method", "mean"]
    (row,) = means.difference_rows("one", "three")
    assert row == {"metric": "mean", **means.difference("one", "three", "mean")._asdict()}
    found = means.all_metrics("one")
    assert list(found) == ["mean", "nothing", "three/mean", "three/nothing"]
    assert found["three/mean"] == means.metrics("three")["mean"]


def test_what_is_undefined_has_no_interval(means: Means) -> None:
    assert np.isnan(means.interval("three", "nothing")).all()
    assert np.isnan(means.difference("three", "one", "nothing")).all()
    some = np.array([np.nan, *np.arange(1001.0)])
    assert bounds(some) == pytest.approx((25, 975))
    assert tail_probability(some - 100) == pytest.approx(2 * (1 + 101) / 1002)


def test_draws(means: Means) -> None:
    assert means.draws.shape == (RESAMPLES, 200) and (means.draws.sum(axis=1) == 200).all()
    resampled = np.arange(12.0).reshape(4, 3)
    random, seeds = np.random.default_rng(5), np.random.default_rng(5).integers(3, size=(4, 3))
    expected = [np.mean([row[seed] for seed in of]) for row, of in zip(resampled, seeds, strict=True)]
    np.testing.assert_allclose(draw_seeds(resampled, random), expected)


def test_unknown_names(means: Means) -> None:
    with pytest.raises(UnknownNameError, match="method 'two'"):
        means.interval("two", "mean")
    with pytest.raises(UnknownNameError, match="metric 'median'"):
        means.difference("one", "three", "median")
