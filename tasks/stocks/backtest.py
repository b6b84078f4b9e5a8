"""TopkDropout, the trading rule of Qlib, as a backtest with costs against an equal-weight index of the members.

The score of day t is known at its close and traded at the close of t+1; the position then earns the label's return,
from that close to the close of t+2. Every series here is indexed by t, the day of the score, as the ICs are.

Three deviations from Qlib: a stock at its upper limit can be sold and one at its lower limit bought (Qlib refuses both
at either); the cost of a trade counts on the day that its position starts to earn, not the day before; and shares are
not rounded to lots of 100, as forward-adjusted prices do not say what a lot cost.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasks.stocks.panel import LABEL_DAYS, Array, Mask, Panel

Days = NDArray[np.intp]

YEAR = 238
PERCENT = 100


@dataclass(frozen=True, slots=True)
class TopkDropout:
    """Holds the best stocks and replaces a few of the worst each day.

    Attributes:
        topk: Stocks to hold.
        n_drop: The most that are replaced on one day.
        hold_thresh: Days that a stock is held at least.
        risk_degree: Share of the cash that is spent when stocks are bought.
        open_cost: Of a purchase, as a share of its value.
        close_cost: Of a sale, likewise.
        min_cost: The least that a trade costs, in the currency of the account.
        limit: Move from close to close above which a stock cannot be bought, and below minus which it cannot be sold.
        account: Cash at the start.
    """

    topk: int = 50
    n_drop: int = 5
    hold_thresh: int = 1
    risk_degree: float = 0.95
    open_cost: float = 0.0005
    close_cost: float = 0.0015
    min_cost: float = 5.0
    limit: float = 0.095
    account: float = 1e8

    def __post_init__(self) -> None:
        if not 0 <= self.n_drop <= self.topk or not self.topk:
            raise ValueError(f"n_drop must be in 0..topk and topk above 0; found {self.n_drop} and {self.topk}.")
        if not 0 < self.risk_degree <= 1:
            raise ValueError(f"risk_degree must be above 0 and at most 1; found {self.risk_degree}.")
        costs = {name: getattr(self, name) for name in ("open_cost", "close_cost", "min_cost")}
        if negative := [name for name, value in costs.items() if value < 0]:
            raise ValueError(f"{negative[0]} must not be negative; found {costs[negative[0]]}.")
        if not (self.limit > 0 and self.account > 0):
            raise ValueError(f"limit and account must be above 0; found {self.limit} and {self.account}.")


QLIB_RULES = TopkDropout()


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Backtest:
    """What came of trading by scores, per day of the score.

    Attributes:
        returns: `(days,)` of the portfolio before costs, as a share of its value before the trades.
        costs: `(days,)` of the trades, likewise.
        benchmark: `(days,)` return of the index.
        turnover: `(days,)` value bought and sold, as a share of the portfolio's.
        holdings: `(days, stocks)` value of each position after the trades, in the currency of the account.
    """

    returns: Array
    costs: Array
    benchmark: Array
    turnover: Array
    holdings: Array

    @property
    def excess(self) -> Array:
        """`(days,)` return above the index before costs."""
        return self.returns - self.benchmark

    @property
    def excess_cost(self) -> Array:
        """`(days,)` return above the index after costs."""
        return self.excess - self.costs

    @property
    def positions(self) -> NDArray[np.int64]:
        """`(days,)` number of stocks held."""
        return np.count_nonzero(self.holdings, axis=1)

    def summary(self) -> dict[str, float]:
        """The year in numbers, arithmetic as in Qlib: returns add up and a year is 238 days.

        Returns:
            `excess_AR` and `excess_AR_cost` in percent a year; `IR_cost`, mean over standard deviation, of a year;
            `MDD_cost`, the deepest fall of the summed excess return from an earlier height or from the start, in
            percent, not above 0; `turnover` per day, of purchases and sales together.
        """
        after = self.excess_cost
        spread = after.std(ddof=1) if len(after) > 1 else 0.0
        return {
            "excess_AR": float(self.excess.mean() * YEAR * PERCENT),
            "excess_AR_cost": float(after.mean() * YEAR * PERCENT),
            "IR_cost": float(after.mean() / spread * np.sqrt(YEAR)) if spread else float("nan"),
            "MDD_cost": float(drawdown(after).min() * PERCENT),
            "turnover": float(self.turnover.mean()),
        }


def backtest(scores: Array, panel: Panel, members: Mask, days: Days, rules: TopkDropout = QLIB_RULES) -> Backtest:
    """Trade by scores.

    A stock that loses its score, as ex-members do, ranks below all others; a suspended stock keeps its last price and
    is not traded; on a day without any score nothing is.

    Args:
        scores: `(days, stocks)`, NaN where there is none; those of stocks that are no members are not read.
        panel: The bars.
        members: `(panel's days, stocks)`: who may be bought.
        days: `(days,)` positions of the scores' days in the panel, consecutive; two more days must follow.
        rules: Of trading.

    Raises:
        ValueError: The days are not consecutive, too late in the panel, or not those of the scores.
    """
    check_days(days, panel)
    if scores.shape != (len(days), len(panel.symbols)):
        raise ValueError(
            f"Scores of {len(days)} days and {len(panel.symbols)} stocks were expected; found the shape {scores.shape}."
        )
    scores = np.where(members[days] & np.isfinite(scores), scores, np.nan)
    moves = _moves(panel.close)
    buyable = panel.traded & ~(moves > rules.limit)
    sellable = panel.traded & ~(moves < -rules.limit)
    cash, value = rules.account, np.zeros(len(panel.symbols))
    bought_on = np.zeros(len(panel.symbols), dtype=np.intp)
    returns, costs, turnover = np.empty((3, len(days)))
    holdings = np.empty_like(scores)
    for row, today in enumerate(days + 1):
        before = cash + value.sum()
        sell, buy = choose_trades(scores[row], value > 0, rules)
        sell = sell[sellable[today, sell] & (today - bought_on[sell] >= rules.hold_thresh)]
        sold = value[sell].sum()
        cost = np.maximum(value[sell] * rules.close_cost, rules.min_cost).sum()
        cash += sold - cost
        value[sell] = 0
        # As in Qlib, the cash is divided by all that should be bought; the share of a stock that cannot be stays cash.
        amount = _amount(cash, len(buy), rules)
        buy = buy[buyable[today, buy] & (amount > 0)]
        fees = len(buy) * max(amount * rules.open_cost, rules.min_cost)
        cash -= len(buy) * amount + fees
        cost += fees
        value[buy] = amount
        bought_on[buy] = today
        holdings[row] = value
        value = value * (1 + np.nan_to_num(moves[today + 1]))
        costs[row] = cost / before
        returns[row] = (cash + value.sum() + cost) / before - 1
        turnover[row] = (sold + len(buy) * amount) / before
    return Backtest(returns, costs, equal_weight_index(panel, members)[days + LABEL_DAYS], turnover, holdings)


def choose_trades(score: Array, held: Mask, rules: TopkDropout) -> tuple[Days, Days]:
    """What TopkDropout would sell and buy if everything could be traded.

    Candidates are the best stocks that are not held. Ranked together with those held, the last `n_drop` go if they are
    held, so that a stock is replaced only by a better one; among equals the held one stays.

    Args:
        score: `(stocks,)`, NaN where there is none.
        held: `(stocks,)`.
        rules: Of trading.

    Returns:
        The stocks to sell, and those to buy, the best first.
    """
    scored = np.isfinite(score)
    if not scored.any():
        return np.empty(0, dtype=np.intp), np.empty(0, dtype=np.intp)
    ranked = np.argsort(-score, kind="stable")
    last = ranked[held[ranked]]
    free = ranked[scored[ranked] & ~held[ranked]]
    candidates = free[: max(rules.n_drop + rules.topk - len(last), 0)]
    together = np.concatenate([last, candidates])
    together = together[np.argsort(-score[together], kind="stable")]
    sell = last[np.isin(last, together[max(len(together) - rules.n_drop, 0) :])]
    return sell, candidates[: max(len(sell) + rules.topk - len(last), 0)]


def equal_weight_index(panel: Panel, members: Mask) -> Array:
    """Return of an index that holds the same amount of each member, set right every day and at no cost.

    Args:
        panel: The bars.
        members: `(days, stocks)`.

    Returns:
        `(days,)`: the mean return, from the day before, of those who were members then and were traded on both days;
        0 where there is none.
    """
    growth = panel.close[1:] / panel.close[:-1] - 1
    counted = members[:-1] & np.isfinite(growth)
    total = np.where(counted, growth, 0).sum(axis=1)
    return np.concatenate([[0.0], total / np.maximum(counted.sum(axis=1), 1)])


def drawdown(returns: Array) -> Array:
    """How far the summed returns lie below the highest sum so far, the start included; 0 or less.

    Args:
        returns: `(days,)`.
    """
    total = returns.cumsum()
    return total - np.maximum.accumulate(np.maximum(total, 0))


def check_days(days: Days, panel: Panel) -> None:
    """Raise ValueError unless days are consecutive and the two on which their labels are earned follow in the panel."""
    if not len(days) or days[0] < 0 or (np.diff(days) != 1).any():
        raise ValueError("Days must be consecutive positions in the panel, as those of one span of split_days are.")
    if days[-1] + LABEL_DAYS >= len(panel.dates):
        raise ValueError(
            f"The {LABEL_DAYS} days after the last score must be in the panel; found {days[-1]} as the last of "
            f"{len(panel.dates)} positions. Take the days from split_days, which drops the last {LABEL_DAYS} of a span."
        )


def _moves(close: Array) -> Array:
    """Return of each day from the last known price; NaN where there is none or the stock is not traded."""
    import pandas as pd

    known = pd.DataFrame(close).ffill().to_numpy()
    moves = np.full_like(close, np.nan)
    moves[1:] = close[1:] / known[:-1] - 1
    return moves


def _amount(cash: float, buys: int, rules: TopkDropout) -> float:
    """What each of some purchases is worth, so that they and their costs never exceed the cash."""
    spent = min(cash * rules.risk_degree, cash / (1 + rules.open_cost), cash - buys * rules.min_cost)
    return spent / max(buys, 1)
