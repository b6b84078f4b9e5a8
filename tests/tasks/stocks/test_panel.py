"""Reading bars and membership, labels and their masks, ranks, splits, scaling, and the generated market."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from tasks.stocks.panel import (
    BARS,
    STYLES,
    Panel,
    RobustScaler,
    forward_returns,
    generate_market,
    rank_normalise,
    read_membership,
    read_panel,
    split_days,
)
from zoo.errors import DataNotFoundError, UnknownNameError


def table(**changes) -> pd.DataFrame:
    """Two stocks on three days, the second not there on the second day."""
    rows = {
        "code": ["000001", "600000", "000001", "000001", "600000"],
        "date": ["2024-01-02", "2024-01-02", "2024-01-03", "2024-01-04", "2024-01-04"],
        "open": [10.0, 20, 11, 12, 21],
        "high": [10.5, 20, 11, 12, 21],
        "low": [9.5, 20, 11, 12, 21],
        "close": [10.0, 20, 11, 12, 21],
        "volume": [100, 200, 300, 400, 500],
    }
    return pd.DataFrame(rows | changes)


def write(frame: pd.DataFrame, path):
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    return path


def panel_of(close, start="2024-01-01") -> Panel:
    close = np.asarray(close, dtype=np.float64)
    names = tuple(f"{number:06}" for number in range(close.shape[1]))
    return Panel(np.arange(len(close)) + np.datetime64(start), names, *[close] * 5)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_bars_are_placed_by_day_and_symbol(tmp_path, suffix):
    path = write(table().iloc[::-1], tmp_path / f"bars.{suffix}")
    panel = read_panel(path, {"symbol": "code"})
    assert panel.symbols == ("000001", "600000")
    np.testing.assert_array_equal(panel.dates, np.array(["2024-01-02", "2024-01-03", "2024-01-04"], "datetime64[D]"))
    np.testing.assert_array_equal(panel.close, [[10, 20], [11, np.nan], [12, 21]])
    np.testing.assert_array_equal(panel.volume, [[100, 200], [300, np.nan], [400, 500]])
    np.testing.assert_array_equal(panel.high[0], [10.5, 20])
    np.testing.assert_array_equal(panel.traded, [[True, True], [True, False], [True, True]])
    assert repr(panel) == "Panel(2 stocks, 3 days, 2024-01-02..2024-01-04)"


@pytest.mark.parametrize("dates", [[20240102, 20240102, 20240103, 20240104, 20240104], None])
def test_dates_may_be_numbers_or_timestamps(tmp_path, dates):
    frame = table(date=dates) if dates else table().assign(date=lambda rows: pd.to_datetime(rows["date"]))
    for suffix in ("csv", "parquet"):
        panel = read_panel(write(frame, tmp_path / f"bars.{suffix}"), {"symbol": "code"})
        assert list(panel.dates.astype(str)) == ["2024-01-02", "2024-01-03", "2024-01-04"]


@pytest.mark.parametrize("zone", ["Asia/Shanghai", "America/New_York"])
def test_dates_of_a_time_zone_stay_on_their_day(tmp_path, zone):
    late = pd.to_datetime(table()["date"]) + pd.Timedelta(hours=0 if zone == "Asia/Shanghai" else 20)
    for suffix in ("csv", "parquet"):
        frame = table().assign(date=late.dt.tz_localize(zone))
        panel = read_panel(write(frame, tmp_path / f"bars.{suffix}"), {"symbol": "code"})
        assert list(panel.dates.astype(str)) == ["2024-01-02", "2024-01-03", "2024-01-04"]


def test_empty_rows_and_zero_volume_are_days_without_trade(tmp_path):
    frame = table(volume=[100, 200, 0, 400, 500], close=[10.0, np.nan, 11, 12, 21])
    panel = read_panel(write(frame, tmp_path / "bars.csv"), {"symbol": "code"})
    assert len(panel.dates) == 2
    for name in BARS:
        np.testing.assert_array_equal(np.isnan(getattr(panel, name)), [[False, True], [False, False]])


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (table().drop(columns="open"), "no column 'open'. Found: code, date, high"),
        (table(close=[10.0, 20, -11, 12, 21]), "1 rows hold .* e.g. 000001 on 2024-01-03"),
        (table(high=[np.inf, 20, 11, 12, 21]), "not a number above zero"),
        (table(date=["2024-01-02"] * 5), "two rows for 000001 on 2024-01-02"),
        (table(date=["soon"] * 5), "cannot read a date"),
        (table(volume=0), "volume above zero"),
        (table(code=[1, 600000, 1, 1, 600000]), "leading zeros"),
    ],
)
def test_unusable_tables_say_why(tmp_path, frame, words):
    with pytest.raises(ValueError, match=words):
        read_panel(write(frame, tmp_path / "bars.parquet"), {"symbol": "code"})


def test_unusable_arguments_say_why(tmp_path):
    with pytest.raises(DataNotFoundError, match=r"bars\.csv"):
        read_panel(tmp_path / "bars.csv")
    (tmp_path / "bars.xls").touch()
    with pytest.raises(ValueError, match=r"Allowed: \.parquet, \.csv"):
        read_panel(tmp_path / "bars.xls")
    with pytest.raises(UnknownNameError, match="Did you mean 'symbol'"):
        read_panel(write(table(), tmp_path / "bars.csv"), {"symbols": "code"})
    with pytest.raises(ValueError, match="holds arrays of the shapes"):
        replace(panel_of(np.ones((3, 2))), close=np.ones((2, 2)))


def test_until_keeps_the_last_day_and_all_stocks():
    panel = panel_of(np.arange(1.0, 11).reshape(5, 2))
    cut = panel.until("2024-01-03")
    assert cut.symbols == panel.symbols and cut.dates[-1] == np.datetime64("2024-01-03")
    np.testing.assert_array_equal(cut.volume, panel.volume[:3])
    assert cut.digest() != panel.digest() == panel.until("2030-01-01").digest()


def membership(tmp_path, rows) -> str:
    path = tmp_path / "membership.csv"
    names = ["index", "symbol", "code", "name", "opt-in", "opt-out"]
    pd.DataFrame(rows, columns=names).to_csv(path, index=False)
    return path


def test_members_from_opt_in_to_the_day_before_opt_out(tmp_path):
    panel = panel_of(np.ones((6, 3)))
    path = membership(
        tmp_path,
        [
            ("csi300", "SZ000000", 0, "a", "2024-01-02", "2024-01-04"),
            ("csi300", "SZ000000", 0, "a", "2024-01-06", None),
            ("csi500", "SZ000001", 1, "b", "2005-04-08", None),
            ("csi300", "SH000002", 2, "c", "2005-04-08", "2024-01-03"),
            ("csi300", "SH900000", 2, "d", "2005-04-08", None),
        ],
    )
    members = read_membership(path, "csi300", panel)
    np.testing.assert_array_equal(members.T.astype(int), [[0, 1, 1, 0, 0, 1], [0] * 6, [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(read_membership(path, "csi500", panel)[:, 1], True)
    with pytest.raises(UnknownNameError, match="csi300, csi500"):
        read_membership(path, "csi1000", panel)
    with pytest.raises(ValueError, match="no member of csi500 is in the panel"):
        read_membership(path, "csi500", replace(panel, symbols=("0", "1", "2")))


def test_members_are_matched_by_their_whole_symbol(tmp_path):
    bars = panel_of(np.ones((6, 4)))
    stays = [("own", symbol, 0, "a", "2005-04-08", None) for symbol in ("AAPL", "BAC", "FOXA", "XA")]
    path = membership(tmp_path, stays)
    members = read_membership(path, "own", replace(bars, symbols=("AAPL", "BAC", "C", "FOXA")))
    assert members.all(axis=0).tolist() == [True, True, False, True]
    # As in Qlib's files, where the bars' symbols have the exchange too.
    stays = [("own", symbol, 0, "a", "2005-04-08", None) for symbol in ("SH600000", "SZ000001", "BJ830000", "SHEL")]
    path = membership(tmp_path, stays)
    members = read_membership(path, "own", replace(bars, symbols=("SH600000", "000001", "830000", "EL")))
    assert members.all(axis=0).tolist() == [True, True, True, False]


def test_members_without_bars_are_counted_if_they_are_most(tmp_path):
    bars = replace(panel_of(np.ones((6, 4))), symbols=("AAPL", "BAC", "C", "FOXA"))
    stays = [("own", symbol, 0, "a", "2005-04-08", None) for symbol in ("AAPL", "BAC US", "C US", "AAPL")]
    left = ("own", "GE", 0, "a", "1990-01-01", "2023-12-31")
    with pytest.warns(UserWarning, match=r"2 of 3 members of own have no bars, e.g. BAC US; .* look like AAPL, BAC, C"):
        assert read_membership(membership(tmp_path, [*stays, left]), "own", bars).any(axis=0).tolist()[0]
    # Half of them, and one that left before the first day: no warning, which would be an error here.
    read_membership(membership(tmp_path, [*stays[:2], left]), "own", bars)


def test_membership_knows_no_future(tmp_path):
    panel = panel_of(np.ones((6, 1)))
    members = {}
    for leaves in ("2024-01-04", "2024-01-06", None):
        path = membership(tmp_path, [("csi300", "SZ000000", 0, "a", "2024-01-02", leaves)])
        members[leaves] = read_membership(path, "csi300", panel)
    for other in members.values():
        np.testing.assert_array_equal(other[:3], members["2024-01-04"][:3])
    assert members["2024-01-04"].sum() == 2 and members[None].sum() == 5


def test_label_is_the_return_from_tomorrow_to_the_day_after():
    close = np.array([[10.0], [11], [12], [15], [9]])
    labels = forward_returns(panel_of(close))
    np.testing.assert_allclose(labels[:, 0], [12 / 11 - 1, 15 / 12 - 1, 9 / 15 - 1, np.nan, np.nan])
    np.testing.assert_allclose(forward_returns(panel_of(close), 0)[:, 0], [0.1, 12 / 11 - 1, 0.25, -0.4, np.nan])
    np.testing.assert_allclose(forward_returns(panel_of(close), -2)[:, 0], [np.nan, np.nan, 0.1, 12 / 11 - 1, 0.25])


@pytest.mark.parametrize("length", [1, 5, 6, 20])
def test_no_label_spans_a_suspension(length):
    close = np.linspace(10, 20, 40)[:, None].repeat(2, axis=1)
    close[10 : 10 + length, 0] = np.nan
    labels = forward_returns(panel_of(close))
    # Days whose own, next or second-next close is missing.
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(labels[:, 0])), [*range(8, 10 + length), 38, 39])
    assert np.isfinite(labels[:38, 1]).all()


def test_first_ten_days_of_a_listing_have_no_label():
    close = np.linspace(10, 20, 40)[:, None].repeat(2, axis=1)
    close[:7, 0] = np.nan
    close[12, 0] = np.nan
    labels = forward_returns(panel_of(close))
    # Days 7..17 but 12 are the first ten.
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(labels[:, 0])), range(18, 38))
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(labels[:, 1])), range(38))


def test_ranks_within_the_day_among_members():
    labels = np.random.default_rng(0).normal(size=(3, 50))
    labels[0, :10] = np.nan
    labels[1, 20:25] = 0.5
    members = np.random.default_rng(1).random((3, 50)) < 0.8
    ranked = rank_normalise(labels, members)
    for day in range(3):
        kept = members[day] & np.isfinite(labels[day])
        np.testing.assert_array_equal(np.isfinite(ranked[day]), kept)
        expected = (stats.rankdata(labels[day, kept]) / kept.sum() - 0.5) * 3.46
        np.testing.assert_allclose(ranked[day, kept], expected)
    others = np.where(members, labels, 1e9)
    np.testing.assert_array_equal(rank_normalise(others, members), ranked)


def test_splits_drop_the_two_days_whose_label_lies_beyond():
    dates = np.arange("2024-01-01", "2024-01-21", dtype="datetime64[D]")
    spans = {"train": ("2023-12-01", "2024-01-10"), "val": ("2024-01-11", "2024-01-15"), "test": ["2024-01-16", "2025"]}
    days = split_days(dates, spans)
    assert {name: (part[0], part[-1]) for name, part in days.items()} == {
        "train": (0, 7),
        "val": (10, 12),
        "test": (15, 17),
    }
    # No training label reads a close of the next split.
    assert days["train"].max() + 2 < 10


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ({"train": ("2024-01-01", "2024-01-10"), "val": ("2024-01-06", "2024-01-15")}, "share 3 samples"),
        ({"val": ("2024-01-06", "2024-01-07")}, "more than 2"),
        ({"val": ("2025-01-01", "2025-12-31")}, r"none of the panel's days \(2024-01-01\.\.2024-01-20\)"),
        ({"val": ("2025-01-01",)}, "first and its last date"),
    ],
)
def test_unusable_splits_say_why(spans, words):
    dates = np.arange("2024-01-01", "2024-01-21", dtype="datetime64[D]")
    with pytest.raises(ValueError, match=words):
        split_days(dates, spans)


def test_scaler_is_fitted_on_its_samples_alone():
    random = np.random.default_rng(0)
    features = random.lognormal(size=(8, 30, 3)).astype(np.float32)
    features[..., 2] = 7
    features[2, :5, 0] = np.nan
    samples = np.zeros((8, 30), dtype=bool)
    samples[:5] = random.random((5, 30)) < 0.7
    scaler = RobustScaler.fit(features, samples)
    spread = stats.median_abs_deviation(features[samples], axis=0, scale=1 / 1.4826, nan_policy="omit")
    np.testing.assert_allclose(scaler.scale[:2], spread[:2], rtol=1e-5)
    np.testing.assert_allclose(scaler.median, np.nanmedian(features[samples], axis=0))
    changed = np.where(samples[..., None], features, 100)
    np.testing.assert_array_equal(RobustScaler.fit(changed, samples).scale, scaler.scale)

    scaled = scaler.apply(features)
    expected = (features - scaler.median) / scaler.scale
    assert scaled.dtype == np.float32 and np.nanmax(expected) > 3
    np.testing.assert_allclose(scaled, np.nan_to_num(np.clip(expected, -3, 3)), rtol=1e-6)
    assert (scaled[2, :5, 0] == 0).all() and (scaled[..., 2] == 0).all()


def test_scaler_needs_samples():
    with pytest.raises(ValueError, match="Feature 1 has no value"):
        RobustScaler.fit(np.array([[[1.0, np.nan]]], dtype=np.float32), np.array([[True]]))


def test_generated_market_follows_its_planted_rules():
    market = generate_market(500, 150, signal=0.3, seed=1)
    labels = forward_returns(market.panel)
    assert np.isfinite(labels[:-2]).all()
    assert (market.panel.high >= np.maximum(market.panel.open, market.panel.close)).all()
    assert (market.panel.low <= np.minimum(market.panel.open, market.panel.close)).all()
    for number in range(len(STYLES)):
        within = market.styles[10:-2] == number
        # Relative to the day's market, which moves all stocks alike.
        own = labels[10:-2] - np.median(labels[10:-2], axis=1, keepdims=True)
        correlation = np.corrcoef(own[within], market.expected[10:-2][within])[0, 1]
        # Trends feed themselves, reversals calm themselves.
        assert correlation == pytest.approx(0.3, abs=0.03), number


def test_generated_styles_change_seldom_and_cancel():
    market = generate_market(500, 150, regime_days=100, seed=1)
    changes = (np.diff(market.styles, axis=0) != 0).mean()
    # A quarter of the draws leaves the style as it is.
    assert changes == pytest.approx(0.0075, rel=0.15)
    rules = np.array([(style.momentum, style.surge, style.shadow) for style in STYLES])
    assert np.array_equal(rules @ rules.T, 4 * np.eye(4) - 1)
    momentum = np.log(market.panel.close[5:] / market.panel.close[:-5])[:-2]
    pooled = np.corrcoef(momentum.ravel(), forward_returns(market.panel)[5:-2].ravel())[0, 1]
    assert abs(pooled) < 0.05


def test_generated_market_is_seeded():
    first, again, other = (generate_market(30, 4, seed=seed).panel.digest() for seed in (5, 5, 6))
    assert first == again != other
    with pytest.raises(ValueError, match=r"0\.\.0\.4; found 0\.9"):
        generate_market(signal=0.9)
