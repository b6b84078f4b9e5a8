"""The protocol of fusion: all methods on the same pairs, day and night apart, and do the gates follow the light?"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tasks.fusion.baselines import BASELINES
from tasks.fusion.metrics import METRICS, NINE_METRICS, mean_rank, quantize, score
from tasks.fusion.model import MoEFusion
from zoo.moe import NoisyTopKRouter
from zoo.report import PALETTE, plot_style, save_figure

OURS = "ours"
TWIN = "twin"
RANDOM = "random gates"
RESAMPLES = 2000
SHUFFLES = 1000

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """One pair to look at.

    Attributes:
        name: Of the pair.
        images: By caption, `(H, W)` or `(H, W, 3)` in 0..1.
        shares: Weight of each expert by mixture.
    """

    name: str
    images: dict[str, NDArray[np.float32]]
    shares: dict[str, list[float]]


def with_random_gates(model: MoEFusion, seed: int = 0) -> MoEFusion:
    """A copy whose gates are drawn anew, as large as the trained ones: what the routing was worth.

    Args:
        model: A mixture.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = copy.deepcopy(model)
    for router in changed.modules():
        if isinstance(router, NoisyTopKRouter):
            spread = float(router.weight.detach().std())
            nn.init.normal_(router.weight, std=spread, generator=generator)
    return changed


def score_pair(infrared: Tensor, visible: Tensor, fused: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Score models and the parameter-free baselines on one pair.

    Args:
        infrared: `(1, 1, H, W)`, 0..1.
        visible: The same.
        fused: `(1, 1, H, W)` by model.

    Returns:
        Metrics by method.
    """
    images = {**fused, **{name: baseline(infrared, visible) for name, baseline in BASELINES.items()}}
    sources = quantize(infrared[0, 0]), quantize(visible[0, 0])
    return {name: score(quantize(image[0, 0]), *sources) for name, image in images.items()}


def means(scores: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Means over pairs of every method's metrics."""
    return {
        method: {name: float(np.mean([pair[method][name] for pair in scores])) for name in METRICS}
        for method in scores[0]
    }


def ranks(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean place over the nine metrics: of each model by itself among the baselines, and of these beside ours.

    Args:
        table: Metrics by method; one is `OURS`.
    """
    baselines = {name: table[name] for name in BASELINES}
    places = mean_rank({**baselines, OURS: table[OURS]})
    models = [name for name in table if name not in BASELINES]
    return {**places, **{name: mean_rank({**baselines, name: table[name]})[name] for name in models}}


def paired_differences(
    scores: Sequence[Mapping[str, Mapping[str, float]]], first: str, second: str, seed: int = 0
) -> list[Row]:
    """How much a method is above another on the same pairs, with a 95 % bootstrap interval over pairs.

    Args:
        scores: Of every pair, by method.
        first: A method.
        second: The other.
        seed: Of the resampling.

    Returns:
        One row for each of the nine metrics.
    """
    draws = np.random.default_rng(seed).integers(len(scores), size=(RESAMPLES, len(scores)))
    rows = []
    for name in NINE_METRICS:
        differences = np.array([pair[first][name] - pair[second][name] for pair in scores])
        low, high = np.quantile(differences[draws].mean(1), (0.025, 0.975))
        rows.append({"metric": name, "difference": float(differences.mean()), "low": float(low), "high": float(high)})
    return rows


def gate_correlations(shares: Mapping[str, NDArray[np.float64]], brightness: NDArray[np.float64]) -> list[Row]:
    """Rank correlation (Spearman) of each expert's weight with the brightness of the visible image.

    Args:
        shares: `(N, E)` by mixture.
        brightness: `(N,)`.

    Returns:
        One row per mixture: `rho` of the expert that follows the light most, which one it is, the range of its
        weight, and `p`, how often shuffled brightness gives any expert of the mixture as much.
    """
    random = np.random.default_rng(0)
    light = normal_ranks(brightness[:, None])[:, 0]
    rows = []
    for name, table in shares.items():
        ranked = normal_ranks(table)
        rho = light @ ranked
        best = int(np.abs(rho).argmax())
        shuffled = np.stack([random.permutation(light) for _ in range(SHUFFLES)]) @ ranked
        p = float((np.abs(shuffled).max(1) >= np.abs(rho[best]) - 1e-12).mean())
        weights = table[:, best]
        row = {"mixture": name, "expert": best, "rho": float(rho[best]), "p": p}
        rows.append({**row, "lowest weight": float(weights.min()), "highest": float(weights.max())})
    return rows


def normal_ranks(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks of each column, ties sharing their mean, of mean 0 and length 1; zeros for a constant column."""
    import pandas as pd

    ranked: NDArray[np.float64] = pd.DataFrame(table).rank().to_numpy()
    ranked = ranked - ranked.mean(0)
    return ranked / np.maximum(np.linalg.norm(ranked, axis=0), 1e-12)


def plot_gates(
    shares: Mapping[str, NDArray[np.float64]],
    brightness: NDArray[np.float64],
    night: NDArray[np.bool_],
    correlations: Sequence[Row],
    path: Path,
) -> Path:
    """Draw the experts' weights over all pairs, from the darkest visible image to the brightest.

    Args:
        shares: `(N, E)` by mixture.
        brightness: `(N,)` mean of the visible image, 0..1.
        night: `(N,)`.
        correlations: Of `gate_correlations`.
        path: File to write.
    """
    from matplotlib.figure import Figure

    order = brightness.argsort()
    places = np.arange(len(order))
    with plot_style():
        figure = Figure(figsize=(9, 2.1 * len(shares) + 1.6))
        panels = figure.subplots(len(shares) + 1, 1, sharex=True, height_ratios=[1] * len(shares) + [0.7])
        for axes, (name, table), row in zip(panels, shares.items(), correlations, strict=False):
            bottom = np.zeros(len(order))
            for expert in range(table.shape[1]):
                height = table[order, expert]
                axes.bar(places, height, 1.0, bottom, color=PALETTE[expert % len(PALETTE)], label=f"expert {expert}")
                bottom += height
            axes.set_ylabel("weight")
            words = f"expert {row['expert']} against brightness, rho = {row['rho']:.2f} (p = {row['p']:.3f})"
            axes.set_title(f"{name}: {words}", loc="left")
        panels[0].legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1.12))
        for value, words, color in ((True, "night", "0.25"), (False, "day", "#E69F00")):
            chosen = night[order] == value
            panels[-1].bar(places[chosen], 255 * brightness[order][chosen], 1.0, color=color, label=words)
        panels[-1].set_ylabel("brightness")
        panels[-1].set_xlabel("pairs, from the darkest visible image to the brightest")
        panels[-1].legend(loc="upper left")
        return save_figure(figure, path)


