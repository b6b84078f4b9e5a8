"""Daily bars of many stocks as a panel, who was an index member when, labels and their masks, splits, scaling.

What a value of day t may depend on is the rule of this file: features on t and before, labels on t+1 and t+2, and the
scaling of features on training days alone.
"""

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zoo.data import check_disjoint, check_fields
from zoo.errors import DataNotFoundError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Dates = NDArray[np.datetime64]

BARS = ("open", "high", "low", "close", "volume")
COLUMNS = ("symbol", "date", *BARS)
MEMBERSHIP_COLUMNS = ("index", "symbol", "opt-in", "opt-out")
# How files of Chinese index members write a symbol: the exchange, then the code.
WITH_EXCHANGE = re.compile(r"(?:SH|SZ|BJ)(\d+)")
# Some members are always missing, e.g. the delisted (a fifth to a quarter in the development data); more look wrong.
MOST_MISSING = 0.5
# A new listing trades without the usual price limits.
LISTING_DAYS = 10
# A label reads the closes of the next two days.
LABEL_DAYS = 2
CLIP = 3.0
# Scales a uniform rank in -0.5..0.5 to unit variance, as Qlib does (CSRankNorm).
RANK_SCALE = 3.46


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Panel:
    """Daily bars; all five values of a stock's day are NaN where it was not traded.

    Attributes:
        dates: `(days,)` datetime64[D], ascending: every day on which any of the stocks was traded.
        symbols: Names of the stocks.
        open: `(days, stocks)` prices above zero, as are the next three.
        high: The day's highest price.
        low: The day's lowest price.
        close: The day's last price.
        volume: Traded volume in any unit, above zero.
    """

    dates: Dates
    symbols: tuple[str, ...]
    open: Array
    high: Array
    low: Array
    close: Array
    volume: Array

    def __post_init__(self) -> None:
        shape = len(self.dates), len(self.symbols)
        found = {name: getattr(self, name).shape for name in BARS}
        if set(found.values()) != {shape}:
            raise ValueError(f"A panel of {shape[0]} days and {shape[1]} stocks holds arrays of the shapes {found}.")

    def __repr__(self) -> str:
        span = f", {self.dates[0]}..{self.dates[-1]}" if len(self.dates) else ""
        return f"Panel({len(self.symbols)} stocks, {len(self.dates)} days{span})"

    @property
    def traded(self) -> Mask:
        """`(days, stocks)`: whether the stock was traded on the day."""
        return ~np.isnan(self.close)

    def until(self, last: str | np.datetime64) -> "Panel":
        """What was known on a day: the same stocks without later days.

        Args:
            last: The last day to keep.
        """
        days = int(np.searchsorted(self.dates, np.asarray(last, "datetime64[D]"), side="right"))
        return replace(self, dates=self.dates[:days], **{name: getattr(self, name)[:days] for name in BARS})

    def digest(self) -> str:
        """SHA-256 of everything in it, in hexadecimal."""
        content = hashlib.sha256("\n".join(self.symbols).encode())
        content.update(repr(self.close.shape).encode())
        content.update(self.dates.astype("datetime64[D]").tobytes())
        for name in BARS:
            content.update(np.ascontiguousarray(getattr(self, name), dtype=np.float64).tobytes())
        return content.hexdigest()


