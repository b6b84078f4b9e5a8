"""`MoETask`, the LightningModule that every application subclasses."""

import inspect
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from zoo import hub
from zoo.errors import UnknownNameError
from zoo.moe import collect_aux_losses
from zoo.report import print_table, write_metrics, write_predictions

# Arguments of datamodules that say where a user's files are and what is in them.
OWN_FILES = (
    "root",
    "file",
    "test_file",
    "columns",
    "labels",
    "membership",
    "folder",
    "ir",
    "vi",
    "context_file",
    "cache",
)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one batch gave.

    Attributes:
        loss: Scalar, auxiliary losses of routed modules not included.
        predictions: What the metrics take as predictions.
        targets: What the metrics take as targets.
    """

    loss: Tensor
    predictions: Tensor
    targets: Tensor


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Factor on the learning rate: a linear rise over the first share of the steps, then a cosine to zero.

    Args:
        step: From 0.
        steps: All steps.
        warmup: Share of the rise, 0..1.
    """
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))


def check_network(network: type[nn.Module], arguments: Mapping[str, Any] | None, pretrained: str | None) -> None:
    """Refuse arguments that a network does not have, and arguments beside a checkpoint, which brings its own.

    Args:
        network: The class to build.
        arguments: Of its constructor.
        pretrained: The checkpoint to load instead, or None.

    Raises:
        UnknownNameError: There is no such argument.
        ValueError: Both are given.
    """
    known = list(inspect.signature(network).parameters)
    for name in arguments or {}:
        if name not in known:
            raise UnknownNameError("argument of network", name, known)
    if arguments and pretrained:
        raise ValueError(f"network={arguments}: {pretrained} brings its own; leave one of them out.")


