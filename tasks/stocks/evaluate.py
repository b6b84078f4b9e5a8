"""How good scores of stocks are: correlations with returns, a backtest, intervals, and what the experts specialise in.

All models are scored on the same days against the raw label. An IC says how well a day's scores agree with the day's
returns; since one year is a small sample, every mean comes with an interval, and two models are compared day by day.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.stocks.backtest import PERCENT, QLIB_RULES, YEAR, Days, TopkDropout, backtest, check_days
from tasks.stocks.panel import Array, Dates, Mask, Panel, forward_returns
from zoo.errors import UnknownNameError

# A correlation over fewer stocks is not counted.
MIN_STOCKS = 10
# Values whose range is this share of their size are equal up to float32's rounding.
FLAT = 1e-6
VOLATILITY_DAYS = 20
RETURN_DAYS = (1, 5, 20)
STYLE_NAMES = (f"volatility of {VOLATILITY_DAYS} days", *(f"return of {days} days" for days in RETURN_DAYS))
# Days between the score and the start of a return; that of the label is 1.
HORIZONS = tuple(range(-3, 8))
LABEL_HORIZON = HORIZONS.index(1)
# A difference in IC that means nothing between models of one year.
NOISE = 0.01
# No honest daily score comes near it; published models reach .05.
IMPLAUSIBLE_IC = 0.3
# Returns of one stock and styles persist for days, so days are drawn in blocks.
BLOCK_DAYS = 10
RESAMPLES = 2000

# What an interval can be given for: by metric, the daily series and what a mean of it is multiplied by.
MEANS = {
    "IC": ("IC", 1),
    "RankIC": ("RankIC", 1),
    "neutral_RankIC": ("neutral_RankIC", 1),
    "excess_AR": ("excess", YEAR * PERCENT),
    "excess_AR_cost": ("excess_cost", YEAR * PERCENT),
}

Row = dict[str, Any]


class Interval(NamedTuple):
    """A mean and the 95 % bootstrap interval around it; the bounds are NaN over fewer than two blocks of days."""

    mean: float
    low: float
    high: float


class Alarm(NamedTuple):
    """Whether the ICs by horizon look like those of a score that has seen the future, and why, in a sentence."""

    suspicious: bool
    words: str


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Market:
    """What scores are held against.

    Attributes:
        panel: The bars.
        members: `(days, stocks)`: who is ranked and may be bought.
        labels: `(days, stocks)` raw returns, NaN where unknown.
        styles: `(4, days, stocks)` of `style_exposures`.
        days: `(scored days,)` consecutive positions in the panel.
    """

    panel: Panel
    members: Mask
    labels: Array
    styles: Array
    days: Days

    def __post_init__(self) -> None:
        check_days(self.days, self.panel)
        shape = self.panel.close.shape
        found = {name: getattr(self, name).shape[-2:] for name in ("members", "labels", "styles")}
        if set(found.values()) != {shape}:
            raise ValueError(f"A market of {shape[0]} days and {shape[1]} stocks holds arrays of the shapes {found}.")

    @classmethod
    def of(cls, panel: Panel, members: Mask, days: Days) -> "Market":
        """The market of some days.

        Args:
            panel: The bars, those before and after the days included.
            members: `(panel's days, stocks)`.
            days: Positions of the days to score, one span of `split_days`.

        Raises:
            ValueError: The days are not consecutive, or too late in the panel.
        """
        return cls(panel, members, forward_returns(panel), style_exposures(panel), days)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ModelEvaluation:
    """One model's results, seed by seed.

    Attributes:
        daily: `(seeds, days)` by series: IC, RankIC, neutral_RankIC, excess, excess_cost and turnover. A day on which a
            correlation is undefined is NaN.
        metrics: `(seeds,)` by name: IC, ICIR, RankIC, RankICIR, neutral_RankIC, excess_AR, excess_AR_cost, IR_cost,
            MDD_cost, turnover, coverage (percent of the members with a label that have a score) and days (those with
            an IC).
        horizon_ic: `(horizons, days)` IC with the return at each of `HORIZONS`, the mean over seeds.
    """

    daily: dict[str, Array]
    metrics: dict[str, Array]
    horizon_ic: Array


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Evaluation:
    """Results of several models on the same days.

    Attributes:
        dates: `(days,)` of the scores.
        models: By name.
    """

    dates: Dates
    models: dict[str, ModelEvaluation]

    def metrics(self, model: str) -> dict[str, float]:
        """A model's metrics, means over its seeds.

        Args:
            model: Its name.
        """
        return {name: float(values.mean()) for name, values in self._find(model).metrics.items()}

    def rows(self) -> list[Row]:
        """All metrics as a table: one row per model and, where there are several seeds, one of their deviation."""
        rows: list[Row] = []
        for name, model in self.models.items():
            rows.append({"model": name, **self.metrics(name)})
            seeds = len(model.metrics["IC"])
            if seeds > 1:
                spread = {key: float(values.std(ddof=1)) for key, values in model.metrics.items()}
                rows.append({"model": f"+- over {seeds} seeds", **spread})
        return rows

    def intervals(self, model: str) -> list[Row]:
        """A model's means with their 95 % intervals over days and seeds.

        Args:
            model: Its name.
        """
        daily = self._find(model).daily
        return [
            {"metric": metric, **mean_interval(scale * daily[series])._asdict()}
            for metric, (series, scale) in MEANS.items()
        ]

    def differences(self, first: str, second: str) -> list[Row]:
        """How much a model is above another on the same days, with 95 % intervals over days and seeds.

        Args:
            first: A model.
            second: The other.
        """
        ours, theirs = self._find(first).daily, self._find(second).daily
        return [
            {"metric": metric, **difference_interval(scale * ours[series], scale * theirs[series])._asdict()}
            for metric, (series, scale) in MEANS.items()
        ]

    def series(self, name: str) -> dict[str, Array]:
        """One daily series of every model, the mean over seeds: what the plots draw.

        Args:
            name: As in `ModelEvaluation.daily`.

        Returns:
            `(days,)` by model.
        """
        return {model: result.daily[name].mean(axis=0) for model, result in self.models.items()}

    def _find(self, model: str) -> ModelEvaluation:
        if model not in self.models:
            raise UnknownNameError("model", model, self.models)
        return self.models[model]


def evaluate_scores(scores: Mapping[str, Array], market: Market, rules: TopkDropout = QLIB_RULES) -> Evaluation:
    """Score models on the same days.

    Args:
        scores: By model `(days, stocks)`, or `(seeds, days, stocks)` to score each seed by itself; NaN where there is
            none.
        market: What to hold them against.
        rules: Of the backtest.

    Raises:
        ValueError: Scores do not have the market's shape, or are infinite.
    """
    ahead = [forward_returns(market.panel, horizon)[market.days] for horizon in HORIZONS]
    models = {}
    for name, table in scores.items():
        seeds = [_evaluate_seed(seed, market, ahead, rules) for seed in _check_scores(name, table, market)]
        daily, metrics, horizons = zip(*seeds, strict=True)
        models[name] = ModelEvaluation(_stack(daily), _stack(metrics), np.mean(horizons, axis=0))
    return Evaluation(market.panel.dates[market.days], models)


def average_scores(scores: Array) -> Array:
    """One score of several seeds: the mean of their scores, brought to the same mean and scale within each day.

    Args:
        scores: `(seeds, days, stocks)`, of any scale; NaN where any seed has none.

    Returns:
        `(days, stocks)`.
    """
    valid = np.isfinite(scores).all(axis=0)
    return np.where(valid, np.mean([_standardise(seed, valid) for seed in scores], axis=0), np.nan)


def daily_ic(scores: Array, labels: Array) -> Array:
    """Pearson's correlation of each day's scores and labels.

    Args:
        scores: `(days, stocks)`; a stock counts where it has both a score and a label.
        labels: The same.

    Returns:
        `(days,)`, NaN on days with fewer than `MIN_STOCKS` such stocks or a constant on either side.
    """
    valid = _comparable(scores, labels)
    product = _standardise(scores, valid) * _standardise(labels, valid)
    count = valid.sum(axis=1)
    return np.where(count, product.sum(axis=1) / np.maximum(count, 1), np.nan)


def daily_rank_ic(scores: Array, labels: Array) -> Array:
    """Spearman's correlation of each day's scores and labels; ties share their mean rank.

    Args:
        scores: As `daily_ic`.
        labels: The same.

    Returns:
        As `daily_ic`.
    """
    valid = _comparable(scores, labels)
    return daily_ic(_rank(scores, valid), _rank(labels, valid))


def neutralise(scores: Array, styles: Array) -> Array:
    """What of each day's scores a linear regression on styles, with an intercept, does not explain.

    Args:
        scores: `(days, stocks)`.
        styles: `(styles, days, stocks)`.

    Returns:
        `(days, stocks)`, NaN where the score or a style is missing, and on days of which nothing is left.
    """
    valid = np.isfinite(scores) & np.isfinite(styles).all(axis=0)
    centred = _centre(scores, valid)
    columns = np.stack([_standardise(style, valid) for style in styles], axis=-1)
    across = columns.transpose(0, 2, 1)
    weights = np.linalg.pinv(across @ columns, rcond=1e-10, hermitian=True) @ (across @ centred[..., None])
    residual = centred - (columns @ weights)[..., 0]
    left = np.linalg.norm(residual, axis=1) > FLAT * np.linalg.norm(centred, axis=1)
    return np.where(valid & left[:, None], residual, np.nan)


def style_exposures(panel: Panel) -> Array:
    """The styles that a score should not merely restate, as known at each close.

    A suspension repeats the last price: its days count as days without a move.

    Args:
        panel: The bars.

    Returns:
        `(4, days, stocks)`, in the order of `STYLE_NAMES`: the standard deviation of 20 daily returns, and the returns
        over 1, 5 and 20 days; NaN where the stock is not traded or its prices do not reach back so far.
    """
    import pandas as pd

    known = pd.DataFrame(panel.close).ffill()
    volatility = known.pct_change(fill_method=None).rolling(VOLATILITY_DAYS).std()
    returns = (known.pct_change(days, fill_method=None) for days in RETURN_DAYS)
    return np.where(panel.traded, np.stack([volatility, *returns]), np.nan)


def horizon_name(horizon: int) -> str:
    """The two days that a return lies between, `t-1 to t`, where t is the day of the score.

    Args:
        horizon: Days between the score and the start of the return.
    """
    return " to ".join(f"t{day:+}" if day else "t" for day in (horizon, horizon + 1))


def horizon_alarm(ic: Array) -> Alarm:
    """Judge the ICs by horizon: has the score seen its label, or does it repeat returns that came before it?

    Args:
        ic: `(horizons, days)` of `ModelEvaluation.horizon_ic`.
    """
    intervals = [mean_interval(row) for row in ic]
    label = intervals[LABEL_HORIZON].mean
    if label > IMPLAUSIBLE_IC:
        return Alarm(True, f"IC {label:.3f} with the label is beyond any honest score: it has probably seen the label.")
    earlier = {
        horizon: interval.mean
        for horizon, interval, row in zip(HORIZONS, intervals, ic, strict=True)
        if horizon <= 0 and difference_interval(row, ic[LABEL_HORIZON]).low > NOISE
    }
    if earlier:
        worst = max(earlier, key=earlier.__getitem__)
        return Alarm(
            True,
            f"IC {earlier[worst]:.3f} with the return from {horizon_name(worst)} is clearly above IC {label:.3f} with "
            "the label, from t+1 to t+2: unless the score follows past returns on purpose, it is shifted in time.",
        )
    return Alarm(False, f"IC {label:.3f} with the label; with no earlier return is it clearly higher.")


def mean_interval(values: Array, seed: int = 0) -> Interval:
    """A mean with its 95 % interval, by a moving-block bootstrap over days and one over seeds.

    Args:
        values: `(days,)` or `(seeds, days)`; a day that is NaN in any seed is left out.
        seed: Of the resampling.
    """
    return difference_interval(values, np.zeros(values.shape[-1]), seed)


def difference_interval(first: Array, second: Array, seed: int = 0) -> Interval:
    """The mean of one model's days less another's, as `mean_interval`: days are drawn for both, seeds for each.

    Args:
        first: `(days,)` or `(seeds, days)`.
        second: The same days; another number of seeds is allowed.
        seed: Of the resampling.
    """
    first, second = np.atleast_2d(first), np.atleast_2d(second)
    both = np.isfinite(first).all(axis=0) & np.isfinite(second).all(axis=0)
    days = int(both.sum())
    mean = float(first[:, both].mean() - second[:, both].mean()) if days else np.nan
    if days < 2 * BLOCK_DAYS:
        return Interval(mean, np.nan, np.nan)
    random = np.random.default_rng(seed)
    weights = _draw_days(days, random)
    resampled = _resample(first[:, both], weights, random) - _resample(second[:, both], weights, random)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Interval(mean, float(low), float(high))


def routing_agreement(expert_weight: Array, groups: int, styles: NDArray[np.integer]) -> float:
    """How well the group of experts that weighs most tells a sample's style, as normalised mutual information.

    Args:
        expert_weight: `(samples, experts)`, the experts of a group side by side.
        groups: Their number.
        styles: `(samples,)` the planted style of each.

    Returns:
        0 (unrelated, or one group alone is used) to 1 (each determines the other); normalised by the mean of the two
        entropies.

    Raises:
        ValueError: The groups do not divide the experts.
    """
    samples, experts = expert_weight.shape
    if groups < 1 or experts % groups:
        raise ValueError(f"{experts} experts cannot be divided into {groups} equal groups.")
    chosen = expert_weight.reshape(samples, groups, -1).sum(axis=2).argmax(axis=1)
    table = np.zeros((groups, int(styles.max()) + 1))
    np.add.at(table, (chosen, styles), 1 / samples)
    of_groups, of_styles = _entropy(table.sum(axis=1)), _entropy(table.sum(axis=0))
    shared = of_groups + of_styles - _entropy(table.ravel())
    return float(2 * shared / (of_groups + of_styles)) if of_groups and of_styles else 0.0


def mean_usage(weights: Array, labels: Iterable[Any]) -> dict[str, Array]:
    """Mean weight of each expert or group by month, industry or whatever else labels the samples.

    Args:
        weights: `(samples, experts or groups)`.
        labels: One for each sample, in an order that can be sorted.

    Returns:
        `(experts or groups,)` by label, sorted.
    """
    names, of = np.unique(np.asarray(labels), return_inverse=True)
    totals = np.zeros((len(names), weights.shape[1]))
    np.add.at(totals, of, weights)
    return dict(zip(map(str, names), totals / np.bincount(of)[:, None], strict=True))


def _check_scores(name: str, scores: Array, market: Market) -> Array:
    """`(seeds, days, stocks)`."""
    shape = len(market.days), len(market.panel.symbols)
    if scores.ndim not in (2, 3) or scores.shape[-2:] != shape:
        raise ValueError(
            f"The scores of {name!r} have the shape {scores.shape}; expected (days, stocks) = {shape}, seeds before it."
        )
    if np.isinf(scores).any():
        raise ValueError(f"The scores of {name!r} hold infinite values. Write NaN where there is no score.")
    return scores.reshape(-1, *shape).astype(np.float64)


def _evaluate_seed(
    scores: Array, market: Market, ahead: list[Array], rules: TopkDropout
) -> tuple[dict[str, Array], dict[str, float], Array]:
    members, labels = market.members[market.days], market.labels[market.days]
    scores = np.where(members, scores, np.nan)
    traded = backtest(scores, market.panel, market.members, market.days, rules)
    daily = {
        "IC": daily_ic(scores, labels),
        "RankIC": daily_rank_ic(scores, labels),
        "neutral_RankIC": daily_rank_ic(neutralise(scores, market.styles[:, market.days]), labels),
        "excess": traded.excess,
        "excess_cost": traded.excess_cost,
        "turnover": traded.turnover,
    }
    ic, icir = _mean_and_ratio(daily["IC"])
    rank_ic, rank_icir = _mean_and_ratio(daily["RankIC"])
    labelled = members & np.isfinite(labels)
    metrics = {
        "IC": ic,
        "ICIR": icir,
        "RankIC": rank_ic,
        "RankICIR": rank_icir,
        "neutral_RankIC": _mean_and_ratio(daily["neutral_RankIC"])[0],
        **traded.summary(),
        "coverage": float(np.isfinite(scores[labelled]).sum() / max(labelled.sum(), 1) * PERCENT),
        "days": float(np.isfinite(daily["IC"]).sum()),
    }
    return daily, metrics, np.stack([daily_ic(scores, returns) for returns in ahead])


def _stack(seeds: Iterable[Mapping[str, Any]]) -> dict[str, Array]:
    seeds = list(seeds)
    return {name: np.stack([seed[name] for seed in seeds]) for name in seeds[0]}


def _mean_and_ratio(values: Array) -> tuple[float, float]:
    """The mean of the days that have a value, and that over their standard deviation."""
    values = values[np.isfinite(values)]
    mean = float(values.mean()) if len(values) else np.nan
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return mean, mean / spread if spread else np.nan


def _comparable(scores: Array, labels: Array) -> Mask:
    """`(days, stocks)`: where there are both, on days that have a correlation."""
    valid = np.isfinite(scores) & np.isfinite(labels)
    enough = valid.sum(axis=1) >= MIN_STOCKS
    return valid & (enough & ~_is_flat(scores, valid) & ~_is_flat(labels, valid))[:, None]


def _centre(values: Array, valid: Mask) -> Array:
    """Less the day's mean over the valid stocks; 0 for the others."""
    count = np.maximum(valid.sum(axis=1, keepdims=True), 1)
    values = np.where(valid, values, 0)
    return np.where(valid, values - values.sum(axis=1, keepdims=True) / count, 0)


