"""Days of stocks: the development data, a file or a Qlib store of the user's own, or a generated market.

One batch is one day: all members of the universe that have features. Features are given as computed; the network scales
them, by what `StocksDataModule.scaler` measured on the training days.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tasks.stocks.features import ALPHA158, ALPHA360, FEATURE_SETS, HISTORY, Features, have_features, load_features
from tasks.stocks.panel import (
    BARS,
    Array,
    Dates,
    Mask,
    Panel,
    RobustScaler,
    forward_returns,
    generate_market,
    rank_normalise,
    read_membership,
    read_panel,
    split_days,
)
from zoo.data import EpochSampler, LateLoader, ZooDataModule, find
from zoo.errors import DataNotFoundError, UnknownNameError

Days = NDArray[np.intp]
Spans = Mapping[str, Sequence[str]]

# What Qlib's GRU and other sequence models read of Alpha158.
ALPHA20 = (
    *("RESI5", "WVMA5", "RSQR5", "KLEN", "RSQR10", "CORR5", "CORD5", "CORR10", "ROC60", "RESI10"),
    *("VSTD5", "RSQR60", "CORR60", "WVMA60", "STD5", "RSQR20", "CORD60", "CORD10", "CORR20", "KLOW"),
)
# Names by the set that they are computed in; OPEN0, HIGH0, LOW0 and VWAP0 are in both.
CHOICES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "alpha20": {"alpha158": ALPHA20},
    "alpha158": {"alpha158": ALPHA158},
    "alpha360": {"alpha360": ALPHA360},
    "both": {"alpha158": ALPHA158, "alpha360": ALPHA360},
}


@dataclass(frozen=True, slots=True)
class PublicSource:
    """Bars below the data root.

    Attributes:
        bars: The file.
        columns: Its names of our columns.
        spans: First and last date of the splits.
        membership: The file of its indices' members; without one all stocks that were traded are members.
        index: The index whose members are ranked.
    """

    bars: str
    columns: Mapping[str, str]
    spans: Spans
    membership: str | None = None
    index: str | None = None


def chinese(index: str) -> PublicSource:
    """A Chinese index."""
    return PublicSource(
        "stocks/cn_csi800_ever.parquet",
        {"symbol": "code"},
        # Features start once 60 trading days exist.
        {
            "train": ("2020-04-01", "2022-12-31"),
            "val": ("2023-01-01", "2023-12-31"),
            "test": ("2024-01-01", "2024-12-31"),
        },
        "stocks/membership_csi300_csi500.csv",
        index,
    )


SOURCES = {
    "csi300": chinese("csi300"),
    "csi500": chinese("csi500"),
    "sp500": PublicSource(
        "stocks/us_sp500_2013_2018.parquet",
        {"symbol": "name"},
        {
            "train": ("2013-06-01", "2015-12-31"),
            "val": ("2016-01-01", "2016-12-31"),
            "test": ("2017-01-01", "2018-02-07"),
        },
    ),
}
HOW_TO_GET_BARS = (
    "This file is part of the development data; for bars of your own use source=file with --data.file, for Qlib's "
    "source=qlib with --data.folder; source=generated needs none."
)
# Which arguments describe a source that is not public.
OWN_ARGUMENTS = {
    "file": ("file", "columns", "membership", "index"),
    "qlib": ("folder", "index"),
    "generated": ("market",),
}
# How a generated market is divided, the days before the first features left out.
GENERATED_SHARES = (0.6, 0.2, 0.2)
PARTS = ("train", "val", "test")
PARTS_OF_STAGE = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": (), None: PARTS}


@dataclass(slots=True)
class Day:
    """One day's stocks; not frozen, since Lightning sets its fields when it moves it to a device.

    Attributes:
        features: `(N, T, F)` float32 on the last T days of the panel, this day last. A feature is NaN where it has no
            value, and all are on days on which the stock was not traded or had too short a history.
        labels: `(N,)` float32, what is learned: the rank of the return among the day's members, of about unit variance;
            NaN where the return is unknown.
        returns: `(N,)` float32, `forward_returns`.
        positions: `(N,)` int64, the stocks' columns in the panel.
        symbols: Their names.
        date: In ISO format.
    """

    features: Tensor
    labels: Tensor
    returns: Tensor
    positions: Tensor
    symbols: list[str]
    date: str

    def __len__(self) -> int:
        return len(self.symbols)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class FeatureTable:
    """Chosen features of a panel.

    Attributes:
        names: F names.
        parts: Arrays `(days, stocks, features)` whose features together are F; a whole feature set stays mapped from
            the cache.
        there: `(days, stocks)`: who has features.
    """

    names: tuple[str, ...]
    parts: tuple[Features, ...]
    there: Mask

    @classmethod
    def load(cls, panel: Panel, chosen: Mapping[str, Sequence[str]], cache: str | Path | None = None) -> "FeatureTable":
        """Compute them, or read them from the cache.

        Args:
            panel: The bars.
            chosen: Names by feature set, as `choose_features` gives them.
            cache: As for `load_features`.
        """
        parts, there = [], np.zeros(panel.close.shape, dtype=bool)
        for feature_set, names in chosen.items():
            known = FEATURE_SETS[feature_set][0]
            values = np.asarray(load_features(panel, feature_set, cache))
            there = have_features(values)
            whole = tuple(names) == known
            parts.append(values if whole else values[..., [known.index(name) for name in names]])
        return cls(tuple(name for names in chosen.values() for name in names), tuple(parts), there)

    def window(self, day: int, stocks: NDArray[np.intp], length: int) -> Features:
        """The last days of some stocks.

        Args:
            day: Position of the last one.
            stocks: `(N,)` columns.
            length: T.

        Returns:
            `(N, T, F)`.
        """
        rows = slice(day - length + 1, day + 1)
        values = np.concatenate([part[rows][:, stocks] for part in self.parts], axis=-1)
        return np.ascontiguousarray(values.swapaxes(0, 1))

    def fit_scaler(self, samples: Mask) -> RobustScaler:
        """Measure how to scale them.

        Args:
            samples: `(days, stocks)`: on whom.

        Raises:
            ValueError: A feature has no value among them.
        """
        days = np.flatnonzero(samples.any(axis=1))
        rows = slice(days[0], days[-1] + 1)
        scalers = [RobustScaler.fit(part[rows], samples[rows]) for part in self.parts]
        return RobustScaler(
            np.concatenate([scaler.median for scaler in scalers]), np.concatenate([scaler.scale for scaler in scalers])
        )


class DayDataset(Dataset[Day]):
    """Days of a panel, each with the members that have features.

    Attributes:
        panel: The bars.
        table: The features.
        members: `(days, stocks)`: who is ranked, and learned from.
        universe: `(days, stocks)`: members that have features.
        days: Positions of the days that have any such stock.
        window: T.
        returns: `(days, stocks)` of `forward_returns`.
        labels: `(days, stocks)`: their ranks among members.
    """

    def __init__(self, panel: Panel, table: FeatureTable, members: Mask, days: Days, window: int) -> None:
        """Compute the labels.

        Args:
            panel: The bars.
            table: Their features.
            members: `(days, stocks)`.
            days: Positions in the panel; those on which no member has features are left out.
            window: T.

        Raises:
            ValueError: No day is left.
        """
        self.panel = panel
        self.table = table
        self.members = members
        self.window = window
        self.universe = members & table.there
        self.days = days[self.universe[days].any(axis=1)]
        if not len(self.days):
            raise ValueError(
                f"No member has features on {describe_days(panel.dates[days])}: a stock has some once it was traded on "
                f"more than {HISTORY} days. Give earlier bars, or look at later days."
            )
        self.returns = forward_returns(panel)
        self.labels = rank_normalise(self.returns, members)

    def __len__(self) -> int:
        return len(self.days)

    def __getitem__(self, index: int) -> Day:
        return self.day(index, self.window)

    @property
    def samples(self) -> Mask:
        """`(days, stocks)` of the panel: the stock-days that it holds."""
        held = np.zeros_like(self.universe)
        held[self.days] = self.universe[self.days]
        return held

    def day(self, index: int, window: int) -> Day:
        """A day.

        Args:
            index: Its place in `days`.
            window: T, in place of the dataset's own.
        """
        row = self.days[index]
        stocks = np.flatnonzero(self.universe[row])
        return Day(
            features=torch.from_numpy(self.table.window(row, stocks, window)),
            labels=torch.from_numpy(self.labels[row, stocks]).float(),
            returns=torch.from_numpy(self.returns[row, stocks]).float(),
            positions=torch.from_numpy(stocks),
            symbols=[self.panel.symbols[stock] for stock in stocks],
            date=str(self.panel.dates[row]),
        )


class StocksDataModule(ZooDataModule):
    """Days of stocks for learning, validation and test, and the latest day to predict.

    Training may see the members of more indices than are scored. Whoever is not a member on a day is not in its batch,
    whatever becomes of it later.

    Attributes:
        panel: The bars of all stocks that were ever members; set by `setup`, as are the next three.
        members: `(days, stocks)`: the members of the index that is scored.
        learned: `(days, stocks)`: the members of what is learned from, None before `setup` for fitting.
        table: The features.
        scaler: What `setup` for fitting measured on the training days' members, None before.
        styles: `(days, stocks)`, the planted styles of a generated market.
    """

    train_set: DayDataset | None = None
    val_set: DayDataset | None = None
    test_set: DayDataset | None = None
    predict_set: DayDataset | None = None
    panel: Panel | None = None
    members: Mask
    learned: Mask | None = None
    table: FeatureTable
    scaler: RobustScaler | None = None
    styles: NDArray[np.int64] | None = None

    def __init__(
        self,
        root: str | None = None,
        source: Literal["csi300", "csi500", "sp500", "file", "qlib", "generated"] = "csi300",
        file: str | None = None,
        columns: dict[str, str] | None = None,
        membership: str | None = None,
        folder: str | None = None,
        index: str | None = None,
        market: dict[str, Any] | None = None,
        features: str | list[str] = "alpha158",
        window: int = 20,
        train: list[str] | None = None,
        val: list[str] | None = None,
        test: list[str] | None = None,
        train_index: list[str] | None = None,
        cache: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Describe the data; nothing is read before `setup`.

        Args:
            root: Data root with `stocks/`; else `MOE_ZOO_DATA`.
            source: An index of the development data; `file`, bars of the user's own; `qlib`, a store of Qlib's;
                `generated`, a synthetic market with planted styles.
            file: Daily bars in a parquet or CSV file, see `read_panel`.
            columns: Its names of the columns symbol, date, open, high, low, close, volume where they differ.
            membership: A CSV file of index members, see `read_membership`; without one all stocks that were traded are
                members.
            folder: Qlib's store, with `calendars/`, `features/` and `instruments/`.
            index: Whose members are scored: an index of the membership file, or a file of `instruments/` (`all` if left
                out).
            market: Arguments of `generate_market` other than the seed, where they differ.
            features: `alpha158`, `alpha360`, `both`, `alpha20` (of Alpha158, those of Qlib's sequence models), or a
                list of their features' names.
            window: T, days that the network sees, up to 60.
            train: First and last date to learn from; a public source brings its own, as for the next two. A split's
                last two days are dropped, since their labels lie beyond.
            val: The same for choosing settings.
            test: The same for the score.
            train_index: Indices whose members are learned from, e.g. `[csi300, csi500]`; those of the scored index if
                left out. Only fitting reads them.
            cache: Folder for computed features; without one they are computed anew.
            num_workers: Processes that load.
            seed: Seed of the order, and of a generated market.

        Raises:
            UnknownNameError: There is no such source or feature.
            ValueError: The window is too long, or an argument is for another source.
        """
        super().__init__(batch_size=1, num_workers=num_workers, seed=seed)
        self.save_hyperparameters()
        if not 1 <= window <= HISTORY:
            raise ValueError(f"window={window}: must be in 1..{HISTORY}, as features start after {HISTORY} days.")
        self.root = root
        self.source = source
        self.file = file
        self.columns = columns
        self.membership = membership
        self.folder = folder
        self.index = index
        self.market = market
        self.chosen = choose_features(features)
        self.window = window
        self.spans = {name: span for name, span in (("train", train), ("val", val), ("test", test)) if span}
        self.train_index = train_index
        self.cache = cache
        self.check_source()

    def check_source(self) -> None:
        """Refuse an unknown source, and arguments that would have no effect on the one that is named."""
        if self.source not in (*SOURCES, *OWN_ARGUMENTS):
            raise UnknownNameError("source of stocks", self.source, (*SOURCES, *OWN_ARGUMENTS))
        mine = OWN_ARGUMENTS.get(self.source, ())
        for source, arguments in OWN_ARGUMENTS.items():
            for name in arguments:
                if getattr(self, name) is not None and name not in mine:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no effect on source={self.source!r}: it is for "
                        f"source={source!r}."
                    )
        if self.source == "file" and (self.index is None) != (self.membership is None):
            raise ValueError(
                f"index={self.index!r}, membership={self.membership!r}: name both the file of members and the index in "
                "it whose members are scored, or neither."
            )
        known = signature(generate_market).parameters.keys() - {"seed"}
        if unknown := (self.market or {}).keys() - known:
            raise UnknownNameError("argument of the generated market", sorted(unknown)[0], known)

    def setup(self, stage: str | None = None) -> None:
        """Read bars, members and features once, and set up the parts that the stage needs.

        Raises:
            ValueError: A split that the stage needs has no dates or no day with features.
        """
        fitting = "train" in PARTS_OF_STAGE[stage]
        if self.panel is None or (fitting and self.learned is None):
            self.panel, self.members, self.learned = self.read(fitting)
            self.table = FeatureTable.load(self.panel, self.chosen, self.cache)
        if stage == "predict":
            latest = np.array([len(self.panel.dates) - 1])
            self.predict_set = DayDataset(self.panel, self.table, self.members, latest, self.window)
            return
        days = split_days(self.panel.dates, self.default_spans() | self.spans)
        for part in PARTS_OF_STAGE[stage]:
            if part not in days:
                raise ValueError(f"source={self.source!r} needs the dates of {part}: --data.{part} '[FIRST, LAST]'.")
            members = self.learned if part == "train" else self.members
            setattr(self, f"{part}_set", DayDataset(self.panel, self.table, members, days[part], self.window))
        if fitting:
            self.scaler = self.table.fit_scaler(self.train_set.samples)

    def default_spans(self) -> dict[str, Sequence[str]]:
        """The splits of a public source or a generated market; none of the user's own."""
        if self.source in SOURCES:
            return dict(SOURCES[self.source].spans)
        if self.source != "generated":
            return {}
        dates = self.panel.dates[HISTORY:].astype(str)
        ends = np.round(np.cumsum((0, *GENERATED_SHARES)) * len(dates)).astype(int)
        return {part: (dates[first], dates[last - 1]) for part, first, last in zip(PARTS, ends, ends[1:], strict=False)}

    def read(self, fitting: bool) -> tuple[Panel, Mask, Mask | None]:
        """Bars of all stocks that were ever members, and who was a member when.

        Args:
            fitting: Whether there will be learning; otherwise `train_index` is left alone.

        Returns:
            The bars, members of the scored index, and members of what is learned from, None without fitting.
        """
        extra = self.train_index or [] if fitting else []
        panel = self.read_bars(extra)
        index = SOURCES[self.source].index if self.source in SOURCES else self.index
        members = self.read_members(panel, index)
        learned = np.logical_or.reduce([self.read_members(panel, name) for name in extra]) if extra else members
        ever = (members | learned).any(axis=0)
        return keep_stocks(panel, ever), members[:, ever], learned[:, ever] if fitting else None

    def read_bars(self, extra: Sequence[str]) -> Panel:
        """All bars of the source.

        Args:
            extra: Indices of a Qlib store whose stocks to read too.

        Raises:
            DataNotFoundError: They are not there, or not named.
        """
        if self.source in SOURCES:
            public = SOURCES[self.source]
            return read_panel(find(self.root, public.bars, HOW_TO_GET_BARS), public.columns)
        if self.source == "generated":
            generated = generate_market(**(self.market or {}), seed=self.seed)
            self.styles = generated.styles
            return generated.panel
        if self.source == "qlib":
            return read_store(self.store(), [self.index or "all", *extra])
        if not self.file:
            raise DataNotFoundError("the bars", [], "Name a parquet or CSV file with --data.file FILE.")
        return read_panel(self.file, self.columns)

    def read_members(self, panel: Panel, index: str | None) -> Mask:
        """Members of an index on each day, `(days, stocks)`; without one, all stocks that were traded.

        Raises:
            ValueError: An index is named, but no file of members.
        """
        if self.source == "qlib":
            return read_instruments(self.store(), index or "all", panel)
        path: str | Path | None = self.membership
        if self.source in SOURCES and (relative := SOURCES[self.source].membership):
            path = find(self.root, relative, HOW_TO_GET_BARS)
        if index is None:
            return panel.traded
        if path is None:
            raise ValueError(f"train_index names {index!r}, but source={self.source!r} has no file of members.")
        return read_membership(path, index, panel)

    def store(self) -> Path:
        """Qlib's store.

        Raises:
            DataNotFoundError: It is not there.
        """
        if not self.folder or not (Path(self.folder) / "calendars/day.txt").is_file():
            looked = [Path(self.folder) / "calendars/day.txt"] if self.folder else []
            raise DataNotFoundError("Qlib's store of daily bars", looked, "Name its folder with --data.folder DIR.")
        return Path(self.folder)

    def loader(self, dataset: Dataset[Any], shuffle: bool = False, **options: Any) -> DataLoader[Any]:
        """A loader whose batches are days."""
        return LateLoader(
            dataset,
            batch_size=None,
            sampler=EpochSampler(len(dataset), self.seed) if shuffle else None,  # type: ignore[arg-type]
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
            **options,
        )

    def describe(self) -> str:
        """What training uses, in words for a model card."""
        synthetic = " (synthetic)" if self.source == "generated" else ""
        learned = ", ".join(self.train_index) if self.train_index else self.index or self.source
        return (
            f"{self.train_set.samples.sum()} stock-days of {learned}{synthetic}, "
            f"{describe_days(self.panel.dates[self.train_set.days])}; settings chosen on "
            f"{describe_days(self.panel.dates[self.val_set.days])}"
        )


