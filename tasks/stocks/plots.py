"""The figures of an evaluation: what scores were worth over time, when returns follow them, and what experts do."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.stocks.backtest import PERCENT, YEAR, drawdown
from tasks.stocks.evaluate import HORIZONS, LABEL_HORIZON, horizon_name, mean_interval
from tasks.stocks.panel import Array, Dates
from zoo.report import PALETTE, plot_style, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Lines in colours of their own; what follows is drawn in grey.
COLOURED = 6
# Months of a heat map that have room for a name each, and the height of a row in inches.
NAMED_ROWS = 24
ROW = 0.24
SHARE = "share of the weights (%)"


def plot_cumulative_ic(dates: Dates, daily: Mapping[str, Array], path: str | Path, metric: str = "RankIC") -> Path:
    """Draw the sum of daily ICs: a steady climb is a steady ability.

    Args:
        dates: `(days,)`.
        daily: `(days,)` by model, of `Evaluation.series`; a day without an IC adds nothing.
        path: File to write.
        metric: Which IC it is.
    """
    from matplotlib.figure import Figure

    lines = {name: np.nan_to_num(values).cumsum() for name, values in daily.items()}
    legend = {name: f"{name}: {mean_interval(values).mean:+.3f} a day" for name, values in daily.items()}
    with plot_style():
        figure = Figure(figsize=(9, 4.8))
        axes = figure.subplots()
        _draw_lines(axes, dates, lines, legend)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        axes.set_title(f"How well scores rank the stocks: {metric} with the next return, added up", loc="left")
        axes.set_ylabel(f"sum of daily {metric}s")
        axes.set_xlabel("day of the score")
        return save_figure(figure, path)


def plot_excess(dates: Dates, daily: Mapping[str, Array], path: str | Path) -> Path:
    """Draw the excess return after costs, added up, and below it how far each line is under its height so far.

    Args:
        dates: `(days,)`.
        daily: `(days,)` excess returns by model, of `Evaluation.series`.
        path: File to write.
    """
    from matplotlib.figure import Figure

    lines = {name: PERCENT * values.cumsum() for name, values in daily.items()}
    legend = {name: f"{name}: {YEAR * PERCENT * values.mean():+.1f} % a year" for name, values in daily.items()}
    falls = {name: PERCENT * drawdown(values) for name, values in daily.items()}
    with plot_style():
        figure = Figure(figsize=(9, 6.4))
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        _draw_lines(above, dates, lines, legend)
        above.legend(loc="upper left", bbox_to_anchor=(1, 1))
        above.set_title("Return above an equal-weight index of the members, after trading costs", loc="left")
        above.set_ylabel("sum of daily returns (%)")
        _draw_lines(below, dates, falls, legend)
        below.set_title("Drawdown: how far below its highest point so far", loc="left")
        below.set_ylabel("below (%)")
        below.set_xlabel("day of the score")
        return save_figure(figure, path)


def plot_horizons(ic: Mapping[str, Array], path: str | Path) -> Path:
    """Draw the mean IC with returns before and after the score, with 95 % intervals: a look-ahead shows on the left.

    Args:
        ic: `(horizons, days)` by model, of `ModelEvaluation.horizon_ic`.
        path: File to write.
    """
    from matplotlib.figure import Figure

    places = np.arange(len(HORIZONS))
    width = 0.8 / len(ic)
    with plot_style():
        figure = Figure(figsize=(11, 4.8))
        axes = figure.subplots()
        axes.axvspan(-0.5, HORIZONS.index(0) - 0.5, color="0.92", label="known when the score is made", linewidth=0)
        axes.axvspan(LABEL_HORIZON - 0.5, LABEL_HORIZON + 0.5, color="#FFF3C4", label="what is predicted", linewidth=0)
        for number, (name, table) in enumerate(ic.items()):
            intervals = np.array([mean_interval(row) for row in table])
            mean, low, high = intervals.T
            at = places + (number - (len(ic) - 1) / 2) * width
            axes.bar(at, mean, width, color=PALETTE[number % len(PALETTE)], label=name)
            axes.errorbar(at, mean, [mean - low, high - mean], fmt="none", ecolor="0.3", elinewidth=1)
        axes.axhline(0, color="0.3", linewidth=1)
        axes.set_xlim(-0.5, len(HORIZONS) - 0.5)
        axes.set_xticks(places, [horizon_name(horizon).replace(" to ", " to\n") for horizon in HORIZONS])
        axes.set_xlabel("days between which the return is earned; t is the day of the score")
        axes.set_ylabel("mean daily IC")
        axes.set_title("Which returns the scores agree with: mean IC and its 95 % interval", loc="left")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        return save_figure(figure, path)


def plot_usage(
    over_time: Mapping[str, Array], by_label: Mapping[str, Array], groups: int, path: str | Path, label: str
) -> Path:
    """Draw who works when and for whom: groups over time, groups by label, and each expert over time.

    Args:
        over_time: `(experts,)` weights by month, of `mean_usage`, the experts of a group side by side.
        by_label: The same by industry, style or other label.
        groups: Number of expert groups, which divides the experts.
        path: File to write.
        label: What the labels are, e.g. industry.
    """
    from matplotlib.figure import Figure

    months, experts = _shares(over_time)
    labels, of_labels = _shares(by_label)
    top, bottom = 2 + ROW * len(labels), 1 + ROW * min(len(months), NAMED_ROWS)
    with plot_style():
        figure = Figure(figsize=(13, top + bottom + 0.8))
        grid = figure.add_gridspec(2, 2, height_ratios=[top, bottom])
        bars, by, each = (figure.add_subplot(cell) for cell in (grid[0, 0], grid[0, 1], grid[1, :]))
        _draw_groups(bars, months, _grouped(experts, groups))
        bars.set_title("Expert groups over time", loc="left")
        _draw_heat(by, _grouped(of_labels, groups))
        by.set_yticks(range(len(labels)), labels)
        by.set_xticks(range(groups))
        by.set_xlabel("group")
        by.set_title(f"Expert groups by {label}", loc="left")
        _draw_heat(each, experts)
        each.set_yticks(*_some(months, NAMED_ROWS))
        size = experts.shape[1] // groups
        for edge in range(size, experts.shape[1], size):
            each.axvline(edge - 0.5, color="white")
        each.set_xticks(np.arange(groups) * size + (size - 1) / 2, [f"group {group}" for group in range(groups)])
        each.set_xlabel("experts, side by side within their group")
        each.set_title("Each expert over time", loc="left")
        return save_figure(figure, path)


def _draw_lines(axes: "Axes", dates: Dates, lines: Mapping[str, Array], legend: Mapping[str, str]) -> None:
    """The first lines in colour, the others in grey under one entry of the legend."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    others = list(lines)[COLOURED:]
    for number, (name, values) in enumerate(lines.items()):
        if name in others:
            words = f"{len(others)} others" if name == others[0] else None
            axes.plot(dates, values, color="0.75", linewidth=1, zorder=1, label=words)
        else:
            axes.plot(dates, values, color=PALETTE[number], zorder=2 + COLOURED - number, label=legend[name])
    axes.axhline(0, color="0.3", linewidth=1)
    locator = AutoDateLocator()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _draw_groups(axes: "Axes", months: list[str], shares: Array) -> None:
    """One bar per month, divided among the groups."""
    bottom = np.zeros(len(months))
    for group, height in enumerate(shares.T):
        axes.bar(months, height, 0.9, bottom, color=PALETTE[group % len(PALETTE)], label=str(group))
        bottom += height
    axes.set_xticks(*_some(months, 12), rotation=60)
    axes.set_ylabel(SHARE)
    axes.legend(title="group", loc="upper left", bbox_to_anchor=(1, 1))


def _draw_heat(axes: "Axes", shares: Array) -> None:
    image = axes.imshow(shares, vmin=0, aspect="auto")
    axes.figure.colorbar(image, ax=axes, label=SHARE, pad=0.02)


def _shares(weights: Mapping[str, Array]) -> tuple[list[str], Array]:
    """Names, and the shares of each row in percent."""
    table = np.stack(list(weights.values()))
    return list(weights), PERCENT * table / table.sum(axis=1, keepdims=True)


def _grouped(shares: Array, groups: int) -> Array:
    return shares.reshape(len(shares), groups, -1).sum(axis=2)


def _some(names: list[str], most: int) -> tuple[Any, list[str]]:
    """Places and names of ticks, thinned out evenly where there are too many to be read."""
    step = -(-len(names) // most)
    return range(0, len(names), step), names[::step]