def read_panel(path: str | Path, columns: Mapping[str, str] | None = None) -> Panel:
    """Read daily bars, one row per stock and day, from a parquet or CSV file.

    Rows without a price or with a volume of zero are days on which the stock was not traded. A time with a time zone
    counts for the day there.

    Args:
        path: The file.
        columns: The file's names of the columns symbol, date, open, high, low, close and volume, where they differ:
            `{"symbol": "code"}` for the Chinese stocks of the development data, `{"symbol": "name"}` for the American.

    Raises:
        DataNotFoundError: There is no such file.
        ValueError: A column is missing, symbols are numbers, dates cannot be read, a price is not above zero, a stock
            has two rows on one day, or nothing was traded.
    """
    import pandas as pd

    source = {name: name for name in COLUMNS} | dict(columns or {})
    if unknown := source.keys() - set(COLUMNS):
        raise UnknownNameError("key of the column mapping", sorted(unknown)[0], COLUMNS)
    frame = _read_table(Path(path), source)
    if pd.api.types.is_numeric_dtype(frame["symbol"]):
        raise ValueError(
            f"{path}: the symbols in column {source['symbol']!r} are numbers, which have lost their leading zeros. "
            "Write them as text, e.g. '000001'."
        )
    frame = _drop_untraded(frame, path)
    days, dates = pd.factorize(_read_dates(frame["date"], f"{path}, column {source['date']!r}"), sort=True)
    stocks, symbols = pd.factorize(frame["symbol"].astype(str), sort=True)
    cells = days * len(symbols) + stocks
    if len(np.unique(cells)) != len(cells):
        twice = frame[["symbol", "date"]][pd.Series(cells, index=frame.index).duplicated()].iloc[0]
        raise ValueError(f"{path}: two rows for {twice['symbol']} on {twice['date']}. Keep one row per stock and day.")
    bars = {name: np.full((len(dates), len(symbols)), np.nan) for name in BARS}
    for name, values in bars.items():
        values.flat[cells] = frame[name].to_numpy(np.float64)
    return Panel(np.asarray(dates, "datetime64[D]"), tuple(symbols), **bars)


def read_membership(path: str | Path, index: str, panel: Panel) -> Mask:
    """Which stocks were members of an index on each day: opt-in <= day < opt-out.

    The file has the columns index, symbol, opt-in and opt-out, one row per stay; a stay without an opt-out lasts.
    Nothing else of it is read. Symbols are those of the panel; `SH`, `SZ` or `BJ` before a number may be more than the
    panel's have. Members without bars are left out, with a warning if they are most of those of the panel's days.

    Args:
        path: The CSV file.
        index: The index, e.g. csi300.
        panel: Days and stocks.

    Returns:
        `(days, stocks)`.

    Raises:
        DataNotFoundError: There is no such file.
        ValueError: A column is missing, the index is unknown, or none of its members is in the panel.
    """
    rows = _read_table(Path(path), {name: name for name in MEMBERSHIP_COLUMNS})
    if index not in set(rows["index"]):
        raise UnknownNameError("index", index, set(rows["index"]))
    rows = rows[rows["index"] == index]
    column = {symbol: number for number, symbol in enumerate(panel.symbols)}
    members = np.zeros(panel.close.shape, dtype=bool)
    first = _read_dates(rows["opt-in"], f"{path}, column 'opt-in'")
    last = _read_dates(rows["opt-out"], f"{path}, column 'opt-out'")
    listed: dict[str, bool] = {}
    for symbol, start, end in zip(rows["symbol"].astype(str), first, last, strict=True):
        days = (panel.dates >= start) & (np.isnat(end) | (panel.dates < end))
        if days.any():
            place = column.get(symbol, column.get(_without_exchange(symbol)))
            listed[symbol] = place is not None
            if place is not None:
                members[days, place] = True
    if not members.any():
        raise ValueError(
            f"{path}: no member of {index} is in the panel, whose symbols look like {', '.join(panel.symbols[:3])}; "
            f"the file's look like {', '.join(rows['symbol'][:3])}. Write both alike; SH, SZ or BJ before a number may "
            "be left out of the panel's."
        )
    missing = [symbol for symbol, there in listed.items() if not there]
    if len(missing) > MOST_MISSING * len(listed):
        warnings.warn(
            f"{path}: {len(missing)} of {len(listed)} members of {index} have no bars, e.g. {missing[0]}; they are "
            f"left out of all days. The bars' symbols look like {', '.join(panel.symbols[:3])}.",
            stacklevel=2,
        )
    return members


