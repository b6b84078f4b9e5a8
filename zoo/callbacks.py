"""What the core layer and exact resuming need of a training loop."""

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from zoo.data import epoch_seed
from zoo.moe import Usage, routed_modules, update_selection_biases


class EpochSeed(pl.Callback):
    """Seed every random generator at the start of each epoch from the run's seed and the epoch's number alone.

    Whatever an epoch draws (dropout, routing noise, augmentation, worker seeds) is then the same in a run that was
    killed and resumed from its last epoch boundary as in one that never stopped; there is no state to save. The order
    of samples is `zoo.data.EpochSampler`'s.
    """

    def __init__(self, seed: int = 0) -> None:
        """Store the run's seed."""
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed Python, NumPy, torch and the loader's worker seeds."""
        seed = epoch_seed(self.seed, trainer.current_epoch)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        generator = getattr(trainer.train_dataloader, "generator", None)
        if generator is not None:
            generator.manual_seed(seed)


class BiasBalancing(pl.Callback):
    """Move selection biases once per optimiser step, whatever the number of micro-batches in it."""

    def __init__(self, rate: float = 1e-3) -> None:
        """Store the step of the sign update."""
        self.rate = rate

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Move the biases by what was routed since the last step."""
        update_selection_biases(pl_module, self.rate)


class UsageHealth(pl.Callback):
    """Log the health of every routed module once per training epoch and print what a person should know at the end.

    Logged as `health/<module>/<number>`, the numbers of `zoo.moe.Usage.summary`.
    """

    def __init__(self) -> None:
        """Start without totals."""
        self.usages: dict[str, Usage] = {}
        self.handles: list[RemovableHandle] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin new totals."""
        self.usages = {name: Usage.empty() for name in routed_modules(pl_module)}
        self.handles = [
            module.observe_routing(self.usages[name].update) for name, module in routed_modules(pl_module).items()
        ]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the totals of the epoch."""
        self.detach()
        for name, usage in self.usages.items():
            if usage.units:
                numbers = {f"health/{name}/{key}": value for key, value in usage.summary().items()}
                pl_module.log_dict(numbers, on_step=False, on_epoch=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print a verdict for each routed module."""
        for name, usage in self.usages.items():
            if usage.units:
                print(usage.verdict(name))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let go of the modules when training is interrupted."""
        self.detach()

    def detach(self) -> None:
        """Stop observing."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def state_dict(self) -> dict[str, Any]:
        """Nothing outlives an epoch."""
        return {}