def _standardise(values: Array, valid: Mask) -> Array:
    """Mean 0 and standard deviation 1 over the day's valid stocks; 0 for the others and for a constant."""
    centred = _centre(values, valid)
    count = np.maximum(valid.sum(axis=1, keepdims=True), 1)
    deviation = np.sqrt((centred**2).sum(axis=1, keepdims=True) / count)
    return np.where(_is_flat(values, valid)[:, None], 0, centred / np.where(deviation > 0, deviation, 1))


def _is_flat(values: Array, valid: Mask) -> Mask:
    """`(days,)`: whether the valid values are all the same, or there is none."""
    highest = np.where(valid, values, -np.inf).max(axis=1)
    lowest = np.where(valid, values, np.inf).min(axis=1)
    return highest - lowest <= FLAT * np.maximum(np.abs(highest), np.abs(lowest))


def _rank(values: Array, valid: Mask) -> Array:
    import pandas as pd

    return np.asarray(pd.DataFrame(np.where(valid, values, np.nan)).rank(axis=1))


def _draw_days(days: int, random: np.random.Generator) -> Array:
    """`(RESAMPLES, days)` weight of each day in the means of moving blocks."""
    blocks = -(-days // BLOCK_DAYS)
    starts = random.integers(days - BLOCK_DAYS + 1, size=(RESAMPLES, blocks, 1))
    drawn = (starts + np.arange(BLOCK_DAYS)).reshape(RESAMPLES, -1)[:, :days]
    cells = drawn + days * np.arange(RESAMPLES)[:, None]
    return np.bincount(cells.ravel(), minlength=RESAMPLES * days).reshape(RESAMPLES, days) / days


def _resample(values: Array, weights: Array, random: np.random.Generator) -> Array:
    """`(RESAMPLES,)` means of `(seeds, days)` over the drawn days and, each time, as many drawn seeds."""
    means = weights @ values.T
    seeds = random.integers(len(values), size=means.shape)
    return np.take_along_axis(means, seeds, axis=1).mean(axis=1)


def _entropy(shares: Array) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
