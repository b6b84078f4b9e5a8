"""`RoutedModule`, the base of everything that owns a router, and the collection of auxiliary losses."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zoo.errors import UnknownNameError
from zoo.moe.losses import LOSSES
from zoo.moe.routing import RoutingOutput

Observer = Callable[[RoutingOutput], None]

# Far above what one step of any known method needs; reached only when nobody collects, or moves biases.
MAX_PENDING_FORWARDS = 256


def in_backward() -> bool:
    """Whether autograd is running now, i.e. this forward is a recomputation of gradient checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class CountWindow:
    """Column counts of one layer over all processes and all forwards since the last optimiser step.

    Attributes:
        total: `(E',)`, or None in a new window.
    """

    def __init__(self) -> None:
        """Start a new window."""
        self.total: Tensor | None = None

    def counts(self, routing: RoutingOutput, add: bool) -> Tensor:
        """The counts so far, `(E',)`; with `add` those of this forward are added first, over all processes."""
        if add or self.total is None:
            counts = sum_over_processes(routing.column_counts())
            self.total = counts if self.total is None else self.total + counts
        return self.total


def sum_over_processes(counts: Tensor) -> Tensor:
    """Add a tensor up over the processes of `torch.distributed`, in place; as it is where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    return counts


class RoutedModule(nn.Module):
    """Base of everything that owns a router: `MoELayer`, the LoRA layers, and modules of a user's own.

    A subclass calls `record(routing)` once per forward. In training with gradients enabled that computes the auxiliary
    losses named in `aux_losses`; `collect_aux_losses(model)` hands them out, once per micro-batch. Gradient
    checkpointing must be non-reentrant (`use_reentrant=False`): the reentrant kind runs its forward without gradients.

    Attributes:
        router: The router; a subclass sets it, to None if it routes by itself.
        count_window: Counts of the global batch, or None; see `open_count_windows`.
    """

    router: Any
    count_window: CountWindow | None

    def __init__(self, aux_losses: Mapping[str, float] | None = None) -> None:
        """Set up the auxiliary losses.

        Args:
            aux_losses: Coefficient of each loss, by its name in `zoo.moe.losses.LOSSES`, e.g.
                `{"load_balancing": 0.01, "z": 0.001}`.

        Raises:
            UnknownNameError: A loss of that name does not exist.
            ValueError: A coefficient is negative.
        """
        super().__init__()
        for name, coefficient in (aux_losses or {}).items():
            if name not in LOSSES:
                raise UnknownNameError("auxiliary loss", name, LOSSES)
            if coefficient < 0:
                raise ValueError(f"aux_losses[{name!r}] is {coefficient}; a coefficient must be 0 or larger.")
        self.aux_losses = dict(aux_losses or {})
        self.count_window = None
        self._pending_losses: list[dict[str, Tensor]] = []
        self._observers: OrderedDict[int, Observer] = OrderedDict()

    @property
    def biased_router(self) -> Any:
        """The router whose selection bias is moved by what is chosen here, be it an inner one, or None."""
        candidates = [] if self.router is None else self.router.modules()
        return next((router for router in candidates if getattr(router, "selection_bias", False) is True), None)

    def observe_routing(self, observer: Observer) -> RemovableHandle:
        """Call `observer(routing)` on every forward until the returned handle's `remove()` is called."""
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = observer
        return handle

    def record(self, routing: RoutingOutput) -> None:
        """Show the routing of one forward to observers and keep its auxiliary losses for `collect_aux_losses`.

        Raises:
            RuntimeError: The losses of many forwards were never collected.
        """
        recomputing = in_backward()
        if not recomputing:
            for observer in list(self._observers.values()):
                observer(routing)
        if not (self.training and torch.is_grad_enabled()):
            return
        if not recomputing and (biased := self.biased_router) is not None:
            counts = routing.column_counts()
            biased.window_counts = biased.window_counts.to(counts.device) + counts
            if not torch.compiler.is_compiling():
                biased.window_forwards += 1
                warn_of_idle_biases(biased.window_forwards)
        if not self.aux_losses:
            return
        if self.count_window is not None:
            routing = replace(routing, window_counts=self.count_window.counts(routing, add=not recomputing))
        losses = {name: LOSSES[name](routing) for name in self.aux_losses}
        if recomputing:
            return
        if len(self._pending_losses) >= MAX_PENDING_FORWARDS:
            raise RuntimeError(
                f"The auxiliary losses of {MAX_PENDING_FORWARDS} forwards were never collected. Call "
                "collect_aux_losses(model) once per training step and add its total to your loss, "
                "or build the module with aux_losses={}."
            )
        self._pending_losses.append(losses)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start clean: they have neither the graph of pending losses nor observers and windows."""
        return {**self.__dict__, "_pending_losses": [], "_observers": OrderedDict(), "count_window": None}


def warn_of_idle_biases(forwards: int) -> None:
    """Say that nobody balances a router, where its selection bias has not moved in so many forwards of training."""
    if forwards == MAX_PENDING_FORWARDS:
        warnings.warn(
            f"Selection biases have not moved in {forwards} forwards of training: the load is not balanced. Call "
            "update_selection_biases(model) once per optimiser step (zoo.callbacks.BiasBalancing does in Lightning, "
            "zoo.lora.trainer.RoutedTrainerMixin in transformers), or build the router without selection bias.",
            stacklevel=2,
        )


@dataclass(slots=True)
class AuxLosses:
    """The auxiliary losses of one step.

    Attributes:
        total: Scalar to add to the training loss, coefficients included.
        values: Each loss without its coefficient, averaged over layers and forwards, detached, for logging.
    """

    total: Tensor
    values: dict[str, Tensor]


def collect_aux_losses(model: nn.Module) -> AuxLosses:
    """Average the auxiliary losses of all forwards since the last call over layers and forwards, and clear them.

    Call it once per micro-batch, after the forward: `loss = task_loss + collect_aux_losses(model).total`.

    Args:
        model: Any module; its `RoutedModule`s are found by walking it.
    """
    weighted: dict[str, list[Tensor]] = {}
    values: dict[str, list[Tensor]] = {}
    device: torch.device | None = None
    for module in model.modules():
        if isinstance(module, RoutedModule):
            for losses in module._pending_losses:
                for name, loss in losses.items():
                    # The layers of a large network may lie on several devices.
                    device = loss.device if device is None else device
                    weighted.setdefault(name, []).append(module.aux_losses[name] * loss.to(device))
                    values.setdefault(name, []).append(loss.detach().to(device))
            module._pending_losses.clear()
    total = (
        torch.stack([torch.stack(terms).mean() for terms in weighted.values()]).sum() if weighted else torch.zeros(())
    )
    return AuxLosses(total, {name: torch.stack(terms).mean() for name, terms in values.items()})


def routed_modules(model: nn.Module) -> dict[str, RoutedModule]:
    """All routed modules of a model by their dotted names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedModule)}
