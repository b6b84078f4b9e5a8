"""MIGA beside its twin, other networks, trees, a line and no learning at all, over seeds, on the same days.

    python -m studies.stocks.study                             run what is missing, then write the table and the figures
    python -m studies.stocks.study --methods miga-conv twin --seeds 0 1
    python -m studies.stocks.study --only table                only write them
    python -m studies.stocks.study --release miga-conv --out FOLDER    the ensemble of a method's seeds as a checkpoint

Every (source, method, seed) is one JSON file in `results/`; what has one is not run again.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from studies.options import read_options, study_parser
from studies.rows import Row, is_done, write_whole
from studies.stocks.methods import COMMON, DETERMINISTIC, METHODS, Method
from tasks.stocks.baselines import boosted_trees, low_volatility, ridge
from tasks.stocks.data import DayDataset, StocksDataModule
from tasks.stocks.evaluate import MEANS, Market, average_scores, difference_interval, evaluate_scores
from tasks.stocks.model import Miga, MigaEnsemble
from tasks.stocks.panel import Array
from tasks.stocks.plots import plot_cumulative_ic, plot_excess
from tasks.stocks.task import StocksTask, golden_day, miga_card
from zoo import hub
from zoo.callbacks import EpochSeed
from zoo.report import print_table

FOLDER = Path(__file__).parent
SEEDS = (0, 1, 2, 3, 4)
PARTS = ("val", "test")
DIGITS = 6
# Just enough to see that everything runs.
GENERATED = {"days": 220, "stocks": 24}
# What a released checkpoint's card says of it, and by source of the data's gaps and terms.
DESCRIPTION = (
    "The mean score of networks that differ in their seeds alone. Ranks the stocks of one day by features of the last "
    "days, which it scales itself; the level of a score means nothing. {gaps} A research result on few years: no "
    "advice, no promise of profit."
)
CHINESE = (
    "Learned from stocks that were never delisted, without ChiNext and STAR (survivorship).",
    "daily bars: none stated (Tushare), do not redistribute; index membership: MIT",
)
AMERICAN = ("Learned from all stocks of the file: who was a member when is not known (survivorship).", "MIT")
ABOUT = {
    "csi300": CHINESE,
    "csi500": CHINESE,
    "sp500": AMERICAN,
    "generated": ("Learned from a synthetic market.", "synthetic, none"),
}
# What is compared with what, day by day.
PAIRS = (("miga-conv", "twin"), ("miga-conv", "no-attention"), ("miga-conv", "gru"), ("miga-conv", "low-volatility"))


def load_days(options: argparse.Namespace, method: Method) -> StocksDataModule:
    """The days that a method reads: learned from are the members of both Chinese indices."""
    source: dict[str, Any] = {"source": options.source}
    if options.source.startswith("csi"):
        source["train_index"] = ["csi300", "csi500"]
    if options.source == "generated":
        source["market"] = GENERATED
    data = StocksDataModule(**source, cache=str(options.folder / "cache"), **method.data)
    data.setup()
    return data


def run(method_name: str, seed: int, data: StocksDataModule, folder: Path) -> tuple[dict[str, Array], Row]:
    """Scores `(days, stocks)` of validation and test, and facts."""
    method = METHODS[method_name]
    if method.network is not None:
        return run_network(method, seed, data, folder)
    rivals = {
        "ridge": lambda days: ridge(data.train_set, data.val_set, days, data.scaler),
        "trees-qlib": lambda days: boosted_trees(data.train_set, data.val_set, days, seed=seed),
        "trees": lambda days: boosted_trees(data.train_set, data.val_set, days, "rank", 0.05, seed),
        "low-volatility": low_volatility,
    }
    return {part: rivals[method_name](getattr(data, f"{part}_set")) for part in PARTS}, {}


def run_network(method: Method, seed: int, data: StocksDataModule, folder: Path) -> tuple[dict[str, Array], Row]:
    """Train a network, go back to its best epoch, and score."""
    pl.seed_everything(seed, verbose=False)
    task = StocksTask({**COMMON, **(method.network or {})}, loss=method.loss, lr=method.lr)
    data.seed = seed
    # A killed run leaves its best.ckpt, which must not be taken for that of this run.
    shutil.rmtree(folder, ignore_errors=True)
    best = pl.callbacks.ModelCheckpoint(folder, "best", monitor=task.monitor, mode=task.monitor_mode)
    trainer = pl.Trainer(
        max_epochs=method.epochs,
        accelerator="cpu",
        gradient_clip_val=3.0,
        callbacks=[best, EpochSeed(seed)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(task, data)
    model = task.model.eval()
    scores = {part: score_days(model, getattr(data, f"{part}_set")) for part in PARTS}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return scores, {"best_val_RankIC": float(best.best_model_score), "parameters": parameters}


@torch.no_grad()
def score_days(model: Miga, dataset: DayDataset) -> Array:
    """Scores `(days, stocks)`, NaN where a stock is not in the day's batch."""
    scores = np.full((len(dataset), len(dataset.panel.symbols)), np.nan)
    for row in range(len(dataset)):
        day = dataset[row]
        scores[row, day.positions.numpy()] = model(day.features).numpy()
    return scores