class MoETask(pl.LightningModule):
    """Base of all tasks: a subclass fills three hooks and says what one step is.

    - `configure_models` sets `self.model`,
    - `configure_losses` sets what `step` needs (optional),
    - `configure_metrics` returns a `MetricCollection`, cloned for training, validation and test (optional),
    - `step(batch)` returns a `StepOutput`.

    A subclass sets its own attributes before it calls `super().__init__()`, which calls the hooks. Auxiliary losses are
    collected once per training step and added to its loss.

    Attributes:
        model: The network.
        monitor: Logged name that picks the best checkpoint, or None.
        monitor_mode: Whether larger (`max`) or smaller (`min`) is better.
        prediction_rows: One mapping per sample, filled by a subclass in `test_step` or `predict_step`.
    """

    model: nn.Module
    monitor: str | None = None
    monitor_mode: str = "max"

    def __init__(self, lr: float = 1e-3, weight_decay: float = 0.0, warmup: float = 0.3) -> None:
        """Save the arguments of the subclass as hyperparameters and call the hooks.

        Args:
            lr: Peak learning rate of AdamW.
            weight_decay: Its weight decay.
            warmup: Share of all steps in which the rate rises before it falls to zero.
        """
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.prediction_rows: list[Mapping[str, Any]] = []
        self.configure_models()
        self.configure_losses()
        metrics = self.configure_metrics()
        self.train_metrics = metrics.clone(prefix="train_")
        self.val_metrics = metrics.clone(prefix="val_")
        self.test_metrics = metrics.clone(prefix="test_")

    def configure_models(self) -> None:
        """Set `self.model`."""
        raise TypeError(f"{type(self).__name__} must define configure_models().")

    def configure_losses(self) -> None:
        """Set the loss functions that `step` uses; nothing by default."""

    def configure_metrics(self) -> MetricCollection:
        """The metrics, without prefix; none by default."""
        return MetricCollection({})

    def step(self, batch: Any) -> StepOutput:
        """Run the model on a batch."""
        raise TypeError(f"{type(self).__name__} must define step(batch).")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.model(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step of training: the task's loss and the auxiliary losses of all routed modules."""
        output = self.step(batch)
        aux = collect_aux_losses(self)
        loss = output.loss + aux.total.to(output.loss.device)
        self.log("train_loss", loss.detach(), prog_bar=True)
        self.log_dict({f"train_{name}_loss": value for name, value in aux.values.items()})
        self.update_metrics(self.train_metrics, output)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """One step of validation."""
        output = self.step(batch)
        self.log("val_loss", output.loss, prog_bar=True, batch_size=len(output.targets), sync_dist=True)
        self.update_metrics(self.val_metrics, output)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """One step of testing."""
        output = self.step(batch)
        self.log("test_loss", output.loss, batch_size=len(output.targets), sync_dist=True)
        self.update_metrics(self.test_metrics, output)

    def update_metrics(self, metrics: MetricCollection, output: StepOutput) -> None:
        """Feed the metrics of one split and have Lightning log them per epoch."""
        if len(metrics):
            metrics.update(output.predictions.detach(), output.targets)
            self.log_dict(metrics, on_step=False, on_epoch=True)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer trains; a group may have a peak rate of its own, `lr`."""
        return [{"params": [parameter for parameter in self.parameters() if parameter.requires_grad]}]

    def configure_optimizers(self) -> Any:
        """AdamW; its rate rises, then falls as a cosine, with every step, so that resuming at an epoch is exact."""
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr=self.lr, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def load_best(self) -> None:
        """After fitting: go back to the weights of the epoch that was best by `monitor`.

        A trainer that keeps no checkpoints, or stopped before its first epoch ended, has only those of the end.
        """
        for callback in self.trainer.checkpoint_callbacks:
            best = getattr(callback, "best_model_path", "")
            if best and getattr(callback, "monitor", None):
                self.load_state_dict(torch.load(best, weights_only=True)["state_dict"])

    def data_config(
        self,
        data: pl.LightningDataModule,
        kind: type[pl.LightningDataModule],
        out: str,
        arguments: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What `moe-zoo test` runs on a checkpoint: the data that were learned from.

        Args:
            data: These; their hyperparameters have to be saved.
            kind: The class that users have, of which they may be a subclass.
            out: The run folder of tests.
            arguments: Of the task, that a test needs.
        """
        known, given = inspect.signature(kind).parameters, data.hparams
        chosen = {name: given[name] for name in known if name not in OWN_FILES and given[name] is not None}
        return {
            "seed_everything": 0,
            "model": {
                "class_path": f"{type(self).__module__}.{type(self).__name__}",
                "init_args": dict(arguments or {}),
            },
            "data": {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": chosen},
            "trainer": {"accelerator": "auto", "enable_model_summary": False, "default_root_dir": out},
        }

    def require_one_process(self, why: str) -> None:
        """Refuse a trainer of several processes.

        Args:
            why: A sentence that says what does not go together with them.

        Raises:
            ValueError: It has several.
        """
        if self.trainer.world_size > 1:
            raise ValueError(
                f"The trainer has {self.trainer.world_size} processes. {why} Set --trainer.devices=1 and "
                "--trainer.num_nodes=1."
            )

    def report_recorded(
        self, checkpoint: str | None, own: Mapping[str, float], measured: Collection[str] = ()
    ) -> dict[str, float]:
        """Print what a checkpoint has recorded of other methods beside its own metrics.

        Args:
            checkpoint: Its name; None has recorded nothing.
            own: Its metrics.
            measured: Methods that the test measures itself.

        Returns:
            The recorded ones as `<method>/<metric>`.
        """
        rows = hub.recorded(checkpoint, own) if checkpoint else []
        rows = [row for row in rows if row["method"].removesuffix(hub.RECORDED) not in measured]
        if rows:
            title = "Beside what the checkpoint has recorded of other methods, on the data of its card"
            print_table(title, [{"method": "ours", **own}, *rows])
            for command in dict.fromkeys(row["command"] for row in rows):
                print(f"Recorded of: {command}")
        return {
            f"{row['method'].removesuffix(hub.RECORDED)}/{key}": row[key] for row in rows for key in own if key in row
        }

    def report_predictions(self, folder: Path) -> None:
        """After predicting: write `predictions.parquet`, one row per sample that `predict_step` kept.

        Args:
            folder: The run folder.

        Raises:
            ValueError: `predict_step` kept nothing.
        """
        if not self.prediction_rows:
            raise ValueError(f"{type(self).__name__} kept no predictions: it has nothing to predict on this data.")
        print(f"{len(self.prediction_rows)} predictions: {write_predictions(folder, self.prediction_rows)}")

    def report(self, folder: Path) -> dict[str, float]:
        """After testing: print one table and write `metrics.json` and `predictions.parquet`.

        Args:
            folder: The run folder.

        Returns:
            The metrics by their names without the `test_` prefix.
        """
        metrics = {
            name.removeprefix("test_"): float(value)
            for name, value in self.trainer.callback_metrics.items()
            if name.startswith("test_")
        }
        print_table("Test", [{"metric": name, "value": value} for name, value in metrics.items()])
        write_metrics(folder, metrics)
        if self.prediction_rows:
            write_predictions(folder, self.prediction_rows)
        return metrics