def plot_contact_sheet(examples: Sequence[Example], path: Path) -> Path:
    """Draw pairs row by row: sources, attention, fused image, and the experts that were chosen.

    Args:
        examples: Pairs with the same captions.
        path: File to write.
    """
    from matplotlib.figure import Figure

    captions = list(examples[0].images)
    columns = len(captions) + bool(examples[0].shares)
    with plot_style():
        figure = Figure(figsize=(3.2 * columns, 2.5 * len(examples) + 0.4))
        panels = figure.subplots(len(examples), columns, squeeze=False)
        for line, (row, example) in enumerate(zip(panels, examples, strict=True)):
            for axes, caption in zip(row, captions, strict=False):
                axes.imshow(example.images[caption], cmap="gray", vmin=0, vmax=1)
                axes.set_xticks([])
                axes.set_yticks([])
                if not line:
                    axes.set_title(caption)
            row[0].set_ylabel(example.name, fontsize=8)
            if example.shares:
                draw_shares(row[-1], example.shares)
        if examples[0].shares:
            panels[0, -1].set_title("weight of each expert")
        return save_figure(figure, path)


def draw_shares(axes: Any, shares: Mapping[str, Sequence[float]]) -> None:
    """One bar per mixture, divided among the chosen experts, their numbers in it."""
    for place, (name, weights) in enumerate(shares.items()):
        left = 0.0
        for expert, weight in enumerate(weights):
            if weight > 0:
                axes.barh(place, weight, left=left, color=PALETTE[expert % len(PALETTE)])
                axes.text(left + weight / 2, place, str(expert), ha="center", va="center", color="white")
                left += weight
        axes.text(0, place - 0.45, name, va="bottom", fontsize=9)
    axes.set_ylim(len(shares) - 0.4, -0.8)
    axes.axis("off")
