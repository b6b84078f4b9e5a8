"""`RoutedModule`, the base of everything that owns a router, and the collection of auxiliary losses."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from zoo.errors import UnknownNameError
from zoo.moe.losses import LOSSES
from zoo.moe.routing import RoutingOutput

Observer = Callable[[RoutingOutput], None]

# Far above what one step of any known method needs; reached only when nobody collects.
MAX_PENDING_LOSSES = 256


def in_backward() -> bool:
    """Whether autograd is running now, i.e. this forward is a recomputation of gradient checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class RoutedModule(nn.Module):
    """Base of everything that owns a router: `MoELayer`, the LoRA layers, and modules of a user's own.

    A subclass calls `record(routing)` once per forward. In training with gradients enabled that computes the auxiliary
    losses named in `aux_losses`; `collect_aux_losses(model)` hands them out, once per micro-batch. Gradient
    checkpointing must be non-reentrant (`use_reentrant=False`): the reentrant kind runs its forward without gradients.

    Attributes:
        router: The router; a subclass sets it.
    """

    router: Any

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
        self._pending_losses: list[dict[str, Tensor]] = []
        self._observers: OrderedDict[int, Observer] = OrderedDict()

    @property
    def counts_for_bias(self) -> bool:
        """Whether the router has a selection bias that is moved by what it chooses."""
        return getattr(self.router, "selection_bias", False) is True

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
        if self.counts_for_bias and not recomputing:
            self.router.window_counts += routing.column_counts()
        if not self.aux_losses:
            return
        losses = {name: LOSSES[name](routing) for name in self.aux_losses}
        if recomputing:
            return
        if len(self._pending_losses) >= MAX_PENDING_LOSSES:
            raise RuntimeError(
                f"The auxiliary losses of {MAX_PENDING_LOSSES} forwards were never collected. Call "
                "collect_aux_losses(model) once per training step and add its total to your loss, "
                "or build the module with aux_losses={}."
            )
        self._pending_losses.append(losses)

    def __getstate__(self) -> dict[str, Any]:
        """Leave pending losses out of copies and pickles: they belong to a graph that a copy does not have."""
        return {**self.__dict__, "_pending_losses": [], "_observers": OrderedDict()}


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
    for module in model.modules():
        if isinstance(module, RoutedModule):
            for losses in module._pending_losses:
                for name, loss in losses.items():
                    weighted.setdefault(name, []).append(module.aux_losses[name] * loss)
                    values.setdefault(name, []).append(loss.detach())
            module._pending_losses.clear()
    total = (
        torch.stack([torch.stack(terms).mean() for terms in weighted.values()]).sum() if weighted else torch.zeros(())
    )
    return AuxLosses(total, {name: torch.stack(terms).mean() for name, terms in values.items()})


def routed_modules(model: nn.Module) -> dict[str, RoutedModule]:
    """All routed modules of a model by their dotted names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedModule)}
