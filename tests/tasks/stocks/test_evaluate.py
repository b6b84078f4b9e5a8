"""ICs against SciPy, residuals against least squares, intervals, the alarm, NMI against scikit-learn, the whole."""

import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import normalized_mutual_info_score

from tasks.stocks.backtest import TopkDropout
from tasks.stocks.evaluate import (
    BLOCK_DAYS,
    HORIZONS,
    MIN_STOCKS,
    Market,
    average_scores,
    daily_ic,
    daily_rank_ic,
    difference_interval,
    evaluate_scores,
    horizon_alarm,
    horizon_name,
    mean_interval,
    mean_usage,
    neutralise,
    routing_agreement,
    style_exposures,
)
from tasks.stocks.panel import BARS, Panel, generate_market
from zoo.errors import UnknownNameError

KEYS = (
    *("IC", "ICIR", "RankIC", "RankICIR", "neutral_RankIC"),
    *("excess_AR", "excess_AR_cost", "IR_cost", "MDD_cost", "turnover", "coverage", "days"),
)
RULES = TopkDropout(topk=10, n_drop=2)


@pytest.fixture(scope="module")
def generated():
    return generate_market(days=160, stocks=60)


@pytest.fixture(scope="module")
def market(generated) -> Market:
    members = np.ones(generated.panel.close.shape, dtype=bool)
    members[:, 50:] = False
    return Market.of(generated.panel, members, np.arange(40, 150))


def holed(shape, seed: int, ties: bool = False, missing: float = 0.1):
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape)
    values = values.round(1) if ties else values
    values[random.random(shape) < missing] = np.nan
    return values


@pytest.mark.parametrize(
    ("ours", "reference"), [(daily_ic, stats.pearsonr), (daily_rank_ic, stats.spearmanr)], ids=["IC", "RankIC"]
)
@pytest.mark.parametrize("ties", [False, True])
def test_daily_correlations_are_scipys(ours, reference, ties) -> None:
    scores, labels = holed((20, 40), 0, ties), 0.02 * holed((20, 40), 1, ties)
    found = ours(scores, labels)
    for day in range(20):
        both = np.isfinite(scores[day]) & np.isfinite(labels[day])
        assert found[day] == pytest.approx(reference(scores[day, both], labels[day, both]).statistic, abs=1e-12)


@pytest.mark.parametrize("ours", [daily_ic, daily_rank_ic])
def test_days_without_a_correlation_are_nan(ours) -> None:
    scores, labels = holed((7, 30), 0, missing=0), holed((7, 30), 1, missing=0)
    scores[1] = 3.7
    labels[2] = 0
    scores[3, MIN_STOCKS - 1 :] = np.nan
    labels[4] = np.nan
    # Equal but for the rounding of float32.
    scores[5] = (1e3 + 1e-4 * scores[5]).astype(np.float32)
    np.testing.assert_array_equal(np.isnan(ours(scores, labels)), [False, True, True, True, True, True, False])
    scores[3, MIN_STOCKS - 1] = 0
    assert np.isfinite(ours(scores, labels)[3])


def test_correlations_ignore_scale() -> None:
    scores, labels = holed((5, 30), 0), holed((5, 30), 1)
    for ours in (daily_ic, daily_rank_ic):
        np.testing.assert_allclose(ours(1e-8 * scores - 1e-7, labels), ours(scores, labels), rtol=1e-6)


def test_neutralise_is_least_squares() -> None:
    scores = holed((6, 50), 0)
    styles = np.stack([holed((6, 50), seed, missing=0.03) * 10.0**-seed for seed in range(1, 5)])
    styles[3, 2] = styles[2, 2] * 3 - 1
    styles[0, 4] = 5
    found = neutralise(scores, styles)
    for day in range(6):
        valid = np.isfinite(scores[day]) & np.isfinite(styles[:, day]).all(0)
        design = np.column_stack([np.ones(valid.sum()), *styles[:, day, valid]])
        weights = np.linalg.lstsq(design, scores[day, valid])[0]
        np.testing.assert_allclose(found[day, valid], scores[day, valid] - design @ weights, atol=1e-9)
        assert np.isnan(found[day, ~valid]).all()


def test_a_style_has_no_neutral_part() -> None:
    styles = np.stack([holed((6, 50), seed, missing=0) for seed in range(4)])
    assert np.isnan(neutralise((2 - 3 * styles[1]).astype(np.float32), styles)).all()
    assert np.isnan(neutralise(np.ones((6, 50)), styles)).all()
    assert np.isfinite(neutralise(styles[1] + 0.01 * holed((6, 50), 9, missing=0), styles)).all()


