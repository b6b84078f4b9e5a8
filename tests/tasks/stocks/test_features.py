"""Every feature against its reference, the windows' rules, what must not leak, and the cache."""

import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from tasks.stocks import features as module
from tasks.stocks.features import (
    ALPHA158,
    ALPHA360,
    FEATURE_SETS,
    HISTORY,
    cache_path,
    compute_features,
    have_features,
    load_features,
)
from tasks.stocks.panel import BARS, Panel, generate_market, read_membership, read_panel
from tests.tasks.stocks import reference
from zoo.errors import UnknownNameError

DAYS = 90
REFERENCES = {"alpha158": reference.alpha158, "alpha360": reference.alpha360}


@pytest.fixture(scope="module")
def panel() -> Panel:
    """Five stocks: one complete, one suspended twice, one listed late, one too young, one in ticks and mostly still."""
    whole = generate_market(DAYS, 5, seed=3).panel
    bars = {name: getattr(whole, name).copy() for name in BARS}
    for name, values in bars.items():
        values[5, 1] = values[70:80, 1] = np.nan
        values[:15, 2] = values[:40, 3] = np.nan
        values[:, 4] = 1000 if name == "volume" else values[:, 4].round(0)
    bars["open"][:, 4] = bars["high"][:, 4] = bars["low"][:, 4] = bars["close"][:, 4]
    bars["close"][:75, 4] = bars["high"][:75, 4] = bars["low"][:75, 4] = bars["open"][:75, 4] = 20.0
    return replace(whole, **bars)


@pytest.fixture(scope="module", params=FEATURE_SETS)
def computed(request, panel):
    return request.param, compute_features(panel, request.param)


def own_days(panel: Panel, stock: int) -> pd.DataFrame:
    """A stock's bars on the days on which it was traded, by the day's position in the panel."""
    return pd.DataFrame({name: getattr(panel, name)[:, stock] for name in BARS}).dropna()


def test_names_are_complete_and_unique():
    assert len(ALPHA158) == len(set(ALPHA158)) == 158
    assert len(ALPHA360) == len(set(ALPHA360)) == 360
    # The order in which Qlib lists them.
    assert ALPHA158[:3] == ("KMID", "KLEN", "KMID2") and ALPHA158[13] == "ROC5" and ALPHA158[-1] == "VSUMD60"
    assert ALPHA360[0] == "CLOSE59" and ALPHA360[59:61] == ("CLOSE0", "OPEN59") and ALPHA360[-1] == "VOLUME0"


def test_every_feature_equals_its_reference(panel, computed):
    name, features = computed
    names = FEATURE_SETS[name][0]
    days = {0: (60, 61, 74, 89), 1: (61, 69, 80, 85), 2: (75, 80, 89), 4: (60, 76, 81, 89)}
    for stock, chosen in days.items():
        bars = own_days(panel, stock)
        for day in chosen:
            expected = REFERENCES[name](bars.loc[:day])
            assert set(expected) == set(names)
            np.testing.assert_allclose(
                features[day, stock], [expected[feature] for feature in names], rtol=1e-5, atol=1e-6, err_msg=f"{day}"
            )


def test_features_start_after_sixty_earlier_trading_days_of_the_stock(panel, computed):
    features = computed[1]
    there = have_features(features)
    expected = panel.traded & (panel.traded.cumsum(axis=0) > HISTORY)
    np.testing.assert_array_equal(there, expected)
    assert expected[:, :3].any(axis=0).all() and not expected[:, 3].any() and not expected[70:80, 1].any()
    assert np.isnan(features[~expected]).all()
    assert np.isfinite(features[expected & (np.arange(5) < 4)]).all()


def test_a_panel_shorter_than_the_history_has_no_features(panel, computed):
    assert np.isnan(compute_features(panel.until(panel.dates[HISTORY - 1]), computed[0])).all()
    assert have_features(compute_features(panel.until(panel.dates[HISTORY]), computed[0])).sum() == 2


def test_correlations_with_a_constant_are_nan_and_ratios_are_zero(panel):
    still = dict(zip(ALPHA158, compute_features(panel, "alpha158")[70, 4], strict=True))
    for name in ("RSQR", "CORR", "CORD"):
        assert all(np.isnan(still[f"{name}{window}"]) for window in module.WINDOWS)
    for name in ("KMID2", "KUP2", "KLOW2", "KSFT2", "RSV60", "SUMP60", "SUMD5", "VSUMP5", "WVMA20", "STD60", "BETA30"):
        assert still[name] == 0, name
    assert sum(map(np.isnan, still.values())) == 15


def test_constant_up_to_rounding_counts_as_constant():
    rounding = 1e-9 * np.random.default_rng(0).standard_normal((2, 70, 1))
    price, volume = np.cumprod(1.1 * (1 + rounding), axis=1)
    panel = Panel(np.arange(70) + np.datetime64("2020-01-01"), ("A",), *[price] * 4, volume)
    features = dict(zip(ALPHA158, compute_features(panel, "alpha158")[-1, 0], strict=True))
    assert all(np.isnan(features[f"CORD{window}"]) for window in module.WINDOWS)
    assert all(features[f"CORR{window}"] > 0.8 for window in module.WINDOWS)


