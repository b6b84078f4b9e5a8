"""A task with everything random that training can have: dropout, routing noise, a shuffled order; and a way to die."""

import os
import signal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanSquaredError, MetricCollection

from zoo.data import ZooDataModule
from zoo.moe import GroupedExperts, MoELayer, NoisyTopKRouter
from zoo.task import MoETask, StepOutput


class RoutedToy(MoETask):
    """Regression with a noisy mixture and dropout."""

    monitor = "val_mse"
    monitor_mode = "min"

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)

    def configure_models(self) -> None:
        mixture = MoELayer(
            NoisyTopKRouter(4, 4, 2), GroupedExperts(4, 4, 8), aux_losses={"importance": 0.1, "load": 0.1}
        )
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.2), mixture, nn.Linear(4, 1))

    def configure_metrics(self) -> MetricCollection:
        return MetricCollection({"mse": MeanSquaredError()})

    def step(self, batch: list[Tensor]) -> StepOutput:
        predictions = self(batch[0])
        return StepOutput(nn.functional.mse_loss(predictions, batch[1]), predictions, batch[1])


class RoutedToyData(ZooDataModule):
    """Forty rows of seeded noise."""

    def __init__(self, batch_size: int = 8, num_workers: int = 0) -> None:
        super().__init__(batch_size, num_workers)

    def setup(self, stage: str | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(40, 4, generator=generator)
        self.train_set = self.val_set = self.test_set = TensorDataset(x, x.square().sum(1, keepdim=True))


class Die(pl.Callback):
    """Kill the process, as a power cut would, in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