def test_style_exposures_stock_by_stock(generated) -> None:
    bars = {name: getattr(generated.panel, name)[:60, :3].copy() for name in BARS}
    for values in bars.values():
        values[:10, 0] = values[30:33, 1] = np.nan
    panel = Panel(generated.panel.dates[:60], generated.panel.symbols[:3], **bars)
    found = style_exposures(panel)
    for stock in range(3):
        price = pd.Series(panel.close[:, stock]).ffill().to_numpy()
        first = 10 if stock == 0 else 0
        for day in range(60):
            expected = []
            if day >= first + 20:
                expected = [np.std(price[day - 19 : day + 1] / price[day - 20 : day] - 1, ddof=1)]
            expected = expected or [np.nan]
            expected += [price[day] / price[day - ago] - 1 if day >= first + ago else np.nan for ago in (1, 5, 20)]
            if np.isnan(panel.close[day, stock]):
                expected = [np.nan] * 4
            np.testing.assert_allclose(found[:, day, stock], expected, rtol=1e-8)


def test_style_exposures_know_only_the_past(generated) -> None:
    panel = generated.panel
    last = panel.dates[70]
    np.testing.assert_array_equal(style_exposures(panel.until(last)), style_exposures(panel)[:, :71])


def test_interval_of_independent_days_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(0.05, 0.2, 2000)
    mean, low, high = mean_interval(values)
    assert mean == values.mean()
    half = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    np.testing.assert_allclose([low, high], [mean - half, mean + half], atol=0.15 * half)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values, seed=1) != mean_interval(values)


def test_interval_widens_when_days_hang_together() -> None:
    random = np.random.default_rng(0)
    persistent = np.repeat(random.normal(0, 0.2, 100), 5)
    shuffled = random.permutation(persistent)
    together, apart = (np.ptp(mean_interval(values)[1:]) for values in (persistent, shuffled))
    assert together > 1.6 * apart


def test_interval_over_seeds_is_wider_than_that_of_their_mean() -> None:
    random = np.random.default_rng(0)
    values = random.normal(0, 0.05, 250) + random.normal(0, 0.01, (5, 1)) + random.normal(0, 0.001, (5, 250))
    over_both, over_days = mean_interval(values), mean_interval(values.mean(axis=0))
    assert over_both.mean == pytest.approx(over_days.mean)
    assert np.ptp(over_both[1:]) > 1.3 * np.ptp(over_days[1:])


def test_paired_difference_removes_what_days_share() -> None:
    random = np.random.default_rng(0)
    shared = random.normal(0, 0.2, 250)
    first, second = (shared + mean + random.normal(0, 0.01, (5, 250)) for mean in (0.02, 0.01))
    difference = difference_interval(first, second)
    assert difference.mean == pytest.approx(first.mean() - second.mean())
    assert 0.008 < difference.low < difference.mean < difference.high < 0.012
    assert mean_interval(first).low < 0 < mean_interval(first).high
    assert difference_interval(first, first[:2]).low < 0


def test_intervals_leave_out_days_without_value() -> None:
    values = np.random.default_rng(0).normal(size=(2, 100))
    values[0, 10] = values[1, 20] = np.nan
    kept = np.delete(values, [10, 20], axis=1)
    assert mean_interval(values) == mean_interval(kept)
    few = mean_interval(np.ones(2 * BLOCK_DAYS - 1))
    assert few.mean == 1 and np.isnan(few.low) and np.isnan(few.high)
    assert np.isnan(mean_interval(np.full(100, np.nan))).all()


def test_average_scores_weighs_seeds_alike() -> None:
    first, second = holed((8, 30), 0, missing=0), holed((8, 30), 1, missing=0)
    expected = stats.zscore(first, axis=1) + stats.zscore(second, axis=1)
    average = average_scores(np.stack([100 * first + 7, 0.001 * second]))
    np.testing.assert_allclose(average, expected / 2, atol=1e-9)
    second[2, 3] = np.nan
    assert np.isnan(average_scores(np.stack([first, second]))[2, 3])


@pytest.mark.parametrize(
    ("shift", "words"),
    [(-2, r"from t-1 to t is clearly"), (-1, r"from t to t\+1 is clearly"), (0, "seen the label"), (3, None)],
)
def test_alarm(market, shift, words) -> None:
    noise = 0.02 * np.random.default_rng(0).standard_normal(market.labels.shape)
    scores = np.roll(market.labels, -shift, axis=0) + noise
    evaluation = evaluate_scores({"shifted": scores[market.days]}, market, RULES)
    horizons = evaluation.models["shifted"].horizon_ic
    found = np.nanmean(horizons, axis=1)
    assert HORIZONS[int(found.argmax())] == 1 + shift
    alarm = horizon_alarm(horizons)
    assert alarm.suspicious == (words is not None)
    if words:
        assert re.search(words, alarm.words)


def test_horizon_names() -> None:
    assert [horizon_name(horizon) for horizon in (-1, 0, 1)] == ["t-1 to t", "t to t+1", "t+1 to t+2"]


