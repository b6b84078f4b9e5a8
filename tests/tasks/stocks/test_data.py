"""Days as batches: what is in them, who, in which order, and that nothing of them comes from the future."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from scipy import stats

from tasks.stocks.data import ALPHA20, DayDataset, FeatureTable, StocksDataModule, choose_features, read_store
from tasks.stocks.features import ALPHA158, ALPHA360, HISTORY, compute_features
from tasks.stocks.panel import BARS, Panel, RobustScaler, forward_returns, generate_market
from zoo.data import ENVIRONMENT_VARIABLE
from zoo.errors import DataNotFoundError, UnknownNameError

DAYS, STOCKS = 110, 8
SPANS = {
    "train": ["2000-01-01", "2000-03-20"],
    "val": ["2000-03-21", "2000-04-02"],
    "test": ["2000-04-03", "2000-04-19"],
}


@pytest.fixture(scope="module")
def panel() -> Panel:
    """One stock is suspended from day 85 to 87, one is listed on day 30."""
    whole = generate_market(DAYS, STOCKS, seed=3).panel
    bars = {name: getattr(whole, name).copy() for name in BARS}
    for values in bars.values():
        values[85:88, 2] = values[:30, 3] = np.nan
    symbols = tuple(f"{number:06}" for number in range(STOCKS))
    return replace(whole, symbols=symbols, **bars)


def write_bars(panel: Panel, path: Path) -> str:
    days, stocks = np.nonzero(panel.traded)
    names = np.array(panel.symbols)[stocks]
    columns = {name: getattr(panel, name)[days, stocks] for name in BARS}
    pd.DataFrame({"symbol": names, "date": panel.dates[days].astype(str), **columns}).to_parquet(path)
    return str(path)


STAYS = [
    ("large", "SZ000000", "1999-01-01", None),
    ("large", "SZ000001", "1999-01-01", "2000-03-05"),
    ("large", "SZ000001", "2000-03-25", None),
    ("large", "SZ000002", "1999-01-01", None),
    ("large", "SZ000003", "1999-01-01", None),
    ("large", "SZ000004", "2000-04-10", None),
    ("small", "SZ000005", "1999-01-01", "2000-03-10"),
    ("small", "SZ000006", "2000-03-01", None),
]


def write_members(path: Path, stays: list[tuple[str, str, str, str | None]]) -> str:
    pd.DataFrame(stays, columns=["index", "symbol", "opt-in", "opt-out"]).to_csv(path, index=False)
    return str(path)


@pytest.fixture(scope="module")
def own(panel: Panel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("own")
    return {
        "source": "file",
        "file": write_bars(panel, folder / "bars.parquet"),
        "membership": write_members(folder / "members.csv", STAYS),
        "index": "large",
        "features": "alpha20",
        "window": 4,
        "cache": str(folder / "cache"),
        **SPANS,
    }


def set_up(stage: str | None = None, **arguments: Any) -> StocksDataModule:
    module = StocksDataModule(**arguments)
    module.setup(stage)
    return module


def sets(module: StocksDataModule) -> dict[str, DayDataset]:
    return {part: getattr(module, f"{part}_set") for part in ("train", "val", "test") if getattr(module, f"{part}_set")}


def days_of(module: StocksDataModule) -> Iterator[tuple[str, Any]]:
    return ((part, dataset[i]) for part, dataset in sets(module).items() for i in range(len(dataset)))


# --- one day ---------------------------------------------------------------------------------------------------------


def was_member(index: str, symbol: str, date: str) -> bool:
    return any(
        stay[0] == index and stay[1][2:] == symbol and stay[2] <= date and (stay[3] is None or date < stay[3])
        for stay in STAYS
    )


def test_a_day_holds_its_members_and_what_is_known_of_them(own: dict[str, Any], panel: Panel) -> None:
    features = compute_features(panel, "alpha158")[..., [ALPHA158.index(name) for name in ALPHA20]]
    returns = forward_returns(panel)
    module, seen = set_up(**own), set()
    for _, day in days_of(module):
        row = int(np.flatnonzero(panel.dates == np.datetime64(day.date))[0])
        members = [s for s in range(STOCKS) if was_member("large", panel.symbols[s], day.date)]
        inside = [s for s in members if np.isfinite(features[row, s, 0])]
        assert day.symbols == [panel.symbols[s] for s in inside] and len(day) == len(inside)
        assert [module.panel.symbols[p] for p in day.positions] == day.symbols
        assert day.features.shape == (len(inside), 4, 20) and day.features.dtype == torch.float32
        assert day.labels.dtype == day.returns.dtype == torch.float32
        for place, stock in enumerate(inside):
            np.testing.assert_array_equal(day.features[place], features[row - 3 : row + 1, stock])
        np.testing.assert_allclose(day.returns, returns[row, inside], rtol=1e-6)
        known = [s for s in members if np.isfinite(returns[row, s])]
        ranks = dict(zip(known, (stats.rankdata(returns[row, known]) / len(known) - 0.5) * 3.46, strict=True))
        np.testing.assert_allclose(day.labels, [ranks.get(s, np.nan) for s in inside], rtol=1e-6)
        seen |= {(s, day.date) for s in day.symbols}
    dates = {symbol: sorted(date for other, date in seen if other == symbol) for symbol in panel.symbols}
    assert "2000-03-04" in dates["000001"] and "2000-03-05" not in dates["000001"], "the last day of its first stay"
    assert "2000-03-24" not in dates["000001"] and "2000-03-25" in dates["000001"], "the first day of its second"
    assert dates["000004"][0] == "2000-04-10" and not dates["000005"] and not dates["000006"]
    assert dates["000003"][0] == str(panel.dates[30 + HISTORY]), "a stock comes in once it has a history"


def test_a_suspension_leaves_holes_in_the_window(own: dict[str, Any], panel: Panel) -> None:
    module = set_up(**(own | {"window": 8}))
    holes = {}
    for _, day in days_of(module):
        if "000002" in day.symbols:
            holes[day.date] = torch.isnan(day.features[day.symbols.index("000002")]).all(1).tolist()
    assert [str(date) in holes for date in panel.dates[84:89]] == [True, False, False, False, True]
    assert holes[str(panel.dates[84])] == [False] * 8
    assert holes[str(panel.dates[88])] == [False] * 4 + [True] * 3 + [False]


def test_first_window_reaches_back_before_the_first_features(own: dict[str, Any]) -> None:
    module = set_up("fit", **(own | {"window": HISTORY}))
    first = module.train_set[0]
    assert first.features.shape[1] == HISTORY
    assert torch.isnan(first.features[:, :-1]).all() and torch.isfinite(first.features[0, -1]).all()


# --- nothing from the future -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["2000-04-06", "2000-04-12"])
def test_days_are_the_same_when_the_data_end_earlier(
    own: dict[str, Any], panel: Panel, tmp_path: Path, cut: str
) -> None:
    known = [(*stay[:3], stay[3] if stay[3] and stay[3] <= cut else None) for stay in STAYS if stay[2] <= cut]
    early = set_up(**own)
    short = set_up(
        **own
        | {
            "file": write_bars(panel.until(cut), tmp_path / "bars.parquet"),
            "membership": write_members(tmp_path / "members.csv", known),
            "cache": None,
        }
    )
    np.testing.assert_array_equal(short.scaler.median, early.scaler.median)
    np.testing.assert_array_equal(short.scaler.scale, early.scaler.scale)
    whole = {day.date: day for _, day in days_of(early)}
    compared = [day for _, day in days_of(short)]
    assert compared[-1].date == str(np.datetime64(cut) - 2)
    for day in compared:
        assert day.symbols == whole[day.date].symbols
        for name in ("features", "labels", "returns"):
            assert torch.equal(getattr(day, name).nan_to_num(9), getattr(whole[day.date], name).nan_to_num(9)), name
    (latest,) = set_up("predict", **own | {"file": str(tmp_path / "bars.parquet")}).predict_dataloader()
    assert latest.date == cut and latest.symbols == whole[cut].symbols
    assert torch.equal(latest.features.nan_to_num(9), whole[cut].features.nan_to_num(9))
    assert torch.isnan(latest.labels).all()


def test_no_label_of_a_split_reads_a_price_of_the_next(own: dict[str, Any], panel: Panel) -> None:
    for part, dataset in sets(set_up(**own)).items():
        first, last = (np.datetime64(date) for date in SPANS[part])
        start = max(first, panel.dates[HISTORY])
        np.testing.assert_array_equal(panel.dates[dataset.days], np.arange(start, last - 1))


def test_scaling_is_measured_on_training_members_alone(own: dict[str, Any], panel: Panel, tmp_path: Path) -> None:
    module = set_up("fit", **own)
    rows = [stock for part, day in days_of(module) if part == "train" for stock in day.features[:, -1].numpy()]
    expected = RobustScaler.fit(np.stack(rows)[None], np.ones((1, len(rows)), dtype=bool))
    np.testing.assert_array_equal(module.scaler.median, expected.median)
    np.testing.assert_array_equal(module.scaler.scale, expected.scale)
    bars = {name: getattr(panel, name).copy() for name in BARS}
    others = np.random.default_rng(0).uniform(5, 50, panel.close.shape)
    for values in bars.values():
        values[80:], values[:, 4:] = others[80:], others[:, 4:]
    changed = set_up("fit", **own | {"file": write_bars(replace(panel, **bars), tmp_path / "bars.parquet")})
    np.testing.assert_array_equal(changed.scaler.scale, module.scaler.scale)
    assert not torch.equal(changed.val_set[3].features, module.val_set[3].features)


# --- who is learned from, features, order ----------------------------------------------------------------------------


def test_more_members_may_be_learned_from_than_are_scored(own: dict[str, Any]) -> None:
    module, alone = set_up(**own, train_index=["large", "small"]), set_up(**own)
    assert alone.panel.symbols == tuple(f"{number:06}" for number in range(5))
    assert module.panel.symbols == tuple(f"{number:06}" for number in range(7))
    for (part, day), (_, scored) in zip(days_of(module), days_of(alone), strict=True):
        wanted = [s for s in module.panel.symbols if s in scored.symbols or was_member("small", s, day.date)]
        assert day.symbols == (wanted if part == "train" else scored.symbols)
        if part != "train":
            assert torch.equal(day.labels.nan_to_num(9), scored.labels.nan_to_num(9))
    assert module.members.shape[1] == 7 and not module.members[:, 5:].any()
    assert module.scaler.median.tolist() != alone.scaler.median.tolist()


def test_only_fitting_reads_what_is_learned_from(own: dict[str, Any]) -> None:
    module = set_up("test", **own, train_index=["nowhere"])
    assert module.learned is None and module.panel.symbols == set_up("test", **own).panel.symbols
    with pytest.raises(UnknownNameError, match="nowhere"):
        module.setup("fit")
    module = set_up("test", **own, train_index=["small"])
    module.setup("fit")
    assert module.panel.symbols[-1] == "000006" and module.learned[:, -1].any()


def test_without_members_all_that_is_traded_counts(own: dict[str, Any], panel: Panel) -> None:
    module = set_up("test", **own | {"membership": None, "index": None})
    assert module.panel.symbols == panel.symbols
    assert all(len(module.test_set[i]) == STOCKS for i in range(len(module.test_set)) if i > 3)


@pytest.mark.parametrize(
    ("features", "names"),
    [
        ("alpha20", ALPHA20),
        ("alpha158", ALPHA158),
        ("alpha360", ALPHA360),
        ("both", ALPHA158 + ALPHA360),
        (["CLOSE3", "CORR60", "OPEN0", "KMID"], ("CORR60", "OPEN0", "KMID", "CLOSE3")),
    ],
)
def test_features_by_name(panel: Panel, features: str | list[str], names: tuple[str, ...]) -> None:
    table = FeatureTable.load(panel, choose_features(features))
    assert table.names == names
    values = {
        name: compute_features(panel, feature_set)[90, :3, known.index(name)]
        for feature_set, known in (("alpha360", ALPHA360), ("alpha158", ALPHA158))
        for name in (known[0], known[-1], *names[:5])
        if name in known and name in names
    }
    window = table.window(90, np.arange(3), 2)
    assert window.shape == (3, 2, len(names)) and window.flags.c_contiguous
    for name, expected in values.items():
        np.testing.assert_array_equal(window[:, -1, names.index(name)], expected, err_msg=name)
    np.testing.assert_array_equal(table.there, panel.traded & (panel.traded.cumsum(axis=0) > HISTORY))
    scaler = table.fit_scaler(table.there & (np.arange(DAYS) < 90)[:, None])
    assert scaler.median.shape == scaler.scale.shape == (len(names),)
    np.testing.assert_allclose(scaler.median[-1], np.nanmedian(table.parts[-1][:90][table.there[:90]][:, -1]))


def dates(module: StocksDataModule, epoch: int) -> list[str]:
    loader = module.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [day.date for day in loader]


def test_order_depends_on_seed_and_epoch_alone(own: dict[str, Any]) -> None:
    module = set_up("fit", **own)
    ordered = [str(date) for date in module.panel.dates[module.train_set.days]]
    torch.manual_seed(99)
    assert dates(module, 3) == dates(set_up("fit", **own), 3) != dates(module, 4)
    assert dates(module, 3) != dates(set_up("fit", **own, seed=1), 3)
    assert sorted(dates(module, 3)) == ordered != dates(module, 3)
    assert [day.date for day in module.val_dataloader()] == [f"2000-03-{day}" for day in range(21, 32)]


class Seen(pl.LightningModule):
    """Remembers what Lightning hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        self.log("loss", self.weight.detach())
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        assert len(batch) == len(batch.features) > 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_hands_over_days(own: dict[str, Any]) -> None:
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    task, module = Seen(), StocksDataModule(**own)
    trainer = pl.Trainer(max_epochs=2, enable_model_summary=False, log_every_n_steps=1, **options)
    trainer.fit(task, module)
    assert [day.date for day in task.seen] == dates(module, 0) + dates(module, 1)
    moved = module.transfer_batch_to_device(task.seen[0], torch.device("meta"), 0)
    assert moved.features.device.type == moved.positions.device.type == "meta" and moved.symbols == task.seen[0].symbols