def test_precision_at_high_levels(panel):
    level = replace(panel, **{name: getattr(panel, name) + 1e6 for name in BARS if name != "volume"})
    features = compute_features(level, "alpha158")[80, 0]
    expected = reference.alpha158(own_days(level, 0).loc[:80])
    for name in ("STD60", "RSQR60", "CORR60", "BETA5", "RESI60"):
        assert features[ALPHA158.index(name)] == pytest.approx(expected[name], rel=1e-4), name


def test_no_feature_knows_the_future(panel, computed):
    name, features = computed
    for day in (61, 70, 79, 83):
        cut = compute_features(panel.until(panel.dates[day]), name)
        np.testing.assert_array_equal(cut, features[: day + 1])


def test_the_leak_test_would_notice(panel):
    shifted = replace(panel, **{name: np.roll(getattr(panel, name), -1, axis=0) for name in BARS})
    cut = panel.until(panel.dates[70])
    early = replace(cut, **{name: np.roll(getattr(cut, name), -1, axis=0) for name in BARS})
    differs = compute_features(early, "alpha158")[70] != compute_features(shifted, "alpha158")[70]
    # Ranks, places and counts of days may agree by chance.
    measured = [not name.startswith(("RANK", "IMAX", "IMIN", "IMXD", "CNT")) for name in ALPHA158]
    assert sum(measured) == 123 and differs[0][measured].all()


@pytest.mark.parametrize("scaled", [BARS[:4], BARS[4:]])
def test_levels_are_no_features(panel, computed, scaled):
    name, features = computed
    times = np.array([3, 3, 0.01, 1, 7.0])
    other = compute_features(replace(panel, **{bar: getattr(panel, bar) * times for bar in scaled}), name)
    np.testing.assert_allclose(other, features, rtol=1e-5, atol=1e-6)


def test_a_stock_has_the_same_features_in_other_company(panel, computed, monkeypatch):
    name, features = computed
    monkeypatch.setattr(module, "CHUNK", 2)
    np.testing.assert_array_equal(compute_features(panel, name), features)
    alone = Panel(panel.dates, panel.symbols[1:2], *(getattr(panel, bar)[:, 1:2] for bar in BARS))
    np.testing.assert_array_equal(compute_features(alone, name), features[:, 1:2])


def test_unknown_feature_set(panel):
    with pytest.raises(UnknownNameError, match="alpha158"):
        compute_features(panel, "alpha159")
    with pytest.raises(UnknownNameError, match="alpha360"):
        load_features(panel, "alpha36", "unused")


def test_cache_is_read_when_content_and_definition_are_the_same(panel, tmp_path, monkeypatch):
    fresh = load_features(panel, "alpha158", tmp_path / "new")
    monkeypatch.setattr(module, "compute_features", lambda *_: pytest.fail("computed although cached"))
    np.testing.assert_array_equal(load_features(panel, "alpha158", tmp_path / "new"), fresh)
    assert [file.name for file in (tmp_path / "new").iterdir()] == [cache_path(panel, "alpha158", "").name]


def test_cache_notices_other_data_and_another_definition(panel, tmp_path, monkeypatch):
    volume = panel.volume.copy()
    volume[3, 0] += 1
    renamed = replace(panel, symbols=("X", *panel.symbols[1:]))
    later = replace(panel, dates=panel.dates + 1)
    paths = [
        cache_path(other, "alpha158", tmp_path) for other in (panel, renamed, later, replace(panel, volume=volume))
    ]
    paths.append(cache_path(panel, "alpha360", tmp_path))
    edited = tmp_path / "features.py"
    edited.write_bytes(b"# edited")
    monkeypatch.setattr(module, "__file__", str(edited))
    paths.append(cache_path(panel, "alpha158", tmp_path))
    assert len(set(paths)) == 6


def test_an_interrupted_computation_leaves_nothing_behind(panel, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.np, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_features(panel, "alpha158", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.environ.get("MOE_ZOO_DATA"), reason="MOE_ZOO_DATA names no data")
def test_real_bars():
    from zoo.data import data_root

    folder = data_root() / "stocks"
    panel = read_panel(folder / "cn_csi800_ever.parquet", {"symbol": "code"})
    members = read_membership(folder / "membership_csi300_csi500.csv", "csi300", panel)
    assert panel.close.shape == (1212, 840)
    assert (members.sum(axis=1).min(), members.sum(axis=1).max()) == (238, 271)
    stock = panel.symbols.index("000001")
    small = Panel(panel.dates, ("000001",), *(getattr(panel, name)[:, [stock]] for name in BARS))
    features = compute_features(small, "alpha158")
    expected = reference.alpha158(own_days(small, 0))
    np.testing.assert_allclose(features[-1, 0], [expected[name] for name in ALPHA158], rtol=1e-5, atol=1e-6)
