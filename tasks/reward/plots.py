"""The figures of an evaluation: consistency by category, where prompts go, and best-of-n."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tasks.reward.best_of_n import Curve
from tasks.reward.evaluate import POOLED, Report
from zoo.report import PALETTE, plot_style, save_figure

# Inches of a model's line, and of the gap between two bands of them.
LINE, GAP = 0.09, 0.12
CHANCE = 50


def plot_consistency(
    report: Report, path: str | Path, models: Sequence[str] | None = None, keys: Sequence[str] | None = None
) -> Path:
    """Draw the consistency of several models, a band per metric, with 95 % intervals over prompts and seeds.

    Args:
        report: What to draw.
        path: File to write.
        models: Whose; all by default.
        keys: Metrics; all by default.
    """
    from matplotlib.figure import Figure

    models, keys = list(models or report.scores), list(keys or report.metric_names())
    band = LINE * len(models) + GAP
    with plot_style():
        figure = Figure(figsize=(8, 1.6 + band * len(keys)))
        axes = figure.subplots()
        places = np.arange(len(keys))
        for number, model in enumerate(models):
            mean, low, high = np.array([report.interval(model, key) for key in keys]).T
            at = places + (number - (len(models) - 1) / 2) * LINE / band
            colour = PALETTE[number % len(PALETTE)]
            axes.errorbar(mean, at, xerr=[mean - low, high - mean], fmt="o", color=colour, markersize=4, label=model)
        for place in places[::2]:
            axes.axhspan(place - 0.5, place + 0.5, color="0.95", zorder=0)
        axes.axvline(CHANCE, color="0.5", linewidth=1, linestyle="--")
        axes.set_yticks(places, [_in_words(key, report) for key in keys])
        axes.set_ylim(len(keys) - 0.5, -0.5)
        axes.set_xlim(-1, 101)
        axes.set_xlabel("pairs ranked as people do (%)")
        figure.suptitle("Consistency, with 95 % intervals over prompts and seeds; dashed is chance")
        figure.legend(loc="outside lower center", ncols=min(len(models), 4))
        return save_figure(figure, path)


def _in_words(key: str, report: Report) -> str:
    name, _, rest = key.rpartition("/")
    words = name or rest.removeprefix(POOLED).replace("_", " ").strip() or "all"
    return f"{words} (n={len(report.subsets[key]):,})"


def plot_routes(matrix: NDArray[np.int64], names: Sequence[str], path: str | Path) -> Path:
    """Draw where prompts of each group are sent, as shares of the group, with the number of prompts in each cell.

    Args:
        matrix: Of `confusion_matrix`.
        names: Of the groups.
        path: File to write.
    """
    from matplotlib.figure import Figure

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    accuracy = np.trace(matrix) / max(matrix.sum(), 1)
    with plot_style():
        figure = Figure(figsize=(3.5 + 0.8 * len(names), 2.5 + 0.6 * len(names)))
        axes = figure.subplots()
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for (row, column), count in np.ndenumerate(matrix):
            dark = shares[row, column] > 0.6
            axes.text(column, row, f"{count}", ha="center", va="center", color="white" if dark else "black")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("sent to the inner model")
        axes.set_ylabel("prompts of the group")
        axes.set_title(f"Outer router: {accuracy:.1%} of prompts right", loc="left")
        figure.colorbar(image, ax=axes, label="share of the group's prompts")
        return save_figure(figure, path)


def plot_best_of_n(curves: Mapping[str, Curve], path: str | Path) -> Path:
    """Draw the gold reward and the proxy's own against KL, a line per proxy.

    Args:
        curves: By the proxy's name, in deviations of the answers to a prompt; the first one's 95 % interval over
            prompts is shaded.
        path: File to write.
    """
    from matplotlib.figure import Figure

    with plot_style():
        figure = Figure(figsize=(11, 4.6))
        left, right = figure.subplots(1, 2)
        for number, (name, curve) in enumerate(curves.items()):
            look = {"color": PALETTE[number % len(PALETTE)], "linestyle": "-" if number < len(PALETTE) else ":"}
            left.plot(curve.kl, curve.gold, marker="o", markersize=4, label=name, **look)
            right.plot(curve.kl, curve.proxy, marker="o", markersize=4, **look)
        shown, first = next(iter(curves.items()))
        left.fill_between(first.kl, first.low, first.high, color=PALETTE[0], alpha=0.15)
        left.set_ylabel("gold reward of the pick (std of answers)")
        left.set_title(f"What the pick is worth (shaded: 95 % of {shown})", loc="left")
        right.set_ylabel("proxy reward of the pick (std of answers)")
        right.set_title("What the proxy takes it for", loc="left")
        for axes in (left, right):
            axes.set_xlabel("KL from the policy (nats), ln n - (n - 1) / n")
            above = axes.secondary_xaxis("top")
            above.set_xticks(first.kl, [f"n={n}" for n in first.n], fontsize=8)
        figure.legend(loc="outside lower center", ncols=-(-len(curves) // 2))
        return save_figure(figure, path)