def test_worker_processes_load_the_same_days(own: dict[str, Any]) -> None:
    alone, helped = (list(set_up("test", **own, num_workers=n).test_dataloader()) for n in (0, 1))
    assert [day.date for day in alone] == [day.date for day in helped]
    assert all(
        torch.equal(a.features.nan_to_num(9), b.features.nan_to_num(9)) for a, b in zip(alone, helped, strict=True)
    )


# --- sources ---------------------------------------------------------------------------------------------------------


def test_generated_market_brings_its_styles_and_splits() -> None:
    market = {"days": 120, "stocks": 12}
    module = set_up(source="generated", market=market, window=1, seed=5)
    planted = generate_market(120, 12, seed=5)
    assert np.array_equal(module.styles, planted.styles) and module.panel.symbols == planted.panel.symbols
    spans = {part: (dataset.days[0], dataset.days[-1]) for part, dataset in sets(module).items()}
    assert spans == {"train": (60, 93), "val": (96, 105), "test": (108, 117)}
    assert "408 stock-days of generated (synthetic), 2000-03-01..2000-04-03" in module.describe()


def write_store(panel: Panel, folder: Path, extra_days: int = 2) -> None:
    """Qlib's layout; the calendar starts before the bars."""
    calendar = np.concatenate([panel.dates[:1] - np.arange(extra_days, 0, -1), panel.dates])
    (folder / "calendars").mkdir(parents=True)
    (folder / "calendars/day.txt").write_text("\n".join(calendar.astype(str)) + "\n")
    for column, symbol in enumerate(panel.symbols):
        rows = np.flatnonzero(panel.traded[:, column])
        target = folder / "features" / f"sz{symbol}"
        target.mkdir(parents=True)
        for name in BARS:
            series = getattr(panel, name)[rows[0] : rows[-1] + 1, column]
            start = rows[0] + extra_days
            np.concatenate([[start], series]).astype("<f4").tofile(target / f"{name}.day.bin")
    (folder / "instruments").mkdir()
    listed = [f"SZ{symbol}\t1990-01-01\t2030-12-31" for symbol in panel.symbols]
    (folder / "instruments/all.txt").write_text("\n".join(listed) + "\n")
    stays = ["SZ000001\t2000-03-05\t2000-03-09", "SZ000001\t2000-03-20\t2030-12-31", "SZ000002\t1999-01-01\t2000-03-30"]
    (folder / "instruments/few.txt").write_text("\n".join(stays) + "\n")


