"""Alpha158 and Alpha360, the feature sets of Qlib, vectorised over days and stocks.

A window of d days holds the last d days on which *the stock itself* was traded: a suspension neither shortens a window
nor fills it with repeated prices, and a suspended day has no features. Every feature of a day reads that day and
earlier ones, and starts when `HISTORY` earlier trading days exist, so that no window is partial.

Four deviations from Qlib, each of which makes the features independent of the units of price and volume, and so of
adjustments made with later knowledge: VWAP is the mean of open, high, low and close; nothing is added to the volume
inside the logarithm of CORR (a traded day has some); a ratio with a denominator of zero is 0 rather than divided by
1e-12; and whether a window is constant is judged relative to its level. What has no value (the correlation with a
constant) is NaN.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from tasks.stocks.panel import BARS, Array, Mask, Panel
from zoo.errors import UnknownNameError

Features = NDArray[np.float32]

WINDOWS = (5, 10, 20, 30, 60)
# Trading days before the first one with features; ROC60 reads the close of 60 days ago.
HISTORY = max(WINDOWS)
LENGTH = np.array(WINDOWS, dtype=np.float64)[:, None, None]
CANDLE = ("KMID", "KLEN", "KMID2", "KUP", "KUP2", "KLOW", "KLOW2", "KSFT", "KSFT2")
PRICES = ("OPEN0", "HIGH0", "LOW0", "VWAP0")
ROLLING = (
    *("ROC", "MA", "STD", "BETA", "RSQR", "RESI", "MAX", "MIN", "QTLU", "QTLD", "RANK", "RSV", "IMAX", "IMIN", "IMXD"),
    *("CORR", "CORD", "CNTP", "CNTN", "CNTD", "SUMP", "SUMN", "SUMD"),
    *("VMA", "VSTD", "WVMA", "VSUMP", "VSUMN", "VSUMD"),
)
SERIES = ("CLOSE", "OPEN", "HIGH", "LOW", "VWAP", "VOLUME")
ALPHA158 = (*CANDLE, *PRICES, *(f"{operator}{window}" for operator in ROLLING for window in WINDOWS))
ALPHA360 = tuple(f"{series}{lag}" for series in SERIES for lag in reversed(range(HISTORY)))
# A window counts as constant if its standard deviation is below this share of its latest value.
FLAT = 1e-6
# Stocks computed together: a window's temporaries then stay in the processor's cache.
CHUNK = 32


def load_features(panel: Panel, name: str, cache: str | Path | None = None) -> Features:
    """Features of every stock on every day, from the cache where they are there.

    A file of the cache is named after the content of the panel and of this module, so it never goes stale; old ones can
    be deleted at any time.

    Args:
        panel: The bars.
        name: alpha158 or alpha360.
        cache: A folder for computed features; without one they are computed anew.

    Returns:
        `(days, stocks, features)`, in the order of `ALPHA158` or `ALPHA360`, mapped from the file if there is a cache.
        NaN throughout where the stock was not traded or has fewer than `HISTORY` earlier trading days.

    Raises:
        UnknownNameError: There is no such feature set.
    """
    if cache is None:
        return compute_features(panel, name)
    path = cache_path(panel, name, cache)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with unfinished.open("wb") as file:
                np.save(file, compute_features(panel, name))
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    mapped: Features = np.load(path, mmap_mode="r")
    return mapped


def cache_path(panel: Panel, name: str, cache: str | Path) -> Path:
    """Where the features of a panel are kept.

    Args:
        panel: The bars.
        name: alpha158 or alpha360.
        cache: The cache's folder.
    """
    definition = Path(__file__).read_bytes()
    key = hashlib.sha256(definition + panel.digest().encode()).hexdigest()
    return Path(cache) / f"{name}-{key[:32]}.npy"


def compute_features(panel: Panel, name: str) -> Features:
    """Features of every stock on every day.

    Args:
        panel: The bars.
        name: alpha158 or alpha360.

    Returns:
        As `load_features`.

    Raises:
        UnknownNameError: There is no such feature set.
    """
    if name not in FEATURE_SETS:
        raise UnknownNameError("feature set", name, FEATURE_SETS)
    names, compute = FEATURE_SETS[name]
    days, stocks = panel.close.shape
    features = np.full((days, stocks, len(names)), np.nan, dtype=np.float32)
    if days <= HISTORY:
        return features
    # Each stock's trading days come first and close ranks; what follows them is NaN.
    order = np.argsort(~panel.traded, axis=0, kind="stable")
    for start in range(0, stocks, CHUNK):
        chunk = np.arange(start, min(start + CHUNK, stocks))
        bars = {bar: np.take_along_axis(getattr(panel, bar)[:, chunk], order[:, chunk], axis=0) for bar in BARS}
        values = compute(bars)
        block = np.stack([values[feature] for feature in names], axis=-1, dtype=np.float32, casting="same_kind")
        block[np.isnan(bars["close"][HISTORY:])] = np.nan
        features[order[HISTORY:, chunk], chunk] = block
    return features


def have_features(features: Features) -> Mask:
    """`(days, stocks)`: whether a stock has features on a day; single ones may be NaN all the same.

    Args:
        features: `(days, stocks, features)`.
    """
    # The first feature of either set is a ratio of prices, which always has a value.
    return np.isfinite(features[..., 0])


def alpha158(bars: dict[str, Array]) -> dict[str, Array]:
    """Nine of the day's candle, four of its prices and 29 operators over five windows each.

    Args:
        bars: `(days, stocks)` open, high, low, close and volume.

    Returns:
        `(days - HISTORY, stocks)` by the feature's name.
    """
    close, volume = bars["close"], bars["volume"]
    returns, growth = (np.vstack([np.full_like(x[:1], np.nan), x[1:] / x[:-1]]) for x in (close, volume))
    turnover = np.abs(returns - 1) * volume
    level, amount = lagged(close, 0), lagged(volume, 0)
    slope, rsquare, residual = regress(close)
    highest, highest_at = extremes(bars["high"], np.greater_equal)
    lowest, lowest_at = extremes(bars["low"], np.less_equal)
    upper, lower = quantiles(close, 0.8, 0.2)
    rising, falling = moves(close)
    growing, shrinking = moves(volume)
    more, less = changes(close, np.greater), changes(close, np.less)
    rolling = {
        "ROC": np.stack([lagged(close, window) for window in WINDOWS]) / level,
        "MA": means(close) / level,
        "STD": deviations(close) / level,
        "BETA": slope / level,
        "RSQR": rsquare,
        "RESI": residual / level,
        "MAX": highest / level,
        "MIN": lowest / level,
        "QTLU": upper / level,
        "QTLD": lower / level,
        "RANK": ranks(close),
        "RSV": ratio(level - lowest, highest - lowest),
        "IMAX": highest_at,
        "IMIN": lowest_at,
        "IMXD": highest_at - lowest_at,
        "CORR": correlations(close, np.log(volume)),
        "CORD": correlations(returns, np.log(growth + 1)),
        "CNTP": more,
        "CNTN": less,
        "CNTD": more - less,
        "SUMP": rising,
        "SUMN": falling,
        "SUMD": rising - falling,
        "VMA": means(volume) / amount,
        "VSTD": deviations(volume) / amount,
        "WVMA": ratio(deviations(turnover), means(turnover)),
        "VSUMP": growing,
        "VSUMN": shrinking,
        "VSUMD": growing - shrinking,
    }
    return candle(bars) | {
        f"{name}{window}": values
        for name, rows in rolling.items()
        for window, values in zip(WINDOWS, rows, strict=True)
    }


def alpha360(bars: dict[str, Array]) -> dict[str, Array]:
    """Sixty days of six series, each divided by the latest close, the volume by the latest volume.

    Args:
        bars: As for `alpha158`.

    Returns:
        As `alpha158`.
    """
    series = {name.lower(): values for name, values in bars.items()} | {"vwap": typical_price(bars)}
    scale = {name: lagged(bars["volume" if name == "VOLUME" else "close"], 0) for name in SERIES}
    lags = range(HISTORY)
    return {f"{name}{lag}": lagged(series[name.lower()], lag) / scale[name] for name in SERIES for lag in lags}


def candle(bars: dict[str, Array]) -> dict[str, Array]:
    """The shape of the day's candle, and its prices over its close.

    Args:
        bars: As for `alpha158`.
    """
    first, high, low, close = (lagged(bars[name], 0) for name in ("open", "high", "low", "close"))
    parts = {
        "KMID": close - first,
        "KLEN": high - low,
        "KUP": high - np.maximum(first, close),
        "KLOW": np.minimum(first, close) - low,
        "KSFT": 2 * close - high - low,
    }
    by_open = {name: part / first for name, part in parts.items()}
    by_range = {f"{name}2": ratio(part, high - low) for name, part in parts.items() if name != "KLEN"}
    prices = (first, high, low, lagged(typical_price(bars), 0))
    return by_open | by_range | {name: price / close for name, price in zip(PRICES, prices, strict=True)}


def typical_price(bars: dict[str, Array]) -> Array:
    """The mean of open, high, low and close, in place of a volume-weighted price, which daily bars do not have."""
    return (bars["open"] + bars["high"] + bars["low"] + bars["close"]) / 4


# Operators: series `(days, stocks)` in, one array `(windows, days - HISTORY, stocks)` out, for the days from `HISTORY`
# on. Going back from today, a short window is the beginning of a longer one: one pass over the lags serves all of them.


def lagged(series: Array, lag: int) -> Array:
    """The values of some days earlier, for every day from `HISTORY` on.

    Args:
        series: `(days, stocks)`.
        lag: Days, from 0 to `HISTORY`.

    Returns:
        `(days - HISTORY, stocks)`, a view.
    """
    return series[HISTORY - lag : len(series) - lag]


def sums(term: Callable[[int], NDArray[Any]]) -> Array:
    """Sums over each window; nothing leaves a running sum again, so no rounding error is left behind.

    Args:
        term: What to add for a lag, `(days - HISTORY, stocks)`.
    """
    total = term(0).astype(np.float64)
    results = []
    for lag in range(1, HISTORY + 1):
        if lag in WINDOWS:
            results.append(total.copy())
        if lag < HISTORY:
            total += term(lag)
    return np.stack(results)


def means(series: Array) -> Array:
    """Means."""
    return sums(lambda lag: lagged(series, lag)) / LENGTH


def codeviations(first: Array, second: Array) -> Array:
    """Sums of products of the deviations from the windows' means.

    Both are taken relative to their latest value, a member of the window, which bounds the loss of precision by a
    factor of d + 1 whatever the level.
    """
    shifted = partial(from_latest, first), partial(from_latest, second)
    products = sums(lambda lag: shifted[0](lag) * shifted[1](lag))
    return products - sums(shifted[0]) * sums(shifted[1]) / LENGTH


def from_latest(series: Array, lag: int) -> Array:
    """Differences of a lagged value from the latest one."""
    return lagged(series, lag) - lagged(series, 0)


def deviations(series: Array) -> Array:
    """Standard deviations with d - 1 in the denominator."""
    return np.sqrt(codeviations(series, series) / (LENGTH - 1))


def correlations(first: Array, second: Array) -> Array:
    """Pearson correlations, NaN where either window is constant."""
    spread = varying(first, codeviations(first, first)), varying(second, codeviations(second, second))
    return codeviations(first, second) / np.sqrt(spread[0] * spread[1])


def varying(series: Array, squares: Array) -> Array:
    """Sums of squared deviations, NaN where the window is constant but for rounding."""
    return np.where(squares > LENGTH * (FLAT * lagged(series, 0)) ** 2, squares, np.nan)


def regress(series: Array) -> tuple[Array, Array, Array]:
    """Least-squares lines over time.

    Returns:
        Slope per day; share of explained variance, NaN where the window is constant; residual of the latest day.
    """
    totals = sums(partial(from_latest, series))
    # Time counts back from the latest day; its mean is (d - 1) / 2.
    middle = (LENGTH - 1) / 2
    with_time = middle * totals - sums(lambda lag: lag * from_latest(series, lag))
    slope = with_time / (LENGTH * (LENGTH**2 - 1) / 12)
    rsquare = slope * with_time / varying(series, codeviations(series, series))
    return slope, rsquare, -totals / LENGTH - slope * middle


def extremes(series: Array, at_least: Callable[[Array, Array], Mask]) -> tuple[Array, Array]:
    """Largest (`np.greater_equal`) or smallest (`np.less_equal`) values, and where they are.

    Returns:
        The values; their positions from 1 / d, the oldest day, to 1, the latest. The oldest of equals counts.
    """
    best = lagged(series, 0).copy()
    age = np.zeros_like(best)
    values, positions = [], []
    for lag in range(1, HISTORY + 1):
        if lag in WINDOWS:
            values.append(best.copy())
            positions.append((lag - age) / lag)
        if lag < HISTORY:
            better = at_least(lagged(series, lag), best)
            np.copyto(best, lagged(series, lag), where=better)
            age[better] = lag
    return np.stack(values), np.stack(positions)


def ranks(series: Array) -> Array:
    """Ranks of the latest value in its window over d; ties share their mean rank."""
    latest = lagged(series, 0)

    def below(lag: int) -> Array:
        return np.less(lagged(series, lag), latest) + 0.5 * np.equal(lagged(series, lag), latest)

    return (sums(below) + 0.5) / LENGTH


def quantiles(series: Array, *shares: float) -> list[Array]:
    """Quantiles, interpolated linearly between the sorted values.

    Args:
        series: The series.
        shares: Each in 0..1.
    """
    results: list[list[Array]] = [[] for _ in shares]
    for window in WINDOWS:
        ordered = np.sort(sliding_window_view(series[HISTORY - window + 1 :], window, axis=0), axis=-1)
        for share, result in zip(shares, results, strict=True):
            below, part = divmod(share * (window - 1), 1)
            lower, upper = ordered[..., int(below)], ordered[..., min(int(below) + 1, window - 1)]
            result.append(lower + part * (upper - lower))
    return [np.stack(result) for result in results]


def changes(series: Array, compare: Callable[[Array, Array], Mask]) -> Array:
    """Shares of days whose value compares so with the day's before."""
    return sums(lambda lag: compare(lagged(series, lag), lagged(series, lag + 1))) / LENGTH


def moves(series: Array) -> tuple[Array, Array]:
    """Shares of the ups and of the downs in the sum of all daily moves; both 0 where nothing moves."""
    up = sums(lambda lag: np.maximum(lagged(series, lag) - lagged(series, lag + 1), 0))
    down = sums(lambda lag: np.maximum(lagged(series, lag + 1) - lagged(series, lag), 0))
    return ratio(up, up + down), ratio(down, up + down)


def ratio(part: Array, whole: Array) -> Array:
    """A quotient, 0 where the denominator is 0."""
    return np.divide(part, whole, out=np.zeros_like(whole), where=whole != 0)


FEATURE_SETS: Mapping[str, tuple[tuple[str, ...], Callable[[dict[str, Array]], dict[str, Array]]]] = {
    "alpha158": (ALPHA158, alpha158),
    "alpha360": (ALPHA360, alpha360),
}