def test_evaluation_of_several_models(market, generated) -> None:
    random = np.random.default_rng(0)
    truth = generated.expected[market.days]
    noisy = truth + truth.std() * random.standard_normal((3, *truth.shape))
    scores = {"ours": noisy.astype(np.float32), "noise": random.standard_normal(truth.shape), "truth": truth}
    evaluation = evaluate_scores(scores, market, RULES)
    assert list(evaluation.dates) == list(generated.panel.dates[market.days])
    assert evaluation.models["ours"].daily["IC"].shape == (3, len(market.days))
    metrics = evaluation.metrics("ours")
    assert tuple(metrics) == KEYS
    assert metrics["coverage"] == 100 and metrics["days"] == len(market.days)
    members = market.members[0]
    ics = [daily_ic(seed[:, members], market.labels[market.days][:, members]) for seed in noisy]
    assert metrics["IC"] == pytest.approx(np.mean(ics), rel=1e-5)
    assert metrics["ICIR"] == pytest.approx(np.mean([ic.mean() / ic.std(ddof=1) for ic in ics]), rel=1e-5)
    assert evaluation.metrics("truth")["RankIC"] > metrics["RankIC"] > 0.05
    assert abs(evaluation.metrics("noise")["RankIC"]) < 0.03
    assert evaluation.metrics("truth")["excess_AR"] > 50
    assert [row["model"] for row in evaluation.rows()] == ["ours", "+- over 3 seeds", "noise", "truth"]
    assert evaluation.rows()[1]["IC"] == pytest.approx(np.std([ic.mean() for ic in ics], ddof=1), rel=1e-4)
    (rank_ic,) = (row for row in evaluation.differences("ours", "noise") if row["metric"] == "RankIC")
    assert 0 < rank_ic["low"] < rank_ic["mean"] < rank_ic["high"]
    for row in evaluation.intervals("ours"):
        assert row["mean"] == pytest.approx(metrics[row["metric"]])
        assert row["low"] < row["mean"] < row["high"]
    np.testing.assert_allclose(evaluation.series("IC")["ours"], np.mean(ics, axis=0), rtol=1e-4)
    with pytest.raises(UnknownNameError, match="ours"):
        evaluation.metrics("our")


def test_scores_of_non_members_change_nothing(market) -> None:
    scores = np.random.default_rng(0).standard_normal((len(market.days), 60))
    changed = scores.copy()
    changed[:, 50:] = 1e6
    evaluation = evaluate_scores({"before": scores, "after": changed}, market, RULES)
    assert evaluation.metrics("before") == evaluation.metrics("after")


def test_missing_scores_show_in_the_coverage(market) -> None:
    scores = np.random.default_rng(0).standard_normal((len(market.days), 60))
    scores[:, :10] = np.nan
    scores[:5] = 1
    metrics = evaluate_scores({"some": scores}, market, RULES).metrics("some")
    assert metrics["coverage"] == pytest.approx(100 * (5 * 50 + 105 * 40) / (110 * 50))
    assert metrics["days"] == 105
    nothing = evaluate_scores({"none": np.full_like(scores, np.nan)}, market, RULES)
    metrics = nothing.metrics("none")
    assert metrics["coverage"] == metrics["days"] == metrics["turnover"] == 0 and np.isnan(metrics["IC"])
    assert not horizon_alarm(nothing.models["none"].horizon_ic).suspicious


def test_wrong_scores_are_refused(market) -> None:
    with pytest.raises(ValueError, match=r"'ours'.*\(3, 60\).*\(110, 60\)"):
        evaluate_scores({"ours": np.zeros((3, 60))}, market)
    with pytest.raises(ValueError, match="infinite"):
        evaluate_scores({"ours": np.full((110, 60), np.inf)}, market)


def test_market_of_mixed_shapes_is_refused(market) -> None:
    with pytest.raises(ValueError, match=r"160 days and 60 stocks.*\(160, 59\)"):
        Market(market.panel, market.members[:, 1:], market.labels, market.styles, market.days)
    with pytest.raises(ValueError, match="split_days"):
        Market.of(market.panel, market.members, np.arange(100, 160))


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_routing_agreement_is_scikit_learns(groups) -> None:
    random = np.random.default_rng(0)
    styles = random.integers(4, size=500)
    weights = random.dirichlet(np.ones(8), 500)
    weights[np.arange(500), 2 * styles] += 0.3
    chosen = weights.reshape(500, groups, 8 // groups).sum(axis=2).argmax(axis=1)
    expected = normalized_mutual_info_score(styles, chosen)
    assert routing_agreement(weights, groups, styles) == pytest.approx(expected, abs=1e-12)


def test_routing_agreement_at_its_ends() -> None:
    styles = np.array([0, 1, 2, 0, 1, 2])
    assert routing_agreement(np.eye(3)[[2, 0, 1, 2, 0, 1]], 3, styles) == pytest.approx(1)
    assert routing_agreement(np.eye(3)[[0] * 6], 3, styles) == 0
    with pytest.raises(ValueError, match="3 experts cannot be divided into 2"):
        routing_agreement(np.eye(3)[styles], 2, styles)


def test_mean_usage_is_a_group_by() -> None:
    random = np.random.default_rng(0)
    weights, labels = random.random((50, 4)), random.choice(["2024-02", "2024-01", "2024-03"], 50)
    found = mean_usage(weights, labels)
    expected = pd.DataFrame(weights).groupby(labels).mean()
    assert list(found) == list(expected.index)
    np.testing.assert_allclose(np.stack(list(found.values())), expected)