@pytest.fixture
def store(panel: Panel, tmp_path: Path) -> Path:
    write_store(panel, tmp_path / "qlib")
    return tmp_path / "qlib"


def test_a_store_of_qlib_is_read_like_the_file(store: Path, panel: Panel, own: dict[str, Any]) -> None:
    read = read_store(store, ["all"])
    assert read.symbols == tuple(f"SZ{symbol}" for symbol in panel.symbols)
    np.testing.assert_array_equal(read.dates, panel.dates)
    for name in BARS:
        np.testing.assert_allclose(getattr(read, name), getattr(panel, name), rtol=1e-6)
    arguments = {name: own[name] for name in ("train", "val", "test", "window", "features")}
    module = set_up(source="qlib", folder=str(store), index="few", train_index=["few", "all"], **arguments)
    held = [(day.date, symbol) for part, day in days_of(module) if part != "train" for symbol in day.symbols]
    assert {date for date, symbol in held if symbol == "SZ000002"} == {
        f"2000-03-{day}" for day in (21, 22, 23, 24, 25, 29, 30)
    }, "suspended on three days, a member until the last"
    assert module.members[:, module.panel.symbols.index("SZ000001")].sum() == 5 + DAYS - 79
    assert len(module.train_set[0]) > 2
    whole = set_up("predict", source="qlib", folder=str(store), features=["KMID"], window=1)
    assert len(whole.predict_set[0]) == STOCKS