def judge(scores: Mapping[str, Array], data: StocksDataModule) -> Row:
    """Metrics and daily series of validation and test."""
    row: Row = {}
    for part in PARTS:
        days: DayDataset = getattr(data, f"{part}_set")
        evaluation = evaluate_scores({"": scores[part]}, Market.of(days.panel, days.members, days.days))
        daily = {name: np.round(values[0], DIGITS).tolist() for name, values in evaluation.models[""].daily.items()}
        row[part] = {"metrics": evaluation.metrics(""), "daily": daily}
        row[part]["dates"] = [str(evaluation.dates[0]), str(evaluation.dates[-1])]
    return row


def result_path(options: argparse.Namespace, method: str, seed: int | str) -> Path:
    """Where the row of a run is."""
    return options.folder / "results" / f"{options.source}.{method}.seed{seed}.json"


def ensemble_path(options: argparse.Namespace, method: str) -> Path:
    """Where the row of the chosen seeds together is; other seeds are another ensemble."""
    return result_path(options, method, "s" + "-".join(map(str, options.seeds)))


def run_missing(options: argparse.Namespace) -> None:
    """Run every (method, seed) without a row, one seed of all methods before the next."""
    runs = [(m, s) for s in options.seeds for m in options.methods if s == options.seeds[0] or m not in DETERMINISTIC]
    missing = [pair for pair in runs if not is_done(result_path(options, *pair), {"source": options.source})]
    loaded: dict[str, StocksDataModule] = {}
    torch.set_num_threads(options.threads)
    for method, seed in missing:
        print(f"{options.source}, {method}, seed {seed}", flush=True)
        key = str(METHODS[method].data)
        if key not in loaded:
            loaded = {key: load_days(options, METHODS[method])}
        start = time.perf_counter()
        scores, facts = run(
            method, seed, loaded[key], options.folder / "runs" / f"{options.source}.{method}.seed{seed}"
        )
        facts["seconds"] = round(time.perf_counter() - start, 1)
        keep_scores(options, method, seed, scores)
        about = {"source": options.source, "method": method, "seed": seed}
        write_whole(result_path(options, method, seed), {**about, **facts, **judge(scores, loaded[key])})
    for method in options.methods:
        if method not in DETERMINISTIC:
            run_ensemble(options, method)


def keep_scores(options: argparse.Namespace, method: str, seed: int, scores: Mapping[str, Array]) -> None:
    """Keep scores for the ensemble; they are not committed."""
    path = options.folder / "cache" / f"{options.source}.{method}.seed{seed}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{part: table.astype(np.float32) for part, table in scores.items()})


def read_scores(path: Path) -> dict[str, Array]:
    """What `keep_scores` kept."""
    with np.load(path) as file:
        return {part: file[part].astype(np.float64) for part in PARTS}


def run_ensemble(options: argparse.Namespace, method: str) -> None:
    """Score the mean of a method's seeds, once all are there."""
    path = ensemble_path(options, method)
    kept = [options.folder / "cache" / f"{options.source}.{method}.seed{seed}.npz" for seed in options.seeds]
    about = {"source": options.source, "seed": list(options.seeds)}
    if len(kept) < 2 or is_done(path, about) or not all(file.is_file() for file in kept):
        return
    tables = [read_scores(file) for file in kept]
    scores = {part: average_scores(np.stack([table[part] for table in tables])) for part in PARTS}
    write_whole(path, {**about, "method": method, **judge(scores, load_days(options, METHODS[method]))})


