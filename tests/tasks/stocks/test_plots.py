"""The figures are written, and say in words what a reader looks for."""

import numpy as np
import pytest

from tasks.stocks import plots
from tasks.stocks.evaluate import HORIZONS


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are saved."""
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path))[1])
    return figures


def words(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def daily(models: int, days: int = 40) -> dict:
    random = np.random.default_rng(0)
    return {f"model {number}": random.normal(0.01 * number, 0.1, days) for number in range(models)}


DATES = np.arange(40) + np.datetime64("2024-01-01")


def test_cumulative_ic(tmp_path, drawn) -> None:
    series = daily(9)
    series["model 0"][3] = np.nan
    path = plots.plot_cumulative_ic(DATES, series, tmp_path / "ic.png")
    assert path.stat().st_size > 1000
    (axes,) = drawn[0].axes
    lines = axes.get_lines()
    np.testing.assert_allclose(lines[0].get_ydata()[-1], np.nansum(series["model 0"]))
    assert len(lines) == 10
    assert words(axes)[-1] == "3 others" and len(words(axes)) == 7
    assert words(axes)[1] == f"model 1: {series['model 1'].mean():+.3f} a day"


def test_excess_and_drawdown(tmp_path, drawn) -> None:
    series = {name: values / 10 for name, values in daily(2).items()}
    assert plots.plot_excess(DATES, series, tmp_path / "excess.png").stat().st_size > 1000
    above, below = drawn[0].axes
    total = 100 * series["model 1"].cumsum()
    np.testing.assert_allclose(above.get_lines()[1].get_ydata(), total)
    fall = [min(total[day] - max(0, *total[: day + 1]), 0) for day in range(40)]
    np.testing.assert_allclose(below.get_lines()[1].get_ydata(), fall, atol=1e-9)
    assert words(above)[0] == f"model 0: {23800 * series['model 0'].mean():+.1f} % a year"


def test_horizons(tmp_path, drawn) -> None:
    tables = {name: np.random.default_rng(1).normal(0.02, 0.1, (len(HORIZONS), 40)) for name in ("ours", "twin")}
    assert plots.plot_horizons(tables, tmp_path / "horizons.png").stat().st_size > 1000
    (axes,) = drawn[0].axes
    bars = axes.containers[0]
    np.testing.assert_allclose([bar.get_height() for bar in bars], tables["ours"].mean(axis=1))
    assert axes.get_xticklabels()[HORIZONS.index(1)].get_text() == "t+1 to\nt+2"
    assert {"ours", "twin", "what is predicted"} <= set(words(axes))


@pytest.mark.parametrize("months", [1, 30])
def test_usage(tmp_path, drawn, months) -> None:
    random = np.random.default_rng(0)
    over_time = {f"{2020 + month // 12}-{month % 12 + 1:02}": random.dirichlet(np.ones(6)) for month in range(months)}
    industries = {f"industry {number}": 3 * random.dirichlet(np.ones(6)) for number in range(30)}
    assert plots.plot_usage(over_time, industries, 3, tmp_path / "usage.png", "industry").stat().st_size > 1000
    bars, by, each = drawn[0].axes[:3]
    first = next(iter(over_time.values()))
    assert bars.containers[0][0].get_height() == pytest.approx(100 * first[:2].sum())
    np.testing.assert_allclose(by.get_images()[0].get_array().sum(axis=1), 100)
    assert by.get_images()[0].get_array().shape == (30, 3)
    assert each.get_images()[0].get_array().shape == (months, 6)
    assert [tick.get_text() for tick in by.get_yticklabels()] == list(industries)
    assert by.get_title("left") == "Expert groups by industry"
