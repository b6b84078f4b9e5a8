"""The figures of an evaluation: which experts work for which task, how much that is, and how good methods are."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tasks.multitask.evaluate import AVERAGE, MAJORITY, PERCENT, Report
from zoo.comparison import Array
from zoo.moe import Dependence
from zoo.report import PALETTE, plot_style, save_figure

# Colours end at so many times an even share, and at one such part of it.
MOST = 4
# More experts than these are ordered by the task that needs them most.
ORDERED = 16
# Inches: width and height of a cell, and the narrowest and widest heat map.
CELL, HEIGHT, NARROWEST, WIDEST = 0.3, 0.28, 2.6, 6.0
BAR, GAP = 0.18, 0.3


def plot_experts(
    shares: Mapping[str, Mapping[str, Array]], dependence: Mapping[str, Dependence], path: str | Path
) -> Path:
    """Draw the load of each expert by task over an even share: of each layer the module that tasks explain best.

    Args:
        shares: By module and task, of `expert_shares`.
        dependence: By module, of `group_dependence`.
        path: File to write.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    chosen: dict[str, str] = {}
    for module in shares:
        layer = layer_and_part(module)[0]
        best = chosen.setdefault(layer, module)
        chosen[layer] = max(best, module, key=lambda name: dependence[name].explained)
    tasks = list(next(iter(shares.values())))
    tables = {module: np.stack([shares[module][task] for task in tasks]) for module in chosen.values()}
    columns = 2 if len(tables) > 3 else 1
    rows = -(-len(tables) // columns)
    width = min(max(CELL * max(table.shape[1] for table in tables.values()), NARROWEST), WIDEST)
    with plot_style():
        figure = Figure(figsize=(2.6 + columns * width, 1.0 + rows * (0.95 + HEIGHT * len(tasks))))
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        norm = LogNorm(1 / MOST, MOST, clip=True)
        for axes, (module, table) in zip(panels, tables.items(), strict=False):
            order = needed_by(table) if table.shape[1] > ORDERED else np.arange(table.shape[1])
            loads = table[:, order] * table.shape[1]
            image = axes.imshow(np.maximum(loads, 1e-9), norm=norm, cmap="RdBu_r", aspect="auto")
            axes.set_title(title(module, dependence[module]), loc="left", fontsize=10)
            axes.set_yticks(range(len(tasks)), tasks, fontsize=9)
            if table.shape[1] > ORDERED:
                axes.set_xticks([])
                axes.set_xlabel(f"{table.shape[1]} experts, by the task that needs them most", fontsize=9)
            else:
                axes.set_xticks(range(table.shape[1]))
                axes.set_xlabel("expert", fontsize=9)
        for axes in panels[len(tables) :]:
            axes.set_axis_off()
        # As long beside many panels as beside six.
        size = {"pad": 0.02, "shrink": min(1.0, 6 / len(panels)), "anchor": (0.0, 1.0)}
        bar = figure.colorbar(image, ax=list(panels), ticks=[1 / MOST, 1 / 2, 1, 2, MOST], extend="both", **size)
        bar.ax.set_yticklabels([f"1/{MOST}", "1/2", "1 (even)", "2", str(MOST)])
        bar.ax.minorticks_off()
        bar.set_label("load over an even share")
        words = "Load of each expert by task; of each layer, the module whose routing tasks explain best"
        figure.suptitle(words, x=0.01, ha="left", fontsize=12)
        return save_figure(figure, path)


def plot_dependence(dependence: Mapping[str, Dependence], path: str | Path) -> Path:
    """Draw how much of each module's routing the task explains, modules by layers, chance subtracted.

    Args:
        dependence: By module, of `group_dependence`.
        path: File to write.
    """
    from matplotlib.figure import Figure

    found = {layer_and_part(module): PERCENT * (of.explained - of.chance) for module, of in dependence.items()}
    layers, parts = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    table = np.array([[found.get((layer, part), np.nan) for layer in layers] for part in parts])
    with plot_style():
        figure = Figure(figsize=(3.6 + 0.75 * len(layers), 1.6 + 0.42 * len(parts)))
        axes = figure.subplots()
        highest = max(float(np.nanmax(table)), 1.0)
        image = axes.imshow(table, vmin=0, vmax=highest, aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                colour = "black" if value > 0.6 * highest else "white"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9, color=colour)
        axes.set_xticks(range(len(layers)), [layer.removeprefix("layer ") for layer in layers])
        axes.set_xlabel("layer")
        axes.set_yticks(range(len(parts)), parts)
        axes.set_title("How much of the choice of experts the task explains,\nin percent and above chance", loc="left")
        figure.colorbar(image, ax=axes, label="percent")
        return save_figure(figure, path)


def plot_scores(report: Report, path: str | Path, methods: Sequence[str] | None = None) -> Path:
    """Draw the main metric of several methods in each task, with 95 % intervals and the majority class.

    Args:
        report: What to draw.
        path: File to write.
        methods: Which, in order; all by default.
    """
    from matplotlib.figure import Figure

    methods = [method for method in methods or report.predictions if method != MAJORITY]
    keys = sorted(report.main_names(), key=lambda key: "/" not in key)
    group = max(BAR * len(methods) + GAP, 0.95)
    with plot_style():
        figure = Figure(figsize=(max(1.4 + group * len(keys), 7), 4.8))
        axes = figure.subplots()
        places = np.arange(len(keys))
        for number, method in enumerate(methods):
            mean, low, high = np.array([report.interval(method, key) for key in keys]).T
            at = places + (number - (len(methods) - 1) / 2) * BAR / group
            axes.bar(at, mean, BAR / group, color=PALETTE[number % len(PALETTE)], label=method)
            axes.errorbar(at, mean, [mean - low, high - mean], fmt="none", ecolor="0.2", elinewidth=1.2)
        constant = [report.values(MAJORITY, key).mean() for key in keys]
        half = (BAR * len(methods) / 2 + 0.06) / group
        axes.hlines(constant, places - half, places + half, color="black", linewidth=2, label="majority class")
        axes.set_xticks(places, [label(report, key) for key in keys], fontsize=9)
        axes.set_xlim(-0.5, len(keys) - 0.5)
        axes.set_ylabel("percent")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        figure.legend(loc="outside lower center", ncols=len(methods) + 1)
        words = "Main metric of each task; thin lines are 95 % intervals over examples and seeds"
        figure.suptitle(words, x=0.01, ha="left", fontsize=12)
        return save_figure(figure, path)


def label(report: Report, key: str) -> str:
    """What stands below a group of bars."""
    task, _, metric = key.rpartition("/")
    if not task:
        return "average\nof all" if key == AVERAGE else "average\nof GLUE"
    name = "\n".join(task.split("_"))
    return f"{name}\n({metric})\nn={len(report.tasks[task].targets):,}"


def needed_by(table: Array) -> "np.typing.NDArray[np.intp]":
    """Experts in the order of the task that has most of each, and of how much that is.

    Args:
        table: `(tasks, E)`.
    """
    over = table / np.maximum(table.mean(axis=0), 1e-12)
    return np.lexsort((-over.max(axis=0), over.argmax(axis=0)))


def layer_and_part(module: str) -> tuple[str, str]:
    """A module's layer, and its name there; see `model.module_name`."""
    found = re.match(r"(layer \d+) (.*)", module)
    return (found[1], found[2]) if found else ("", module)


def title(module: str, dependence: Dependence) -> str:
    """A module with how much of its routing the task explains."""
    explained, chance = PERCENT * dependence.explained, PERCENT * dependence.chance
    return f"{module}\ntask explains {explained:.1f} % of the choices, chance {chance:.1f} %"
