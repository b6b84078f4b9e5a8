"""The figures of an evaluation: which experts work for which domain, and how good models are in each."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.qa.evaluate import PERCENT, Report
from zoo.comparison import Array
from zoo.moe import Dependence
from zoo.report import PALETTE, plot_style, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours end at so many times an even share, and at one such part of it.
MOST = 4
# Experts that have room for a number in their cells.
LABELLED = 16
# Inches: width of a cell with and without a number, its height, and the narrowest heat map; a bar, the gap between two
# groups of bars, and a group that has room for its name.
WIDE_CELL, CELL, HEIGHT = 0.62, 0.32, 0.36
NARROWEST = 2.8
BAR, GAP, NAMED = 0.22, 0.3, 1.1
# Behind what is out of domain.
SHADE = "0.94"


def plot_shares(
    shares: Mapping[str, Mapping[str, Array]],
    path: str | Path,
    ood_domains: Collection[str] = (),
    dependence: Mapping[str, Dependence] | None = None,
) -> Path:
    """Draw the load of each expert by domain, a heat map per layer, as multiples of an even share.

    Args:
        shares: By layer and domain, of `expert_shares`; layers have the same domains.
        path: File to write.
        ood_domains: Domains to mark; they are drawn last.
        dependence: By layer, of `domain_dependence`, to say in words whether routing follows domains.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names = sorted(next(iter(shares.values())), key=lambda name: name in ood_domains)
    tables = {layer: np.stack([of[name] for name in names]) for layer, of in shares.items()}
    sizes = [table.shape[1] for table in tables.values()]
    widths = [max((WIDE_CELL if size <= LABELLED else CELL) * size, NARROWEST) for size in sizes]
    with plot_style():
        figure = Figure(figsize=(3.2 + sum(widths) + 0.4 * len(tables), 2.4 + HEIGHT * len(names)))
        panels = figure.subplots(1, len(tables), squeeze=False, width_ratios=widths)[0]
        norm = LogNorm(1 / MOST, MOST, clip=True)
        for axes, (layer, table) in zip(panels, tables.items(), strict=True):
            loads = table * table.shape[1]
            image = axes.imshow(np.maximum(loads, 1e-9), norm=norm, cmap="RdBu_r", aspect="auto")
            _label_cells(axes, loads)
            axes.set_xticks(range(table.shape[1]))
            axes.set_xlabel("expert")
            axes.set_yticks([])
            axes.set_title(_title(layer, (dependence or {}).get(layer)), loc="left", fontsize=10)
            _divide(axes, sum(name not in ood_domains for name in names), len(names))
        panels[0].set_yticks(range(len(names)), [f"{name} (OOD)" if name in ood_domains else name for name in names])
        bar = figure.colorbar(image, ax=list(panels), ticks=[1 / MOST, 1 / 2, 1, 2, MOST], extend="both", pad=0.02)
        bar.ax.set_yticklabels([f"1/{MOST}", "1/2", "1 (even)", "2", str(MOST)])
        bar.ax.minorticks_off()
        bar.set_label("load over an even share")
        marked = "; OOD: out of domain" if ood_domains else ""
        figure.suptitle(f"Load of each expert by domain (1: an even share{marked})", x=0.01, ha="left", fontsize=12)
        return save_figure(figure, path)


def plot_scores(report: Report, path: str | Path, models: Sequence[str] | None = None, measure: str = "f1") -> Path:
    """Draw a measure of several models in each domain and over all, with 95 % intervals over documents and seeds.

    Args:
        report: What to draw.
        path: File to write.
        models: Whose, in order; all by default.
        measure: `f1` or `em`.
    """
    from matplotlib.figure import Figure

    models = list(models or report.scores)
    group = max(BAR * len(models) + GAP, NAMED)
    panels: dict[str, list[tuple[str, str]]] = {"In domain: learned from": [], "Out of domain (OOD)": []}
    learned, other = panels.values()
    for domain in report.domains:
        words = "\n".join([*domain.name.split("_"), f"n={len(domain.questions):,}"])
        (other if domain.ood else learned).append((words, f"{domain.name}/{measure}"))
    macro = (("in domain", f"{measure}_in", learned), ("OOD", f"{measure}_ood", other))
    panels["Macro"] = [(f"{name}\n(mean of {len(of)})", key) for name, key, of in macro if of]
    shown = {title: panel for title, panel in panels.items() if panel}
    widths = [group * len(panel) for panel in shown.values()]
    with plot_style():
        figure = Figure(figsize=(max(1.2 + sum(widths), 7), 4.8))
        row = figure.subplots(1, len(shown), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axes, (title, panel) in zip(row, shown.items(), strict=True):
            _draw_bars(axes, report, models, panel, BAR / group, numbers=title == "Macro")
            axes.set_title(title, loc="left")
            axes.set_facecolor(SHADE if panel is other else "white")
        row[0].set_ylabel(f"{measure.upper()} (%)")
        row[0].set_ylim(bottom=0)
        handles, labels = row[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(models))
        words = "lines are 95 % intervals over documents and seeds, n counts questions"
        figure.suptitle(f"{measure.upper()} by domain:\n{words}", x=0.01, ha="left", fontsize=12)
        return save_figure(figure, path)


def _draw_bars(
    axes: "Axes", report: Report, models: Sequence[str], panel: Sequence[tuple[str, str]], width: float, numbers: bool
) -> None:
    """A group of bars for each metric, one bar per model, with its number above it where they are wanted."""
    places = np.arange(len(panel))
    for number, model in enumerate(models):
        mean, low, high = np.array([report.interval(model, key) for _, key in panel]).T
        at = places + (number - (len(models) - 1) / 2) * width
        axes.bar(at, mean, width, color=PALETTE[number % len(PALETTE)], label=model)
        axes.errorbar(at, mean, [mean - low, high - mean], fmt="none", ecolor="0.2", elinewidth=1.2)
        for x, value, top in zip(at, mean, np.fmax(mean, high), strict=True):
            if numbers:
                axes.annotate(
                    f"{value:.1f}", (x, top), (0, 3), textcoords="offset points", rotation=90, ha="center", fontsize=9
                )
    axes.set_xticks(places, [name for name, _ in panel])
    axes.set_xlim(-0.5, len(panel) - 0.5)


def _label_cells(axes: "Axes", loads: Array) -> None:
    """Write each load into its cell where there is room, white on dark."""
    if loads.shape[1] > LABELLED:
        return
    for (row, column), load in np.ndenumerate(loads):
        dark = not MOST**-0.7 < load < MOST**0.7
        axes.text(column, row, f"{load:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")


def _divide(axes: "Axes", learned: int, domains: int) -> None:
    """A line between the domains learned from and the others."""
    if 0 < learned < domains:
        axes.axhline(learned - 0.5, color="black", linewidth=2)


def _title(layer: str, dependence: Dependence | None) -> str:
    if dependence is None:
        return layer
    explained, chance = PERCENT * dependence.explained, PERCENT * dependence.chance
    return f"{layer}\nthe domain explains {explained:.1f} %\nof the choices, chance {chance:.1f} %"
