"""Lightning task of cross-sectional stock prediction: learn MIGA, score it beside what it is compared with, predict."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.stocks.baselines import low_volatility
from tasks.stocks.data import Day, DayDataset, StocksDataModule
from tasks.stocks.evaluate import (
    MIN_STOCKS,
    STYLE_NAMES,
    Market,
    daily_ic,
    daily_rank_ic,
    evaluate_scores,
    horizon_alarm,
    mean_usage,
    routing_agreement,
)
from tasks.stocks.losses import LOSSES
from tasks.stocks.model import Miga, MigaEnsemble
from tasks.stocks.panel import Array
from tasks.stocks.plots import plot_cumulative_ic, plot_excess, plot_horizons, plot_usage
from zoo import hub
from zoo.errors import UnknownNameError
from zoo.report import print_table, write_metrics, write_predictions
from zoo.task import MoETask, StepOutput, check_network

OURS = "ours"
TWIN = "twin"
LOW_VOLATILITY = "low_volatility"
# The balance loss fades: its coefficient is multiplied by this after each of the first epochs.
BALANCE_DECAY = 0.96
BALANCE_EPOCHS = 10
QUARTERS = ("1: calmest", "2: calm", "3: lively", "4: liveliest")


class StocksTask(MoETask):
    """Train MIGA on one day per step, score it over a span of days, or rank the stocks of the latest day."""

    model: Miga | MigaEnsemble
    monitor = "val_RankIC"
    monitor_mode = "max"

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        pretrained: str | None = None,
        twin: str | None = None,
        loss: Literal["ic", "mse"] = "ic",
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        warmup: float = 0.1,
    ) -> None:
        """Build the network.

        Args:
            network: Arguments of `tasks.stocks.model.Miga` that differ from its defaults.
            pretrained: Name of a zoo checkpoint, or a folder written by `zoo.save`, in place of a new network.
            twin: The same of the network with one head that `test` compares with; None compares with none.
            loss: `ic`, minus the correlation of a day's scores and ranked labels, or `mse`.
            lr: Peak learning rate of AdamW.
            weight_decay: Its weight decay.
            warmup: Share of all steps in which the rate rises.

        Raises:
            UnknownNameError: There is no such loss or argument of the network.
            ValueError: Both a new network and a checkpoint are asked for.
        """
        if loss not in LOSSES:
            raise UnknownNameError("loss", loss, LOSSES)
        check_network(Miga, network, pretrained)
        self.network = network or {}
        self.pretrained = pretrained
        self.twin = twin
        self.loss = LOSSES[loss]
        self.tables: dict[str, Array] = {}
        self.weights: list[Array] = []
        # Of a test: a plain mapping, so that Lightning does not save them.
        self.rivals: dict[str, Miga | MigaEnsemble] = {}
        super().__init__(lr, weight_decay, warmup)

    def configure_models(self) -> None:
        """Load the checkpoint, or build a new network."""
        if self.pretrained:
            self.model = hub.load_as(self.pretrained, Miga, MigaEnsemble).train()
        else:
            self.model = Miga(**self.network)

    def setup(self, stage: str) -> None:
        """Compare the networks with the data, and let a new one adopt the data's scaling.

        Raises:
            ValueError: They differ in features or window, the trainer has several processes, an ensemble is to be
                trained, or validation has too few stocks.
        """
        self.require_one_process("Days are scored one by one, and each would choose the best epoch by its own.")
        data: StocksDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        found = len(data.table.names), data.window
        if found != (self.model.features, self.model.window):
            raise ValueError(
                f"The network reads {self.model.features} features on {self.model.window} days, the data have "
                f"{found[0]} on {found[1]}: set model.network's features and window to those of --data.features and "
                "--data.window."
            )
        for name in (self.pretrained, self.twin if stage == "test" else None):
            if name:
                check_features(name, data.table.names)
        if stage != "fit":
            return
        if isinstance(self.model, MigaEnsemble):
            raise ValueError(f"{self.pretrained} is an ensemble, which only scores: fine-tune a network of one seed.")
        check_validation(data.require("val_set"))
        if not self.pretrained:
            self.model.standardise_by(data.scaler)

    def step(self, batch: Day) -> StepOutput:
        """Score a day's stocks."""
        scores = self.model(batch.features)
        return StepOutput(self.loss(scores, batch.labels), scores, batch.returns)

    def on_train_epoch_start(self) -> None:
        """Let the balance loss fade."""
        network_of(self.model).scale_balance(BALANCE_DECAY ** min(self.current_epoch, BALANCE_EPOCHS))

    def validation_step(self, batch: Day, batch_idx: int) -> None:
        """Log the correlations of a day with the raw returns; a day without any counts for nothing."""
        output = self.step(batch)
        scores, returns = (values.detach().cpu().numpy()[None] for values in (output.predictions, output.targets))
        values = {"val_loss": output.loss, "val_IC": daily_ic(scores, returns)[0]}
        values["val_RankIC"] = daily_rank_ic(scores, returns)[0]
        if np.isfinite(values["val_RankIC"]):
            self.log_dict(values, batch_size=1, prog_bar=True)

    def on_fit_end(self) -> None:
        """Save the network of the best epoch as a checkpoint in the run folder."""
        folder = Path(self.trainer.default_root_dir) / "checkpoint"
        data: StocksDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        self.load_best()
        card = miga_card(self.model, data, self.trainer.current_epoch)
        golden = golden_day(data)
        config = self.data_config(
            data, StocksDataModule, "runs/stocks/test", {"twin": self.twin} if self.twin else None
        )
        hub.save(self.model.cpu().eval(), folder, card=card, golden_input=golden, config=config)
        print(f"Checkpoint: {folder}")

    def on_test_start(self) -> None:
        """Begin new results."""
        self.prediction_rows, self.weights = [], []
        self.rivals = {TWIN: hub.load_as(self.twin, Miga, MigaEnsemble).to(self.device)} if self.twin else {}
        dataset = self.test_days()
        empty = np.full((len(dataset), len(dataset.panel.symbols)), np.nan)
        self.tables = {name: empty.copy() for name in (OURS, *self.rivals)}

    def test_days(self) -> DayDataset:
        """The days that are tested."""
        days: DayDataset = self.trainer.datamodule.test_set  # type: ignore[attr-defined]
        return days

    def test_step(self, batch: Day, batch_idx: int) -> None:
        """Score a day by the network and its rivals, and keep who spoke."""
        scores, weight = map(to_array, self.model.explain(batch.features))
        stocks = batch.positions.cpu().numpy()
        self.tables[OURS][batch_idx, stocks] = scores
        for name, rival in self.rivals.items():
            self.tables[name][batch_idx, stocks] = to_array(rival(batch.features))
        self.weights.append(weight)
        self.prediction_rows += rows_of(batch, scores, weight)

    def report(self, folder: Path) -> dict[str, float]:
        """Print the tables; write `metrics.json`, `predictions.parquet` and the plots."""
        dataset = self.test_days()
        scores = {**self.tables, LOW_VOLATILITY: low_volatility(dataset)}
        evaluation = evaluate_scores(scores, Market.of(dataset.panel, dataset.members, dataset.days))
        title = f"Stocks, {len(dataset)} days, {evaluation.dates[0]}..{evaluation.dates[-1]}"
        print_table(f"{title} (excess over the equal-weight index, percent a year)", evaluation.rows())
        print_table("Ours, with 95 % intervals over days", evaluation.intervals(OURS))
        metrics = dict(evaluation.metrics(OURS))
        for row in evaluation.intervals(OURS):
            metrics |= {f"{row['metric']}/{bound}": row[bound] for bound in ("low", "high")}
        for rival in (*self.rivals, LOW_VOLATILITY):
            differences = evaluation.differences(OURS, rival)
            print_table(f"Ours minus {rival}, 95 % intervals over days", differences)
            metrics |= {f"{rival}/{name}": value for name, value in evaluation.metrics(rival).items()}
            for row in differences:
                metrics |= {f"minus_{rival}/{row['metric']}{end}": row[key] for end, key in DIFFERENCE_KEYS.items()}
        horizons = {name: model.horizon_ic for name, model in evaluation.models.items()}
        print(f"Look-ahead: {horizon_alarm(horizons[OURS]).words}")
        pictures = [
            plot_cumulative_ic(evaluation.dates, evaluation.series("RankIC"), folder / "rank_ic.png"),
            plot_excess(evaluation.dates, evaluation.series("excess_cost"), folder / "excess.png"),
            plot_horizons(horizons, folder / "horizons.png"),
        ]
        if network_of(self.model).mixture:
            pictures.append(self.plot_experts(dataset, folder / "experts.png"))
            metrics |= self.agreement(dataset)
        print(f"Pictures: {', '.join(map(str, pictures))}")
        write_metrics(folder, metrics)
        write_predictions(folder, self.prediction_rows)
        return metrics

    def experts_of_one(self) -> tuple[Array, int]:
        """Weights `(samples, E)` in all that was tested, and the number of groups; of an ensemble's first network."""
        first = network_of(self.model)
        return np.concatenate(self.weights)[:, : first.num_groups * first.experts_per_group], first.num_groups

    def plot_experts(self, dataset: DayDataset, path: Path) -> Path:
        """Draw who spoke when, and for how volatile stocks."""
        weights, groups = self.experts_of_one()
        months = [row["date"][:7] for row in self.prediction_rows]
        quarters = calmness(dataset)
        known = np.flatnonzero(quarters)
        by_quarter = mean_usage(weights[known], [QUARTERS[quarters[sample] - 1] for sample in known])
        return plot_usage(mean_usage(weights, months), by_quarter, groups, path, STYLE_NAMES[0])

    def agreement(self, dataset: DayDataset) -> dict[str, float]:
        """How well expert groups tell planted styles; nothing where none are planted."""
        styles = self.trainer.datamodule.styles  # type: ignore[attr-defined]
        if styles is None:
            return {}
        planted = styles[dataset.days][dataset.universe[dataset.days]]
        return {"style_nmi": routing_agreement(*self.experts_of_one(), planted)}

    def predict_step(self, batch: Day, batch_idx: int) -> list[Mapping[str, Any]]:
        """Rank the stocks of a day, the best first."""
        scores, weight = map(to_array, self.model.explain(batch.features))
        rows = sorted(rows_of(batch, scores, weight), key=lambda row: -row["score"])
        self.prediction_rows += [{"rank": place + 1, **row} for place, row in enumerate(rows)]
        return rows

    def report_predictions(self, folder: Path) -> None:
        """Print the best and write `predictions.parquet`."""
        best = [
            {key: row[key] for key in ("rank", "symbol", "score", "experts") if key in row}
            for row in self.prediction_rows[:SHOWN]
        ]
        print_table(f"Best of {len(self.prediction_rows)} stocks on {self.prediction_rows[0]['date']}", best)
        super().report_predictions(folder)


