"""Balancing over more than one micro-batch: selection biases, and the window of global-batch balancing."""

import torch
from torch import nn

from zoo.moe.routed import CountWindow, RoutedModule, routed_modules, sum_over_processes


def update_selection_biases(model: nn.Module, rate: float = 1e-3) -> None:
    """Move the selection bias of every router that has one, by the units counted since the last call.

    Balancing without a loss (DeepSeek-V3, section 2.1.2). Call it once per optimiser step; in Lightning,
    `zoo.callbacks.BiasBalancing` does. Counts are added up over micro-batches and over the processes of
    `torch.distributed`.

    Args:
        model: Any module; its routed modules are found by walking it.
        rate: Step of the sign update.

    Raises:
        ValueError: The model has no router with `selection_bias=True`, so nothing would happen.
    """
    routers = {id(module.biased_router): module.biased_router for module in routed_modules(model).values()}
    routers.pop(id(None), None)
    if not routers:
        raise ValueError("No router of this model has selection_bias=True: there is no bias to move.")
    for router in routers.values():
        counts = sum_over_processes(router.window_counts.to(router.expert_bias.device))
        if counts.sum() > 0:
            router.update_bias(counts, rate)
        router.window_counts = torch.zeros_like(counts)
        router.window_forwards = 0


def open_count_windows(model: nn.Module) -> list[RoutedModule]:
    """Begin a window of global-batch balancing in every routed module with a balance loss.

    Micro-batch balancing forbids experts to specialise in a domain, as each micro-batch holds few; balancing the global
    batch does not (Qiu et al. 2025, arXiv 2501.11873). From now on `load_balancing` and `group_balancing` use counts
    over all processes and all forwards of the window. Call it again after every optimiser step; in Lightning,
    `zoo.callbacks.GlobalBatchBalancing` does. All processes must run the same layers in the same order.

    Args:
        model: Any module; its routed modules are found by walking it.

    Returns:
        The modules whose window was opened.

    Raises:
        ValueError: No routed module has such a loss, so nothing would happen.
    """
    modules = [module for module in routed_modules(model).values() if WINDOWED & set(module.aux_losses)]
    if not modules:
        raise ValueError(f"No routed module of this model has one of the losses {', '.join(sorted(WINDOWED))}.")
    for module in modules:
        module.count_window = CountWindow()
    return modules


WINDOWED = {"load_balancing", "group_balancing"}