def forward_returns(panel: Panel, horizon: int = 1) -> Array:
    """The return of one day some days ahead, `close[t + horizon + 1] / close[t + horizon] - 1`.

    A horizon of 1 is the label: what a position earns that is opened at the close after the score is known. It is NaN
    unless the stock is traded on t and on both days of the return, so that no return spans a suspension, however long;
    and it is NaN for the first `LISTING_DAYS` days of a stock that was not there on the panel's first day.

    Args:
        panel: The bars.
        horizon: Days between the score and the start of the return; negative looks back.

    Returns:
        `(days, stocks)`.
    """
    start, end = (_ahead(panel.close, horizon + days) for days in (0, 1))
    age = panel.traded.cumsum(axis=0)
    listed = (age > LISTING_DAYS) | panel.traded[:1]
    return np.where(panel.traded & listed, end / start - 1, np.nan)


def rank_normalise(labels: Array, members: Mask) -> Array:
    """Ranks within each day, from uniform to about unit variance (CSRankNorm of Qlib); ties share their mean rank.

    Args:
        labels: `(days, stocks)`, NaN where unknown.
        members: `(days, stocks)`: whom to rank; the others become NaN.

    Returns:
        `(days, stocks)`.
    """
    import pandas as pd

    ranks = pd.DataFrame(np.where(members, labels, np.nan)).rank(axis=1, pct=True).to_numpy()
    return np.asarray((ranks - 0.5) * RANK_SCALE)


def split_days(dates: Dates, spans: Mapping[str, Sequence[str]]) -> dict[str, NDArray[np.intp]]:
    """The days of each split whose label lies within it: its last two days are dropped.

    Args:
        dates: `(days,)`, ascending.
        spans: First and last date by the split's name, both included.

    Returns:
        Positions in `dates` by the split's name.

    Raises:
        ValueError: A span is not two dates, keeps no day, or overlaps another.
    """
    splits = {}
    for name, span in spans.items():
        if len(span) != 2:
            raise ValueError(f"The split {name!r} needs its first and its last date; found {list(span)}.")
        first, last = (np.datetime64(date, "D") for date in span)
        splits[name] = np.flatnonzero((dates >= first) & (dates <= last))[:-LABEL_DAYS]
        if not len(splits[name]):
            there = f"{dates[0]}..{dates[-1]}" if len(dates) else "no day"
            raise ValueError(
                f"The split {name!r} ({first}..{last}) keeps none of the panel's days ({there}): it needs more than "
                f"{LABEL_DAYS}, since the last {LABEL_DAYS} are dropped."
            )
    check_disjoint({name: dates[days].tolist() for name, days in splits.items()})
    return splits


