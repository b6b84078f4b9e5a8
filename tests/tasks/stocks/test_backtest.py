"""TopkDropout against a plain reading of Qlib's rule, stock by stock; costs, limits, suspensions; summaries."""

from dataclasses import replace

import empyrical
import numpy as np
import pandas as pd
import pytest

from tasks.stocks.backtest import (
    Backtest,
    TopkDropout,
    backtest,
    choose_trades,
    drawdown,
    equal_weight_index,
)
from tasks.stocks.panel import Panel, forward_returns, generate_market

FREE = TopkDropout(topk=2, n_drop=1, risk_degree=1, open_cost=0, close_cost=0, min_cost=0, account=1000)


def panel_of(close) -> Panel:
    close = np.asarray(close, dtype=np.float64)
    names = tuple(f"{number:06}" for number in range(close.shape[1]))
    return Panel(np.arange(len(close)) + np.datetime64("2024-01-01"), names, *[close] * 5)


def everyone(panel: Panel):
    return np.ones(panel.close.shape, dtype=bool)


def rough_market(seed: int = 0):
    """Forty stocks with suspensions, limit moves, changing members and missing scores."""
    random = np.random.default_rng(seed)
    panel = generate_market(days=80, stocks=40, seed=seed).panel
    close = panel.close * np.exp(
        np.cumsum(0.15 * (random.random((80, 40)) < 0.05) * random.choice([-1, 1], (80, 40)), 0)
    )
    close[random.random((80, 40)) < 0.03] = np.nan
    close[20:35, 3] = np.nan
    members = np.ones((80, 40), dtype=bool)
    members[:40, 30:] = False
    members[40:, :6] = False
    days = np.arange(10, 70)
    scores = random.standard_normal((60, 40)).cumsum(axis=0)
    scores[random.random((60, 40)) < 0.02] = np.nan
    scores[25] = np.nan
    return scores, panel_of(close), members, days


def reference(scores, panel, members, days, rules):
    """Qlib's loop in its own terms: shares, prices, one order after the other."""
    close = pd.DataFrame(panel.close)
    price = close.ffill()
    cash, shares, bought = rules.account, {}, {}
    rows = []
    for row, day in enumerate(days + 1):
        change = close.iloc[day] / price.iloc[day - 1] - 1
        value = cash + sum(amount * price.iloc[day][stock] for stock, amount in shares.items())
        score = pd.Series(scores[row])[members[days[row]]].dropna()
        traded = cost = 0.0
        if len(score):
            last = score.reindex(sorted(shares)).sort_values(ascending=False, kind="stable").index
            today = score[~score.index.isin(last)].sort_values(ascending=False).index
            today = list(today)[: max(rules.n_drop + rules.topk - len(last), 0)]
            comb = score.reindex(list(last) + today).sort_values(ascending=False, kind="stable").index
            lowest = list(comb)[-rules.n_drop :] if rules.n_drop else []
            sell = [stock for stock in last if stock in lowest]
            buy = today[: max(len(sell) + rules.topk - len(last), 0)]
            for stock in sell:
                suspended = np.isnan(close.iloc[day][stock])
                if suspended or change[stock] < -rules.limit or day - bought[stock] < rules.hold_thresh:
                    continue
                worth = shares.pop(stock) * close.iloc[day][stock]
                fee = max(worth * rules.close_cost, rules.min_cost)
                cash, traded, cost = cash + worth - fee, traded + worth, cost + fee
            budget = cash * rules.risk_degree / max(len(buy), 1)
            for stock in buy:
                if np.isnan(close.iloc[day][stock]) or change[stock] > rules.limit:
                    continue
                fee = max(budget * rules.open_cost, rules.min_cost)
                shares[stock], bought[stock] = budget / close.iloc[day][stock], day
                cash, traded, cost = cash - budget - fee, traded + budget, cost + fee
        after = cash + sum(amount * price.iloc[day + 1][stock] for stock, amount in shares.items())
        rows.append(((after + cost) / value - 1, cost / value, traded / value, len(shares)))
    return np.array(rows).T


