"""Watching the routing of any model: our `RoutedModule`s, and the MoE blocks of Hugging Face transformers."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zoo.moe.routed import Observer, RoutedModule, in_backward, routed_modules
from zoo.moe.routing import RoutingOutput


class Handles:
    """Several hooks that are removed together."""

    def __init__(self, handles: Iterable[Any]) -> None:
        """Hold on to handles."""
        self.handles = list(handles)

    def remove(self) -> None:
        """Remove all of them."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def observe_model(model: nn.Module, observer_for: Callable[[str], Observer]) -> Handles:
    """Observe every routed module and every Hugging Face MoE block of a model.

    Args:
        model: Any module.
        observer_for: Called with the dotted name of each, returns what is called with each of its `RoutingOutput`s.

    Returns:
        What stops observing, by its `remove()`.

    Raises:
        ValueError: There is nothing to observe.
    """
    routed, blocks = routed_modules(model), hugging_face_blocks(model)
    if not routed and not blocks:
        raise ValueError(
            "The model has nothing that routes: no RoutedModule (such as MoELayer), and no block with a `gate` or "
            "`router` beside `experts`, as transformers builds them."
        )
    handles: list[Any] = [module.observe_routing(observer_for(name)) for name, module in routed.items()]
    handles += [observe_block(block, observer_for(name)) for name, block in blocks.items()]
    return Handles(handles)


def hugging_face_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """MoE blocks as transformers builds them (a `gate` or `router` beside `experts`), by their dotted names."""
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, RoutedModule)
        and isinstance(getattr(module, "experts", None), nn.Module)
        and gate_of(module) is not None
    }


def gate_of(block: nn.Module) -> nn.Module | None:
    """The router of a Hugging Face block, or None."""
    children = (getattr(block, name, None) for name in ("gate", "router"))
    return next((child for child in children if isinstance(child, nn.Module)), None)


def observe_block(block: nn.Module, observer: Observer) -> Handles:
    """Call `observer(routing)` on every forward of a Hugging Face MoE block.

    The logits are read from what its gate returns, choice and weights from what its experts are called with:
    `experts(hidden, index, weights)`, as transformers 5 does. Padding is not known there and counts as real.

    Raises:
        ValueError: The block has no router.
    """
    logits: list[Tensor] = []

    def keep_logits(gate: nn.Module, inputs: Any, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        logits[:] = [first.detach().flatten(0, -2).float()]

    def show(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [value.detach() for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        index = next(value for value in given if not value.is_floating_point())
        weight = next(value for value in given if value.is_floating_point() and value.shape == index.shape)
        if not in_backward():
            observer(block_routing(logits[0], index, weight))

    gate, experts = gate_of(block), block.get_submodule("experts")
    if gate is None:
        raise ValueError(f"{type(block).__name__} has neither a `gate` nor a `router`.")
    return Handles([gate.register_forward_hook(keep_logits), experts.register_forward_pre_hook(show, with_kwargs=True)])


def block_routing(logits: Tensor, index: Tensor, weight: Tensor) -> RoutingOutput:
    """A `RoutingOutput` from what a Hugging Face block hands around.

    Args:
        logits: `(T, E)`; some gates return probabilities under this name, which is undone.
        index: `(*lead, K)`; E and above are empty slots.
        weight: `(*lead, K)`.
    """
    if bool((logits >= 0).all()) and torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-3):
        logits = logits.clamp(min=1e-20).log()
    index = index.flatten(0, -2).long().clamp(max=logits.shape[1])
    return RoutingOutput(
        index, weight.flatten(0, -2).float(), index, logits, torch.softmax(logits, dim=1), logits.shape[1]
    )
