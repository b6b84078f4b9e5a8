"""What MIGA is compared with: ridge regression, boosted trees, and minus the volatility, which learns nothing.

Each gives scores `(days, stocks)` for the days of a dataset, NaN where a stock is not in the day's batch. All read the
features of the day itself. The networks among the baselines are `Miga(mixture=False)`: with `encoder="gru"` a GRU, with
`window=1` a residual MLP.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.stocks.data import Day, DayDataset
from tasks.stocks.evaluate import daily_rank_ic, style_exposures
from tasks.stocks.features import Features
from tasks.stocks.panel import Array, RobustScaler

PENALTIES = (1e2, 1e3, 1e4, 1e5, 1e6)
# Qlib's examples/benchmarks/LightGBM, Alpha158.
QLIB_TREES = {
    "objective": "mse",
    "colsample_bytree": 0.8879,
    "subsample": 0.8789,
    "lambda_l1": 205.6999,
    "lambda_l2": 580.9768,
    "max_depth": 8,
    "num_leaves": 210,
}
QLIB_LEARNING_RATE = 0.2
MAX_TREES = 1000
PATIENCE = 50


def low_volatility(test: DayDataset) -> Array:
    """Minus the volatility of 20 days: calm stocks first.

    Args:
        test: The days to score.
    """
    scores = -style_exposures(test.panel)[0]
    return np.where(test.universe, scores, np.nan)[test.days]


def ridge(
    train: DayDataset,
    val: DayDataset,
    test: DayDataset,
    scaler: RobustScaler,
    penalties: Sequence[float] = PENALTIES,
) -> Array:
    """Ridge regression of the ranked labels on scaled features; the penalty with the best RankIC on validation wins.

    The squared error is summed, not averaged, over stock-days, and the intercept is not penalised.

    Args:
        train: The days to learn from.
        val: The days to choose the penalty on.
        test: The days to score.
        scaler: Of the features.
        penalties: Candidates.
    """
    design, target = moments(train, scaler)
    candidates = [solve_ridge(design, target, penalty) for penalty in penalties]

    def quality(weight: Array) -> float:
        ranked = daily_rank_ic(score_days(val, lambda day: scaled(day, scaler) @ weight), val.returns[val.days])
        return float(np.nanmean(ranked))

    best = max(candidates, key=quality)
    return score_days(test, lambda day: scaled(day, scaler) @ best)


def moments(dataset: DayDataset, scaler: RobustScaler) -> tuple[Array, Array]:
    """Sums over the labelled stock-days, from which any ridge regression follows.

    Args:
        dataset: The days.
        scaler: Of the features.

    Returns:
        Covariance of the features times the number of stock-days, `(F, F)`, and that with the labels, `(F,)`.
    """
    size = len(dataset.table.names) + 2
    total = np.zeros((size, size))
    for index in range(len(dataset)):
        day = dataset.day(index, 1)
        labels = day.labels.numpy()
        known = np.isfinite(labels)
        rows = np.column_stack([scaled(day, scaler), labels, np.ones(len(labels))])[known].astype(np.float64)
        total += rows.T @ rows
    sums = total[-1, :-1]
    centred = total[:-1, :-1] - np.outer(sums, sums) / total[-1, -1]
    return centred[:-1, :-1], centred[:-1, -1]


def solve_ridge(design: Array, target: Array, penalty: float) -> Array:
    """Weights `(F,)` from `moments`.

    Args:
        design: `(F, F)`.
        target: `(F,)`.
        penalty: Above zero.
    """
    return np.linalg.solve(design + penalty * np.eye(len(target)), target)


def boosted_trees(
    train: DayDataset,
    val: DayDataset,
    test: DayDataset,
    label: Literal["zscore", "rank"] = "zscore",
    learning_rate: float = QLIB_LEARNING_RATE,
    seed: int = 0,
    threads: int = 1,
) -> Array:
    """LightGBM on features as computed, with Qlib's parameters, stopped when validation no longer improves.

    Args:
        train: The days to learn from.
        val: The days to stop on.
        test: The days to score.
        label: What is learned: the day's returns as z-scores, Qlib's choice here, or their ranks.
        learning_rate: Weight of each tree; Qlib's is 0.2, with ranks 0.05 is better.
        seed: Of the columns and rows that a tree sees.
        threads: Processor cores.

    Raises:
        ImportError: LightGBM is not installed.
    """
    try:
        import lightgbm
    except ImportError as error:
        raise ImportError("Boosted trees need LightGBM: pip install 'moe-zoo[lightgbm]'.") from error
    parameters: dict[str, Any] = QLIB_TREES | {
        "learning_rate": learning_rate,
        "seed": seed,
        "num_threads": threads,
        "deterministic": True,
        "force_row_wise": True,
        "verbosity": -1,
    }
    target = TARGETS[label]
    learned = lightgbm.Dataset(*stack(train, target))
    checked = lightgbm.Dataset(*stack(val, target), reference=learned)
    stop = lightgbm.early_stopping(PATIENCE, verbose=False)
    trees = lightgbm.train(parameters, learned, MAX_TREES, valid_sets=[checked], callbacks=[stop])
    return score_days(test, lambda day: trees.predict(latest(day), num_iteration=trees.best_iteration))


def standardised_returns(day: Day) -> NDArray[np.float32]:
    """Z-scores of a day's returns, `(N,)` (CSZScoreNorm of Qlib)."""
    returns = day.returns.numpy()
    known = returns[np.isfinite(returns)]
    return (returns - known.mean()) / known.std(ddof=1) if len(known) > 1 else np.full_like(returns, np.nan)


TARGETS: dict[str, Callable[[Day], NDArray[np.float32]]] = {
    "zscore": standardised_returns,
    "rank": lambda day: day.labels.numpy(),
}


def stack(dataset: DayDataset, target: Callable[[Day], NDArray[np.float32]]) -> tuple[Features, NDArray[np.float32]]:
    """Features `(samples, F)` and targets `(samples,)` of all stock-days that have a target."""
    days = [dataset.day(index, 1) for index in range(len(dataset))]
    targets = [target(day) for day in days]
    known = [np.isfinite(values) for values in targets]
    rows = [latest(day)[keep] for day, keep in zip(days, known, strict=True)]
    return np.concatenate(rows), np.concatenate([values[keep] for values, keep in zip(targets, known, strict=True)])


def score_days(dataset: DayDataset, score: Callable[[Day], Array]) -> Array:
    """Scores `(days, stocks)` of a dataset's days.

    Args:
        dataset: The days.
        score: Maps a day, with a window of 1, to its scores `(N,)`.
    """
    scores = np.full((len(dataset), len(dataset.panel.symbols)), np.nan)
    for index in range(len(dataset)):
        day = dataset.day(index, 1)
        scores[index, day.positions.numpy()] = score(day)
    return scores


def latest(day: Day) -> Features:
    """The day's own features, `(N, F)`."""
    features: Features = day.features[:, -1].numpy()
    return features


def scaled(day: Day, scaler: RobustScaler) -> Features:
    """The same, scaled."""
    return scaler.apply(latest(day))