def test_days_without_volume_or_with_holes_are_no_trading_days(store: Path, panel: Panel) -> None:
    path = store / "features/sz000000/volume.day.bin"
    values = np.fromfile(path, "<f4")
    values[1 + 70], values[1 + 71] = 0, np.nan
    values.tofile(path)
    read = read_store(store, ["all"])
    assert np.flatnonzero(~read.traded[:, 0]).tolist() == [70, 71]
    assert all(np.isnan(getattr(read, name)[70:72, 0]).all() for name in BARS)


def test_a_broken_store_says_what_is_wrong(store: Path) -> None:
    with pytest.raises(UnknownNameError, match="all, few"):
        read_store(store, ["csi300"])
    (store / "instruments/more.txt").write_text("SZ000001 2000-01-01 2030-01-01\nSZ999999 2000-01-01 2030-01-01\n")
    with pytest.warns(UserWarning, match="1 of 2 listed stocks have no bars, e.g. SZ999999"):
        assert read_store(store, ["more"]).symbols == ("SZ000001",)
    (store / "instruments/none.txt").write_text("SZ999999 2000-01-01 2030-01-01\n")
    with pytest.raises(DataNotFoundError, match="SZ999999"):
        read_store(store, ["none"])
    (store / "instruments/bad.txt").write_text("SZ000001 2000-01-01\n")
    with pytest.raises(ValueError, match=r"bad\.txt: expected a symbol"):
        read_store(store, ["bad"])
    close = store / "features/sz000001/close.day.bin"
    values = np.fromfile(close, "<f4")
    np.append(values, 1).astype("<f4").tofile(close)
    with pytest.raises(ValueError, match=r"111 days from day 2 on, but the calendar has 112"):
        read_store(store, ["few"])
    values[1:3] = -1
    values.tofile(close)
    with pytest.raises(ValueError, match="the close of SZ000001 on 2000-01-01 is not above zero"):
        read_store(store, ["few"])
    close.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        read_store(store, ["few"])
    close.unlink()
    with pytest.raises(DataNotFoundError, match=r"close\.day\.bin"):
        read_store(store, ["few"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": "csi30"}, "Did you mean 'csi300'"),
        ({"features": "alpha159"}, "Did you mean 'alpha158'"),
        ({"features": ["KMID", "KMAX"]}, "KMAX"),
        ({"features": ["KMID", "KMID"]}, "each once"),
        ({"features": []}, "one or more"),
        ({"window": 61}, r"window=61: must be in 1\.\.60"),
        ({"file": "bars.csv"}, "has no effect on source='csi300': it is for source='file'"),
        ({"source": "generated", "folder": "qlib"}, "it is for source='qlib'"),
        ({"source": "file", "market": {"days": 3}}, "it is for source='generated'"),
        ({"source": "file", "index": "csi300"}, "index='csi300', membership=None: name both"),
        ({"source": "file", "membership": "members.csv"}, "index=None, membership='members.csv': name both"),
        ({"source": "generated", "market": {"seed": 3}}, "Allowed: days, regime_days, signal, stocks"),
        ({"source": "generated", "market": {"stock": 3}}, "Did you mean 'stocks'"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StocksDataModule(**arguments)


def test_data_that_are_missing(own: dict[str, Any], tmp_path: Path, panel: Panel) -> None:
    with pytest.raises(DataNotFoundError, match="source=generated needs none"):
        set_up(root=str(tmp_path))
    with pytest.raises(DataNotFoundError, match=r"--data\.file"):
        set_up(source="file")
    for folder in (None, str(tmp_path)):
        with pytest.raises(DataNotFoundError, match=r"--data\.folder"):
            set_up(source="qlib", folder=folder)
    with pytest.raises(ValueError, match=r"source='file' needs the dates of test: --data\.test"):
        set_up("test", **own | {"test": None})
    with pytest.raises(ValueError, match="train_index names 'small'"):
        set_up(**own | {"membership": None, "index": None, "train_index": ["small"]})
    with pytest.raises(ValueError, match=r"No member has features on 2000-01-01\.\.2000-02-27"):
        set_up("fit", **own | {"train": ["2000-01-01", "2000-02-29"]})
    short = write_bars(panel.until(panel.dates[50]), tmp_path / "bars.parquet")
    with pytest.raises(ValueError, match="No member has features on 2000-02-20: a stock has some once"):
        set_up("predict", **own | {"file": short})


@pytest.mark.skipif(not os.environ.get(ENVIRONMENT_VARIABLE), reason=f"{ENVIRONMENT_VARIABLE} names no data folder")
def test_real_members() -> None:
    panel, members, learned = StocksDataModule(train_index=["csi300", "csi500"]).read(fitting=True)
    assert panel.close.shape == members.shape == (1212, 840)
    assert (members.sum(1).min(), members.sum(1).max()) == (238, 271) and learned.sum(1).min() > 600
    assert not (members & ~learned).any() and members.any(0).sum() == 370