DIFFERENCE_KEYS = {"": "mean", "/low": "low", "/high": "high"}
# How many stocks, and how many experts of each, a person is shown.
SHOWN = 10
SPEAKERS = 3


def network_of(model: Miga | MigaEnsemble) -> Miga:
    """The network itself, or the first of an ensemble."""
    return model.first if isinstance(model, MigaEnsemble) else model


def check_features(name: str, found: Sequence[str]) -> None:
    """Refuse a checkpoint that has learned from other features, or from the same in another order.

    Args:
        name: The checkpoint; one whose card names no features is let through.
        found: The features of the data.

    Raises:
        ValueError: They differ.
    """
    learned = hub.info(name).card.preprocessing.get("features", found)
    for place, (theirs, ours) in enumerate(zip_longest(learned, found, fillvalue="nothing"), 1):
        if theirs != ours:
            raise ValueError(
                f"{name} has learned from other features than the data have, or in another order: feature {place} is "
                f"{theirs}, in the data {ours}. Set --data.features to those that `moe-zoo info {name} --json` lists."
            )


def check_validation(dataset: DayDataset) -> None:
    """Refuse validation days none of which has enough stocks to rank.

    Raises:
        ValueError: There are too few.
    """
    known = dataset.universe & np.isfinite(dataset.returns)
    most = int(known[dataset.days].sum(axis=1).max())
    if most < MIN_STOCKS:
        raise ValueError(
            f"A day's RankIC, which picks the best epoch, needs {MIN_STOCKS} stocks with features and a known return; "
            f"no day of --data.val has more than {most}. Give bars of more stocks, or other days."
        )