def rows_of(options: argparse.Namespace, method: str) -> list[Row]:
    """The recorded rows of a method's seeds."""
    paths = [result_path(options, method, seed) for seed in options.seeds]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def series(rows: Sequence[Row], part: str, name: str) -> Array:
    """`(seeds, days)` of one daily series."""
    return np.array([row[part]["daily"][name] for row in rows], dtype=np.float64)


def table(options: argparse.Namespace, part: str) -> list[Row]:
    """One line per method: means over seeds with their deviation, and the ensemble's RankIC."""
    lines = []
    for method in METHODS:
        rows = rows_of(options, method)
        if not rows:
            continue
        line: Row = {"method": method, "seeds": len(rows)}
        for name in ("IC", "RankIC", "neutral_RankIC", "excess_AR_cost", "IR_cost", "MDD_cost", "turnover"):
            values = np.array([row[part]["metrics"][name] for row in rows], dtype=np.float64)
            line[name] = float(values.mean())
            if name in ("IC", "RankIC"):
                line[f"{name} std"] = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        together = ensemble_path(options, method)
        if together.is_file():
            whole = json.loads(together.read_text())[part]["metrics"]
            line |= {f"ensemble {name}": whole[name] for name in ("IC", "RankIC", "neutral_RankIC", "excess_AR_cost")}
        lines.append(line)
    return lines


def paired(options: argparse.Namespace) -> list[Row]:
    """Differences on the test days with their 95 % intervals over days and seeds."""
    lines = []
    for first, second in PAIRS:
        ours, theirs = rows_of(options, first), rows_of(options, second)
        if ours and theirs:
            for metric, (name, scale) in MEANS.items():
                between = difference_interval(scale * series(ours, "test", name), scale * series(theirs, "test", name))
                lines.append({"compared": f"{first} - {second}", "metric": metric, **between._asdict()})
    return lines


def plot(options: argparse.Namespace) -> list[Path]:
    """Cumulative RankIC and excess return of the methods of the main comparison, means over seeds."""
    shown = {name for pair in PAIRS for name in pair} | {"trees", "ridge"}
    rows = {method: rows_of(options, method) for method in METHODS if method in shown}
    rows = {method: found for method, found in rows.items() if found}
    if not rows:
        return []
    data = load_days(options, METHODS["low-volatility"])
    dates = data.panel.dates[data.test_set.days]
    curves = {
        name: {method: series(found, "test", name).mean(axis=0) for method, found in rows.items()}
        for name in ("RankIC", "excess_cost")
    }
    return [
        plot_cumulative_ic(dates, curves["RankIC"], options.folder / f"{options.source}.rank_ic.png"),
        plot_excess(dates, curves["excess_cost"], options.folder / f"{options.source}.excess.png"),
    ]


def release(options: argparse.Namespace) -> Path:
    """The ensemble of a method's seeds as a checkpoint; each network's scores are scaled by validation."""
    method = METHODS[options.release]
    data = load_days(options, method)
    ensemble = MigaEnsemble({**COMMON, **(method.network or {})}, len(options.seeds))
    for place, seed in enumerate(options.seeds):
        path = options.folder / "runs" / f"{options.source}.{options.release}.seed{seed}" / "best.ckpt"
        state = torch.load(path, weights_only=True)["state_dict"]
        network: Any = ensemble.members[place]
        network.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
        ensemble.score_scale[place] = float(np.nanstd(score_days(network.eval(), data.val_set), axis=1).mean())
    gaps, terms = ABOUT[options.source]
    card = replace(
        miga_card(ensemble.first, data, method.epochs),
        description=DESCRIPTION.format(gaps=gaps),
        data_terms=terms,
        weights_licence="Apache-2.0",
    )
    config = (hub.assets() / "configs/stocks/miga-conv.yaml").read_text()
    return hub.save(ensemble.eval(), options.out, card=card, golden_input=golden_day(data), config=config)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = study_parser(__doc__, FOLDER, METHODS, ["csi300", "csi500", "sp500", "generated"], SEEDS, METHODS)
    return read_options(parser, arguments, METHODS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing and write the results."""
    options = parse(arguments)
    if options.release:
        print(release(options))
        return
    if not options.only:
        run_missing(options)
    results = {part: table(options, part) for part in PARTS} | {"differences": paired(options)}
    for title, lines in results.items():
        print_table(f"{options.source}: {title}", lines, list(dict.fromkeys(key for line in lines for key in line)))
    write_whole(options.folder / f"{options.source}.json", results)
    print(*plot(options), sep="\n")


if __name__ == "__main__":
    main()