def choose_features(features: str | Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """Names of features by the set that they are computed in.

    Args:
        features: A name in `CHOICES`, or a list of features of Alpha158 and Alpha360.

    Raises:
        UnknownNameError: There is no such choice or feature.
        ValueError: The list is empty, or names a feature twice.
    """
    if isinstance(features, str):
        if features not in CHOICES:
            raise UnknownNameError("features", features, CHOICES, "Or give a list of names.")
        return CHOICES[features]
    if not features or len(set(features)) != len(features):
        raise ValueError(f"features={list(features)}: give one or more names, each once.")
    if unknown := [name for name in features if name not in (*ALPHA158, *ALPHA360)]:
        raise UnknownNameError("feature", unknown[0], (*ALPHA158, *ALPHA360))
    chosen = {
        "alpha158": tuple(name for name in features if name in ALPHA158),
        "alpha360": tuple(name for name in features if name not in ALPHA158),
    }
    return {feature_set: names for feature_set, names in chosen.items() if names}


def keep_stocks(panel: Panel, kept: Mask) -> Panel:
    """A panel of some of its stocks.

    Args:
        panel: The bars.
        kept: `(stocks,)`.
    """
    symbols = tuple(symbol for symbol, keep in zip(panel.symbols, kept, strict=True) if keep)
    return replace(panel, symbols=symbols, **{name: getattr(panel, name)[:, kept] for name in BARS})


def describe_days(dates: Dates) -> str:
    """Days in words."""
    return f"{dates[0]}..{dates[-1]}" if len(dates) > 1 else str(dates[0])


# --- Qlib's store ----------------------------------------------------------------------------------------------------


def read_store(folder: Path, indices: Sequence[str]) -> Panel:
    """Daily bars of Qlib's binary store.

    `calendars/day.txt` lists the days; `features/<symbol>/<field>.day.bin` holds little-endian float32 numbers, the
    first of which is the place of the second in the calendar. Days on which any bar is NaN or the volume is zero are
    days on which the stock was not traded.

    Args:
        folder: The store.
        indices: Files of `instruments/` whose stocks to read.

    Raises:
        DataNotFoundError: A file of `instruments/` is missing, or all bars are.
        ValueError: Bars do not fit the calendar, or a price is not above zero.
    """
    calendar = np.array((folder / "calendars/day.txt").read_text().split(), "datetime64[D]")
    listed = sorted({stay.symbol for index in indices for stay in read_stays(folder, index)})
    symbols = [symbol for symbol in listed if (folder / "features" / symbol.lower()).is_dir()]
    if not symbols:
        raise DataNotFoundError("any stock's bars", [folder / "features"], f"Listed are {', '.join(listed[:3])}, ...")
    if missing := sorted(set(listed) - set(symbols)):
        warnings.warn(
            f"{folder}: {len(missing)} of {len(listed)} listed stocks have no bars, e.g. {missing[0]}; they are left "
            "out of all days.",
            stacklevel=2,
        )
    bars = {name: np.full((len(calendar), len(symbols)), np.nan) for name in BARS}
    for name, values in bars.items():
        for column, symbol in enumerate(symbols):
            path = folder / "features" / symbol.lower() / f"{name}.day.bin"
            start, series = read_field(path)
            if start < 0 or start + len(series) > len(calendar):
                raise ValueError(
                    f"{path} holds {len(series)} days from day {start} on, but the calendar has {len(calendar)}."
                )
            values[start : start + len(series), column] = series
    traded = np.isfinite(list(bars.values())).all(axis=0) & (bars["volume"] != 0)
    for name, values in bars.items():
        values[~traded] = np.nan
        if (values <= 0).any():
            day, column = np.argwhere(values <= 0)[0]
            raise ValueError(f"{folder}: the {name} of {symbols[column]} on {calendar[day]} is not above zero.")
    days = traded.any(axis=1)
    return Panel(calendar[days], tuple(symbols), **{name: values[days] for name, values in bars.items()})


def read_field(path: Path) -> tuple[int, Array]:
    """Place of the first day in the calendar, and the values from there on.

    Raises:
        DataNotFoundError: There is no such file.
        ValueError: It is empty.
    """
    if not path.is_file():
        raise DataNotFoundError(f"the field {path.name}", [path], "Dump the store again with this field.")
    values = np.fromfile(path, "<f4")
    if not len(values):
        raise ValueError(f"{path} is empty: dump the store again.")
    return int(values[0]), values[1:].astype(np.float64)


class Stay(NamedTuple):
    """A stock's stay in an index, both days included."""

    symbol: str
    first: np.datetime64
    last: np.datetime64


def read_stays(folder: Path, index: str) -> list[Stay]:
    """The lines of `instruments/<index>.txt`: symbol, first and last day.

    Raises:
        UnknownNameError: There is no such file.
        ValueError: A line is not these three.
    """
    path = folder / "instruments" / f"{index}.txt"
    if not path.is_file():
        raise UnknownNameError("index", index, [file.stem for file in (folder / "instruments").glob("*.txt")])
    rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
    if wrong := [row for row in rows if len(row) != 3]:
        raise ValueError(f"{path}: expected a symbol, its first and its last day; found {' '.join(wrong[0])!r}.")
    return [Stay(symbol, np.datetime64(first, "D"), np.datetime64(last, "D")) for symbol, first, last in rows]


def read_instruments(folder: Path, index: str, panel: Panel) -> Mask:
    """Which stocks were in a file of Qlib's `instruments/` on each day.

    Args:
        folder: The store.
        index: The file's name without suffix.
        panel: Days and stocks.

    Returns:
        `(days, stocks)`.
    """
    column = {symbol: number for number, symbol in enumerate(panel.symbols)}
    members = np.zeros(panel.close.shape, dtype=bool)
    for symbol, first, last in read_stays(folder, index):
        if symbol in column:
            members[(panel.dates >= first) & (panel.dates <= last), column[symbol]] = True
    return members