def to_array(values: Tensor) -> Array:
    """A tensor as what evaluation takes."""
    return values.detach().cpu().numpy().astype(np.float64)


def rows_of(batch: Day, scores: Array, weights: Array) -> list[dict[str, Any]]:
    """One row per stock of a day, with the experts that weighed most."""
    rows: list[dict[str, Any]] = []
    for stock, symbol in enumerate(batch.symbols):
        row = {"id": f"{batch.date} {symbol}", "date": batch.date, "symbol": symbol, "score": scores[stock]}
        if weights.shape[1]:
            loudest = np.argsort(-weights[stock], kind="stable")[:SPEAKERS]
            row["experts"] = ", ".join(f"{expert} ({weights[stock, expert]:.2f})" for expert in loudest)
        rows.append({**row, "target": float(batch.returns[stock])})
    return rows


def calmness(dataset: DayDataset) -> NDArray[np.int64]:
    """The quarter of its day by volatility of each stock-day, 1 is the calmest; 0 where the volatility is unknown.

    Returns:
        `(samples,)`, in the order of the batches.
    """
    import pandas as pd

    ranks = pd.DataFrame(-low_volatility(dataset)).rank(axis=1, pct=True).to_numpy()
    return np.nan_to_num(np.ceil(len(QUARTERS) * ranks[dataset.universe[dataset.days]])).astype(np.int64)


def golden_day(data: StocksDataModule) -> Tensor:
    """Features for the golden input of a checkpoint: this is given away, and a day of the data may not be ours to give.

    Args:
        data: After `setup` for fitting.

    Returns:
        Of as many stocks, at most 32, and days as a real day has.
    """
    features = data.require("val_set")[0].features[:32]
    return torch.randn(features.shape, generator=torch.Generator().manual_seed(0))


def miga_card(model: Miga, data: StocksDataModule, epochs: int) -> hub.Card:
    """What a trained network says about itself."""
    kind = "MIGA" if model.mixture else "The twin of MIGA, with one head,"
    return hub.Card(
        title=f"{kind} for cross-sectional stock prediction",
        task="ranking of a day's stocks by their next return",
        description=(
            "Scores the stocks of one day from their last days' features, which it scales itself. Scores of one day "
            "can be ranked; their level means nothing. No promise of profit."
        ),
        data=f"{data.describe()}; {epochs} epochs.",
        data_terms="its trainer's to say",
        weights_licence="its trainer's to say",
        preprocessing={"features": list(data.table.names), "window": data.window},
    )
