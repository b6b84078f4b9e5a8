"""What a run leaves behind: one kind of table, `metrics.json`, `predictions.parquet`, figures in one style.

rich, pandas and matplotlib are imported where they are used.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

    from zoo.moe import Usage

# Okabe and Ito's palette: told apart by people with any colour vision.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")


def run_folder(folder: str | Path) -> Path:
    """Make a run folder, and find out now rather than after hours whether it can be written.

    Args:
        folder: The folder of a run.

    Raises:
        PermissionError: It cannot be made or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = "it is a file" if folder.is_file() else error.strerror
        raise PermissionError(f"Cannot write the run folder {folder} ({why}): choose another with --out DIR.") from None
    return folder


def print_table(title: str, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Print rows as one table; numbers are rounded to four digits and aligned.

    Args:
        title: The line above the table.
        rows: One mapping per row; a key that a row lacks is shown as a dash.
        columns: Keys to show, in order; those of the first row by default.
    """
    from rich.console import Console
    from rich.table import Table

    rows = list(rows)
    columns = list(columns or (rows[0] if rows else ()))
    table = Table()
    for column in columns:
        numeric = any(isinstance(row.get(column), int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        # A file or a pipe has no width, and a cut table is of no use there.
        unlimited = console.options.update(max_width=100_000)
        console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(title, style="bold", soft_wrap=True)
    console.print(table)


def write_metrics(folder: str | Path, metrics: Mapping[str, float]) -> Path:
    """Write `metrics.json`; a number that is not finite becomes `null`, as JSON knows no other word for it.

    Args:
        folder: The run folder.
        metrics: Numbers by name.
    """
    plain = {key: float(value) if math.isfinite(value) else None for key, value in metrics.items()}
    path = Path(folder) / "metrics.json"
    with _complete(path) as partial:
        partial.write_text(json.dumps(plain, indent=2) + "\n", "utf-8")
    return path


def write_predictions(folder: str | Path, rows: "pd.DataFrame | Sequence[Mapping[str, Any]]") -> Path:
    """Write `predictions.parquet`, one row per sample.

    Args:
        folder: The run folder.
        rows: A data frame, or one mapping per row.
    """
    import pandas as pd

    path = Path(folder) / "predictions.parquet"
    with _complete(path) as partial:
        pd.DataFrame(rows).to_parquet(partial, index=False)
    return path


@contextmanager
def plot_style() -> Iterator[None]:
    """The style of every figure here; make and fill figures inside this block."""
    import matplotlib
    from cycler import cycler

    style: dict[Any, Any] = {
        "axes.prop_cycle": cycler(color=PALETTE),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "image.cmap": "viridis",
        "legend.frameon": False,
        "lines.linewidth": 2,
    }
    with matplotlib.rc_context(style):
        yield


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Write a figure, in the format of its suffix.

    Args:
        figure: A `matplotlib.figure.Figure`; made directly, it needs no display and no pyplot.
        path: Where to.
    """
    path = Path(path)
    with _complete(path) as partial, plot_style():
        figure.savefig(partial, dpi=150, format=path.suffix[1:] or "png")
    return path


def draw_usage(usages: "Mapping[str, Usage]") -> "Figure":
    """Who works: the load of every expert in every layer, the layer's numbers, and a verdict in words.

    Args:
        usages: Totals by layer name, of `zoo.moe.record_usage`.
    """
    import numpy as np
    from matplotlib.figure import Figure

    rows = [(name or "layer", usage) for name, usage in usages.items() if usage.units]
    loads = [(usage.load * usage.counts.numel()).tolist() for _, usage in rows]
    table = np.full((len(rows), max(map(len, loads), default=1)), np.nan)
    for row, load in zip(table, loads, strict=True):
        row[: len(load)] = load
    with plot_style():
        figure = Figure(figsize=(5 + 0.32 * table.shape[1] + 4, 1.8 + 0.42 * len(rows)))
        axes = figure.subplots()
        image = axes.imshow(table, vmin=0, vmax=2, aspect="auto")
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_xlabel("router column (cross: dead)")
        axes.set_title("Load of each expert over its fair share", loc="left")
        for position, (_, usage) in enumerate(rows):
            axes.plot(usage.dead, [position] * len(usage.dead), "x", color="white", markersize=7)
            axes.text(table.shape[1] - 0.3, position, _usage_words(usage), va="center", fontsize=9)
        figure.colorbar(image, ax=axes, location="left", shrink=0.8, pad=0.02, extend="max")
    return figure


def draw_shares(tables: "Mapping[str, Tensor]", labels: Sequence[str]) -> "Figure":
    """Where each domain or class goes, one heat map per layer.

    Args:
        tables: `(labels, E)` by layer name, of `zoo.moe.LayerTrace.load_by_label`.
        labels: Names of the rows.
    """
    from matplotlib.figure import Figure

    with plot_style():
        figure = Figure(figsize=(1.5 + 3 * len(tables), 1.5 + 0.35 * len(labels)))
        panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
        highest = max(float(table.max()) for table in tables.values())
        for axes, (name, table) in zip(panels, tables.items(), strict=True):
            image = axes.imshow(table.numpy(), vmin=0, vmax=highest, aspect="auto")
            axes.set_title(name or "layer")
            axes.set_xlabel("expert")
        panels[0].set_yticks(range(len(labels)), labels)
        figure.colorbar(image, ax=list(panels), label="share of the label's slots")
    return figure


def _usage_words(usage: "Usage") -> str:
    """A layer's numbers and verdict in two lines."""
    numbers = usage.summary()
    shown = "entropy {entropy:.2f}, margin {margin:.2f}, slots {slots_per_unit:.2f}, dropped {dropped:.0%}"
    return f"{usage.verdict('').removeprefix(': ')}\n{shown.format(**numbers)}"


@contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A neighbour to write to, renamed to `path` at the end: a reader never sees half a file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