@pytest.mark.parametrize(
    "rules",
    [TopkDropout(topk=10, n_drop=3), TopkDropout(topk=8, n_drop=2, hold_thresh=4), TopkDropout(topk=5, n_drop=0)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_backtest_is_qlibs_loop(rules, seed) -> None:
    market = rough_market(seed)
    ours = backtest(*market, rules)
    returns, costs, turnover, positions = reference(*market, rules)
    np.testing.assert_allclose(ours.returns, returns, atol=1e-12)
    np.testing.assert_allclose(ours.costs, costs, atol=1e-12)
    np.testing.assert_allclose(ours.turnover, turnover, atol=1e-12)
    np.testing.assert_array_equal(ours.positions, positions)


def test_score_of_a_day_earns_the_label_of_that_day() -> None:
    panel = generate_market(days=40, stocks=30).panel
    days = np.arange(5, 30)
    labels = forward_returns(panel)[days]
    scores = np.random.default_rng(0).standard_normal(labels.shape)
    rules = replace(FREE, topk=1, limit=10.0)
    result = backtest(scores, panel, everyone(panel), days, rules)
    best = np.take_along_axis(labels, scores.argmax(axis=1)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(result.returns, best, atol=1e-12)
    np.testing.assert_allclose(result.benchmark, labels.mean(axis=1), atol=1e-12)


def test_a_score_changes_nothing_earlier() -> None:
    scores, *market = rough_market()
    changed = scores.copy()
    changed[30:] = -changed[30:]
    first, second = (backtest(table, *market) for table in (scores, changed))
    for name in ("returns", "costs", "turnover", "holdings"):
        np.testing.assert_array_equal(getattr(first, name)[:30], getattr(second, name)[:30])
    assert not np.allclose(first.returns[30:], second.returns[30:])


def test_costs_are_those_of_the_orders() -> None:
    panel = panel_of(np.full((7, 3), 10.0))
    scores = np.array([[3.0, 2, 1], [1, 2, 3]])
    rules = TopkDropout(topk=1, n_drop=1, account=1e6)
    result = backtest(scores, panel, everyone(panel), np.array([1, 2]), rules)
    bought = 0.95 * 1e6
    left = 1e6 - 0.0005 * bought
    cash = left - 0.0015 * bought
    again = 0.95 * cash
    np.testing.assert_allclose(result.costs, [0.0005 * 0.95, (0.0015 * bought + 0.0005 * again) / left])
    np.testing.assert_allclose(result.turnover, [0.95, (bought + again) / left])
    np.testing.assert_allclose(result.holdings, [[bought, 0, 0], [0, 0, again]])
    np.testing.assert_allclose(result.returns, 0, atol=1e-15)
    few = backtest(scores, panel, everyone(panel), np.array([1, 2]), replace(rules, account=1000))
    assert few.costs[0] == pytest.approx(5 / 1000)
    assert few.costs[1] == pytest.approx(10 / 995)


def test_cash_never_runs_out() -> None:
    panel = panel_of(np.full((7, 3), 10.0))
    scores = np.array([[3.0, 2, 1], [1, 2, 3]])
    for account in (20, 6, 3):
        rules = TopkDropout(topk=2, n_drop=1, account=account)
        result = backtest(scores, panel, everyone(panel), np.array([1, 2]), rules)
        assert (result.costs < 1).all() and (result.holdings >= 0).all()
        assert result.holdings[0].sum() + result.costs[0] * account <= account
    assert result.positions.max() == 0


def test_limits_bind_one_direction_each() -> None:
    close = np.full((7, 3), 10.0)
    close[3:, 0] *= 1.1
    close[3:, 1] *= 0.9
    panel = panel_of(close)
    members, days = everyone(panel), np.array([1, 2])
    rules = replace(FREE, topk=1)
    # On day 3 the first stock is at its upper limit and the second at its lower.
    for first, second, held in [((2, 3, 1), (3, 1, 2), 1), ((1, 2, 3), (3, 2, 1), None), ((3, 2, 1), (1, 3, 2), 1)]:
        result = backtest(np.array([first, second], dtype=float), panel, members, days, rules)
        holders = np.flatnonzero(result.holdings[1]).tolist()
        assert holders == ([] if held is None else [held])


def test_suspended_stock_keeps_its_price_and_is_not_traded() -> None:
    close = np.full((8, 2), 10.0)
    close[:, 0] = [10, 10, 10, np.nan, np.nan, 15, 15, 15]
    panel = panel_of(close)
    scores = np.array([[2.0, 1]] + [[1.0, 2]] * 4)
    rules = replace(FREE, topk=1, limit=1.0)
    result = backtest(scores, panel, everyone(panel), np.arange(1, 6), rules)
    # Bought on day 2, kept on 3 and 4 while candidates take none of its place, sold on 5 at the new price.
    np.testing.assert_allclose(result.returns, [0, 0, 0.5, 0, 0])
    np.testing.assert_array_equal(np.count_nonzero(result.holdings[:, 0:1], axis=1), [1, 1, 1, 0, 0])
    np.testing.assert_allclose(result.benchmark, 0)


def test_ex_members_are_sold_and_others_never_bought() -> None:
    panel = panel_of(np.full((12, 6), 10.0))
    members = everyone(panel)
    members[4:, :2] = False
    members[:, 5] = False
    scores = np.tile([6.0, 5, 4, 3, 2, 7], (8, 1))
    result = backtest(scores, panel, members, np.arange(1, 9), FREE)
    np.testing.assert_array_equal(np.flatnonzero(result.holdings[0]), [0, 1])
    # The membership of day 4 is traded on day 5, one stock a day.
    np.testing.assert_array_equal(result.holdings[3] > 0, [True, False, True, False, False, False])
    np.testing.assert_array_equal(np.flatnonzero(result.holdings[4]), [2, 3])
    assert not result.holdings[:, 5].any()


def test_only_a_better_stock_replaces_a_held_one() -> None:
    rules = TopkDropout(topk=3, n_drop=2)
    held = np.array([True, True, True, False, False, False])
    sell, buy = choose_trades(np.array([6.0, 5, 4, 3, 2, 1]), held, rules)
    assert not len(sell) and not len(buy)
    sell, buy = choose_trades(np.array([6.0, 3, 2, 5, 1, 4]), held, rules)
    assert sorted(sell) == [1, 2] and buy.tolist() == [3, 5]
    sell, buy = choose_trades(np.ones(6), held, rules)
    assert not len(sell) and not len(buy)
    sell, buy = choose_trades(np.full(6, np.nan), held, rules)
    assert not len(sell) and not len(buy)
    sell, buy = choose_trades(np.array([np.nan, 3, 2, 0, 1, np.nan]), held, rules)
    assert sell.tolist() == [0] and buy.tolist() == [4]


def test_equal_weight_index_counts_yesterdays_members() -> None:
    panel = panel_of([[10, 10, 10, 10], [11, 12, np.nan, 20], [11, 12, 40, 20]])
    members = np.array([[True, True, True, False], [False, True, True, True], [True] * 4])
    np.testing.assert_allclose(equal_weight_index(panel, members), [0, 0.15, 0])
    np.testing.assert_array_equal(equal_weight_index(panel, ~everyone(panel)), 0)


def test_summary_against_empyrical() -> None:
    random = np.random.default_rng(0)
    returns, costs, benchmark = random.normal(0, 0.01, (3, 250))
    result = Backtest(returns, abs(costs) / 10, benchmark, np.full(250, 0.2), np.zeros((250, 1)))
    after = returns - benchmark - abs(costs) / 10
    summary = result.summary()
    assert summary["IR_cost"] == pytest.approx(empyrical.sharpe_ratio(after, annualization=238))
    # Empyrical's drawdown compounds: that of exponentials is the exponential of that of sums.
    assert summary["MDD_cost"] == pytest.approx(100 * np.log1p(empyrical.max_drawdown(np.expm1(after))))
    # Its arithmetic year is that of a compounding one whose logarithms add up.
    compound = empyrical.annual_return(np.expm1(after), annualization=238)
    assert summary["excess_AR_cost"] == pytest.approx(100 * np.log1p(compound))
    assert summary["excess_AR"] == pytest.approx(100 * 238 * (returns - benchmark).mean())
    assert summary["turnover"] == pytest.approx(0.2)


def test_summary_of_constant_returns_has_no_ratio() -> None:
    flat = Backtest(*np.zeros((4, 20)), np.zeros((20, 1)))
    assert np.isnan(flat.summary()["IR_cost"]) and flat.summary()["MDD_cost"] == 0
    one = Backtest(*np.full((4, 1), 0.01), np.zeros((1, 1)))
    assert np.isnan(one.summary()["IR_cost"])


def test_drawdown_starts_at_zero() -> None:
    np.testing.assert_allclose(drawdown(np.array([-0.1, 0.3, -0.2, 0.1])), [-0.1, 0, -0.2, -0.1])


@pytest.mark.parametrize(
    ("days", "words"),
    [([1, 3], "consecutive"), ([], "consecutive"), ([-1, 0], "consecutive"), ([5, 6], "split_days")],
)
def test_days_that_cannot_be_traded_are_refused(days, words) -> None:
    panel = panel_of(np.ones((8, 2)))
    with pytest.raises(ValueError, match=words):
        backtest(np.zeros((len(days), 2)), panel, everyone(panel), np.array(days, dtype=np.intp))


def test_scores_of_other_days_are_refused() -> None:
    panel = panel_of(np.ones((8, 2)))
    with pytest.raises(ValueError, match=r"2 days and 2 stocks.*\(3, 2\)"):
        backtest(np.zeros((3, 2)), panel, everyone(panel), np.array([1, 2]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n_drop": 60}, "n_drop"),
        ({"topk": 0, "n_drop": 0}, "topk"),
        ({"risk_degree": 1.2}, "risk_degree"),
        ({"open_cost": -0.1}, "open_cost"),
        ({"limit": 0}, "limit"),
        ({"account": 0}, "account"),
    ],
)
def test_rules_without_sense_are_refused(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        TopkDropout(**arguments)
