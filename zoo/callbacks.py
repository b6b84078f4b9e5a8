"""What the core layer and exact resuming need of a training loop."""

import random
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from torch.optim import Optimizer

from zoo.data import epoch_seed
from zoo.moe import (
    DenseToSparseRouter,
    Handles,
    RoutedModule,
    StableMoERouter,
    Usage,
    observe_model,
    open_count_windows,
    update_selection_biases,
)
from zoo.moe.routed import Observer

_R = TypeVar("_R", DenseToSparseRouter, StableMoERouter)


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


class GlobalBatchBalancing(pl.Callback):
    """Balance over all processes and all micro-batches of an optimiser step, see `zoo.moe.open_count_windows`."""

    def __init__(self) -> None:
        """Start without windows."""
        self.modules: list[RoutedModule] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the first windows."""
        self.modules = open_count_windows(pl_module)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Open new windows: the step's counts are complete."""
        self.modules = open_count_windows(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the windows."""
        self.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the windows when training is interrupted."""
        self.close()

    def close(self) -> None:
        """Let the balance losses count micro-batches again."""
        for module in self.modules:
            module.count_window = None
        self.modules = []


class GateTemperature(pl.Callback):
    """Lower the temperature of dense-to-sparse gates linearly and at last use one expert per unit (EvoMoE)."""

    def __init__(self, start: float = 2.0, end: float = 0.5, steps: int = 5000, sparse_after: int = 6000) -> None:
        """Store the schedule; the defaults are EvoMoE's.

        Args:
            start: Temperature at optimiser step 0.
            end: Temperature from step `steps` on.
            steps: Length of the ramp.
            sparse_after: From this step on each unit uses its best expert alone.

        Raises:
            ValueError: The schedule does not fall, or ends before its ramp.
        """
        if not start >= end > 0:
            raise ValueError(f"start={start}, end={end}: the temperature must fall and stay above 0.")
        if not 0 < steps <= sparse_after:
            raise ValueError(f"steps={steps}, sparse_after={sparse_after}: 0 < steps <= sparse_after must hold.")
        self.start = start
        self.end = end
        self.steps = steps
        self.sparse_after = sparse_after

    def temperature(self, step: int) -> float:
        """Temperature at an optimiser step; 0 is one expert per unit."""
        if step >= self.sparse_after:
            return 0.0
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the temperature of every gate; it follows from the step alone, so that resuming is exact."""
        for router in _routers_of(pl_module, DenseToSparseRouter):
            router.set_temperature(self.temperature(trainer.global_step))


class FreezeRouting(pl.Callback):
    """End StableMoE's first stage: from an optimiser step on, the distilled routers decide and no longer learn."""

    def __init__(self, step: int) -> None:
        """Store the step."""
        self.step = step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Freeze every distilled router when its time has come."""
        routers = _routers_of(pl_module, StableMoERouter)
        if trainer.global_step >= self.step:
            for router in routers:
                router.freeze()


def _routers_of(model: torch.nn.Module, kind: type[_R]) -> list[_R]:
    """All routers of a kind in a model.

    Raises:
        ValueError: There is none, so that a callback would do nothing.
    """
    routers = [module for module in model.modules() if isinstance(module, kind)]
    if not routers:
        raise ValueError(f"The model has no {kind.__name__}.")
    return routers


class UsageHealth(pl.Callback):
    """Log the health of every routed module once per training epoch and print what a person should know at the end.

    Logged as `health/<module>/<number>`, the numbers of `zoo.moe.Usage.summary`.
    """

    def __init__(self) -> None:
        """Start without totals."""
        self.usages: dict[str, Usage] = {}
        self.handles = Handles([])

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin new totals, of which validation within the epoch is no part."""
        self.usages = {}

        def observer_for(name: str) -> Observer:
            usage = self.usages.setdefault(name, Usage.empty())
            return lambda routing: usage.update(routing) if trainer.training else None

        self.handles = observe_model(pl_module, observer_for)

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
        self.handles.remove()