@dataclass(frozen=True, slots=True)
class RobustScaler:
    """Centres features by their median and scales them by 1.4826 times their median absolute deviation.

    Attributes:
        median: `(features,)` float32.
        scale: `(features,)` float32; 1 where the deviation is zero, as it is for a constant.
    """

    median: NDArray[np.float32]
    scale: NDArray[np.float32]

    @classmethod
    def fit(cls, features: NDArray[np.float32], samples: Mask) -> "RobustScaler":
        """Measure it.

        Args:
            features: `(days, stocks, features)`; NaN is ignored.
            samples: `(days, stocks)`: whose features to measure: members on training days.

        Raises:
            ValueError: A feature has no value among the samples.
        """
        median, scale = np.empty((2, features.shape[-1]), dtype=np.float32)
        for index in range(features.shape[-1]):
            values = features[..., index][samples]
            values = values[np.isfinite(values)]
            if not len(values):
                raise ValueError(
                    f"Feature {index} has no value on the {int(samples.sum())} stock-days that it should be scaled by. "
                    "Features start after 60 trading days: begin the training span later, or give earlier bars."
                )
            median[index] = np.median(values)
            deviation = 1.4826 * np.median(np.abs(values - median[index]))
            scale[index] = deviation or 1.0
        return cls(median, scale)

    def apply(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale, clip to +-3 and put 0, the median, where a feature is NaN.

        Args:
            features: `(..., features)`.
        """
        scaled = features - self.median
        scaled /= self.scale
        np.clip(scaled, -CLIP, CLIP, out=scaled)
        scaled[np.isnan(scaled)] = 0
        return scaled


class Style(NamedTuple):
    """How stocks of a planted style look, and what moves them.

    Attributes:
        volatility: Standard deviation of a day's return.
        volume_noise: Standard deviation of a day's log volume.
        momentum: Weight of the return of five days.
        surge: Weight of the day's unusual volume.
        shadow: Weight of how far the day's high lies above its open and close.
    """

    volatility: float
    volume_noise: float
    momentum: float
    surge: float
    shadow: float


# The corners of a tetrahedron: any two rules contradict each other as much as they can, so no expert serves two styles
# well. Over all stocks the weights cancel, though not in features whose size differs from style to style.
STYLES = (
    Style(volatility=0.01, volume_noise=0.2, momentum=1, surge=1, shadow=1),
    Style(volatility=0.01, volume_noise=0.8, momentum=-1, surge=-1, shadow=1),
    Style(volatility=0.03, volume_noise=0.2, momentum=-1, surge=1, shadow=-1),
    Style(volatility=0.03, volume_noise=0.8, momentum=1, surge=-1, shadow=-1),
)
DRIVERS = 3
MOMENTUM_DAYS = 5
# Mean and standard deviation of the size of a standard normal number.
HALF_NORMAL = np.sqrt(2 / np.pi), np.sqrt(1 - 2 / np.pi)


@dataclass(frozen=True, slots=True)
class GeneratedMarket:
    """A synthetic market and what was planted in it.

    Attributes:
        panel: The bars.
        styles: `(days, stocks)` int64: each stock's style on each day, an index into `STYLES`.
        expected: `(days, stocks)`: the part of the label that the style's rule explains.
    """

    panel: Panel
    styles: NDArray[np.int64]
    expected: Array


def generate_market(
    days: int = 600, stocks: int = 200, signal: float = 0.2, regime_days: float = 250.0, seed: int = 0
) -> GeneratedMarket:
    """A synthetic market of four styles, each with a linear rule of its own; stocks change style at random times.

    Args:
        days: Length.
        stocks: Width.
        signal: Correlation between what a style's rule says and the label, within the style; trends feed themselves
            and so show more of it, reversals less.
        regime_days: Mean time between two draws of a stock's style.
        seed: Of everything.

    Raises:
        ValueError: The signal is not in 0..0.4, above which trends explode.
    """
    if not 0 <= signal <= 0.4:
        raise ValueError(f"The signal of the generated market must be in 0..0.4; found {signal}.")
    random = np.random.default_rng(seed)
    shape = days, stocks
    styles = _draw_regimes(random, shape, 1 / regime_days)
    volatility, volume_noise, momentum, surge, shadow = np.array(STYLES).T[:, styles]
    unusual, noise = random.standard_normal((2, *shape))
    gap, above, below = random.standard_normal((3, *shape))
    reach = (np.abs(above) - HALF_NORMAL[0]) / HALF_NORMAL[1]
    own, expected = np.zeros((2, *shape))
    for day in range(1, days):
        drift = expected[day - LABEL_DAYS] if day >= LABEL_DAYS else 0.0
        own[day] = own[day - 1] + drift + np.sqrt(1 - signal**2) * volatility[day] * noise[day]
        trend = (own[day] - own[max(day - MOMENTUM_DAYS, 0)]) / (volatility[day] * np.sqrt(MOMENTUM_DAYS))
        rule = momentum[day] * trend + surge[day] * unusual[day] + shadow[day] * reach[day]
        expected[day] = signal * volatility[day] * rule / np.sqrt(DRIVERS)
    market = 0.005 * random.standard_normal((days, 1)).cumsum(axis=0)
    close = np.exp(random.normal(3, 0.5, stocks) + market + own)
    within = 0.3 * volatility
    opened = np.vstack([close[:1], close[:-1]]) * np.exp(within * gap)
    panel = Panel(
        dates=np.arange(days) + np.datetime64("2000-01-01"),
        symbols=tuple(f"S{number:04}" for number in range(stocks)),
        open=opened,
        high=np.maximum(opened, close) * np.exp(within * np.abs(above)),
        low=np.minimum(opened, close) * np.exp(-within * np.abs(below)),
        close=close,
        volume=np.exp(random.normal(14, 1, stocks) + volume_noise * unusual),
    )
    return GeneratedMarket(panel, styles, expected)


def _draw_regimes(random: np.random.Generator, shape: tuple[int, int], rate: float) -> NDArray[np.int64]:
    drawn = random.integers(len(STYLES), size=shape)
    changes = random.random(shape) < rate
    changes[0] = True
    latest = np.maximum.accumulate(np.where(changes, np.arange(shape[0])[:, None], 0), axis=0)
    return np.take_along_axis(drawn, latest, axis=0)


def _ahead(values: Array, days: int) -> Array:
    rows = np.arange(len(values)) + days
    inside = (rows >= 0) & (rows < len(values))
    return np.where(inside[:, None], values[rows.clip(0, len(values) - 1)], np.nan)


def _without_exchange(symbol: str) -> str:
    match = WITH_EXCHANGE.fullmatch(symbol)
    return match[1] if match else symbol


def _read_table(path: Path, source: Mapping[str, str]) -> "pd.DataFrame":
    """The columns under our names; whatever is not a number in a CSV file stays text."""
    import pandas as pd

    if not path.is_file():
        raise DataNotFoundError(f"the table {path.name}", [path], "Name a parquet or CSV file.")
    if path.suffix.lower() not in (".parquet", ".csv"):
        raise ValueError(f"{path}: its suffix names no format. Allowed: .parquet, .csv.")
    if path.suffix.lower() == ".csv":
        text = {column: str for name, column in source.items() if name not in BARS}
        frame = pd.read_csv(path, dtype=text)
        check_fields(frame, path)
    else:
        frame = pd.read_parquet(path)
    if missing := [column for column in source.values() if column not in frame]:
        raise ValueError(
            f"{path} has no column {missing[0]!r}. Found: {', '.join(map(str, frame.columns))}. "
            f"Say which column is which, e.g. columns={{{next(iter(source))!r}: ...}}."
        )
    return pd.DataFrame({name: frame[column] for name, column in source.items()})


def _drop_untraded(frame: "pd.DataFrame", path: str | Path) -> "pd.DataFrame":
    traded = frame[list(BARS)].notna().all(axis=1) & (frame["volume"] != 0)
    frame = frame[traded]
    if frame.empty:
        raise ValueError(f"{path}: no row has all of {', '.join(BARS)} and a volume above zero.")
    good = (frame[list(BARS)] > 0).all(axis=1) & np.isfinite(frame[list(BARS)]).all(axis=1)
    if not good.all():
        row = frame[~good].iloc[0]
        raise ValueError(
            f"{path}: {int((~good).sum())} rows hold a price or volume that is not a number above zero, e.g. "
            f"{row['symbol']} on {row['date']}. Correct them, or leave them empty if the stock was not traded."
        )
    return frame


def _read_dates(values: "pd.Series", where: str) -> Dates:
    import pandas as pd

    if not pd.api.types.is_datetime64_any_dtype(values):
        # Numbers such as 20200102 would be read as nanoseconds.
        text = values.astype("string")
        try:
            values = pd.to_datetime(text, format="ISO8601")
        except ValueError as error:
            raise ValueError(f"{where}: cannot read a date ({error}). Write 2020-01-31 or 20200131.") from error
    # The cast alone would go through UTC, where an evening in New York or a morning in Shanghai is another day.
    values = values.dt.tz_localize(None)
    return np.asarray(values, "datetime64[D]")
