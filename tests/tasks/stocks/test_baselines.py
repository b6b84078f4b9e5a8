"""Baselines against scikit-learn, pandas and SciPy, and what each of them may read."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.linear_model import Ridge

from tasks.stocks import baselines
from tasks.stocks.baselines import boosted_trees, low_volatility, ridge, stack, standardised_returns
from tasks.stocks.data import DayDataset, StocksDataModule
from tasks.stocks.evaluate import daily_rank_ic


@pytest.fixture(scope="module")
def module() -> StocksDataModule:
    """Every stock is suspended on some days, so that labels and places in the panel have holes."""
    data = StocksDataModule(
        source="generated", market={"days": 160, "stocks": 15}, features="alpha20", window=3, seed=1
    )
    data.setup()
    for dataset in (data.train_set, data.val_set, data.test_set):
        away = np.random.default_rng(2).random(dataset.universe.shape) < 0.1
        dataset.universe = dataset.universe & ~away
        dataset.labels[np.random.default_rng(3).random(dataset.labels.shape) < 0.1] = np.nan
        dataset.returns[np.isnan(dataset.labels)] = np.nan
    return data


@pytest.fixture
def parts(module: StocksDataModule) -> tuple[DayDataset, DayDataset, DayDataset]:
    return module.train_set, module.val_set, module.test_set


def rows(dataset: DayDataset, values: np.ndarray) -> np.ndarray:
    """Of all stock-days with a label, day by day."""
    return np.concatenate([values[day][dataset.universe[day] & ~np.isnan(dataset.labels[day])] for day in dataset.days])


def check_places(scores: np.ndarray, dataset: DayDataset) -> None:
    np.testing.assert_array_equal(np.isfinite(scores), dataset.universe[dataset.days])


def test_low_volatility_is_minus_the_deviation_of_twenty_returns(parts: Any) -> None:
    test = parts[2]
    scores = low_volatility(test)
    expected = -pd.DataFrame(test.panel.close).pct_change().rolling(20).std().to_numpy()
    check_places(scores, test)
    known = np.isfinite(scores)
    np.testing.assert_allclose(scores[known], expected[test.days][known], rtol=1e-6)


def sklearn_ridge(module: StocksDataModule, penalty: float, target: DayDataset) -> np.ndarray:
    scaled = module.scaler.apply(module.table.parts[0]).astype(np.float64)
    fitted = Ridge(penalty).fit(rows(module.train_set, scaled), rows(module.train_set, module.train_set.labels))
    scores = fitted.predict(scaled.reshape(-1, 20)).reshape(scaled.shape[:2]) - fitted.intercept_
    return np.where(target.universe, scores, np.nan)[target.days]


@pytest.mark.parametrize("penalty", [0.1, 30.0, 1e4])
def test_ridge_is_scikit_learns(module: StocksDataModule, parts: Any, penalty: float) -> None:
    scores = ridge(*parts, module.scaler, [penalty])
    check_places(scores, module.test_set)
    np.testing.assert_allclose(scores, sklearn_ridge(module, penalty, module.test_set), rtol=1e-4, atol=1e-7)


def test_the_penalty_is_chosen_by_validation_alone(module: StocksDataModule, parts: Any) -> None:
    penalties = [1e-2, 1.0, 1e2, 1e3, 1e4, 1e5]
    val = module.val_set
    quality = [
        np.nanmean(daily_rank_ic(sklearn_ridge(module, penalty, val), val.returns[val.days])) for penalty in penalties
    ]
    best = penalties[int(np.argmax(quality))]
    assert penalties[0] < best and len({round(value, 6) for value in quality}) > 3
    chosen = ridge(*parts, module.scaler, penalties)
    np.testing.assert_array_equal(chosen, ridge(*parts, module.scaler, [best]))


def test_targets_and_features_of_the_trees(module: StocksDataModule) -> None:
    train = module.train_set
    features, target = stack(train, lambda day: day.labels.numpy())
    np.testing.assert_array_equal(features, rows(train, module.table.parts[0]))
    np.testing.assert_allclose(target, rows(train, train.labels), rtol=1e-6)
    day = next(day for day in train if day.returns.isnan().any())
    expected = stats.zscore(day.returns.numpy(), ddof=1, nan_policy="omit")
    np.testing.assert_allclose(standardised_returns(day), expected, rtol=1e-4, atol=1e-6)
    day.returns[1:] = np.nan
    assert np.isnan(standardised_returns(day)).all()


def test_without_lightgbm_the_way_to_get_it(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ImportError, match=r"moe-zoo\[lightgbm\]"):
        boosted_trees(*parts)


def test_trees_are_told_qlibs_parameters_and_stop_on_validation(
    module: StocksDataModule, parts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for LightGBM, which is an extra."""
    told: dict[str, Any] = {}

    def train(parameters: dict[str, Any], learned: Any, rounds: int, *, valid_sets: list[Any], callbacks: list[Any]):
        told.update(parameters, learned=learned, valid_sets=valid_sets, callbacks=callbacks)
        return SimpleNamespace(best_iteration=7, predict=lambda x, num_iteration: num_iteration * x[:, 0])

    fake = SimpleNamespace(
        Dataset=lambda x, y, reference=None: (x, y), early_stopping=lambda rounds, verbose: rounds, train=train
    )
    monkeypatch.setitem(sys.modules, "lightgbm", fake)
    scores = boosted_trees(*parts, label="rank", learning_rate=0.05, seed=3)
    assert told["learning_rate"] == 0.05 and told["seed"] == 3 and told["num_leaves"] == 210
    assert told["callbacks"] == [baselines.PATIENCE]
    np.testing.assert_allclose(told["learned"][1], rows(module.train_set, module.train_set.labels), rtol=1e-6)
    np.testing.assert_array_equal(told["valid_sets"][0][0], rows(module.val_set, module.table.parts[0]))
    check_places(scores, module.test_set)
    expected = 7 * module.table.parts[0][module.test_set.days, :, 0]
    np.testing.assert_allclose(scores[np.isfinite(scores)], expected[np.isfinite(scores)])


@pytest.mark.parametrize("label", ["zscore", "rank"])
def test_trees_find_what_is_planted(label: str) -> None:
    pytest.importorskip("lightgbm", reason="the extra lightgbm is not installed")
    data = StocksDataModule(source="generated", market={"days": 220, "stocks": 60}, window=1, seed=1)
    data.setup()
    parts = data.train_set, data.val_set, data.test_set
    scores = boosted_trees(*parts, label=label, learning_rate=0.1)
    check_places(scores, data.test_set)
    quality = daily_rank_ic(scores, data.test_set.returns[data.test_set.days])
    assert np.nanmean(quality) > 0.05
    np.testing.assert_array_equal(boosted_trees(*parts, label=label, learning_rate=0.1), scores)
