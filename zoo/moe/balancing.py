"""Balancing without a loss: selection biases, moved once per optimiser step (DeepSeek-V3, section 2.1.2)."""

import torch
from torch import nn

from zoo.moe.routed import routed_modules


def update_selection_biases(model: nn.Module, rate: float = 1e-3) -> None:
    """Move the selection bias of every router that has one, by the units counted since the last call.

    Call it once per optimiser step; in Lightning, `zoo.callbacks.BiasBalancing` does. Counts are added up over
    micro-batches and over the processes of `torch.distributed`.

    Args:
        model: Any module; its routed modules are found by walking it.
        rate: Step of the sign update.

    Raises:
        ValueError: The model has no router with `selection_bias=True`, so nothing would happen.
    """
    routers = [module.router for module in routed_modules(model).values() if module.counts_for_bias]
    if not routers:
        raise ValueError("No router of this model has selection_bias=True: there is no bias to move.")
    for router in routers:
        counts = router.window_counts
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        if counts.sum() > 0:
            router.update_bias(counts, rate)
        counts.zero_()
