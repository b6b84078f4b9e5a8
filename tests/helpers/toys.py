"""The smallest model, task and datamodule that behave like an application's."""

import signal

import torch
from torch import nn

from zoo.data import ZooDataModule
from zoo.hub import Card, Result, load
from zoo.task import MoETask, StepOutput


class Toy(nn.Module):
    """A linear layer with a buffer of each kind."""

    def __init__(self, dim: int = 4, names: list[str] | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.names = names
        self.linear = nn.Linear(dim, 2)
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("scale", torch.full((dim,), 1.0001))

    def forward(self, x):
        return self.linear(x * self.scale)


class ToyTask(MoETask):
    """Draws noise in every step, so that an exact resume needs the right random state."""

    monitor = "val_loss"
    monitor_mode = "min"

    def __init__(self, dim: int = 4, pretrained: str | None = None, stop_at: int | None = None) -> None:
        self.dim = dim
        self.pretrained = pretrained
        self.stop_at = stop_at
        super().__init__(lr=0.1)

    def configure_models(self):
        self.model = load(self.pretrained) if self.pretrained else Toy(self.dim)

    def step(self, batch):
        if self.training and self.global_step == self.stop_at:
            signal.raise_signal(signal.SIGINT)
        noise = 0.1 * torch.randn_like(batch) if self.training else 0.0
        predictions = self.model(batch + noise)
        return StepOutput((predictions - 1).square().mean(), predictions, torch.ones_like(predictions))

    def predict_step(self, batch, batch_idx):
        out = self.model(batch)
        self.prediction_rows += [{"prediction": row[0].item()} for row in out]
        return out


class ToyData(ZooDataModule):
    """Seeded noise."""

    def __init__(self, root: str | None = None, batch_size: int = 4, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.root = root

    def setup(self, stage):
        self.train_set = self.val_set = self.test_set = torch.randn(
            16, 4, generator=torch.Generator().manual_seed(self.seed)
        )


CARD = Card(
    title="A toy",
    task="nothing",
    description="Made by a test.",
    data="seeded noise (synthetic)",
    data_terms="none",
    weights_licence="Apache-2.0",
    results=[Result({"loss": 0.5, "other": 1.0}, "moe-zoo test toy/one", "0000000", 0)],
)

CONFIG = {
    "model": {"class_path": "toys.ToyTask"},
    "data": {"class_path": "toys.ToyData"},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
}
