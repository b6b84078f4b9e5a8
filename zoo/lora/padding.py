"""How the layers of an adapted network learn which of its positions are padding."""

import inspect
from bisect import bisect_right
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from zoo.moe.observe import Handles
from zoo.moe.routed import in_backward

# Forwards whose layers gradient checkpointing may still recompute; far more than any step has.
MAX_FORWARDS = 256


class PaddingMask:
    """The `attention_mask` of the forward that runs now, or of the one that is being recomputed.

    Forward hooks of the network set it and clear it. Gradient checkpointing recomputes layers long after, and maybe
    those of several forwards: which one a layer belongs to follows from the number of the autograd node that asks for
    it, as each forward knows where its own numbers begin.

    Attributes:
        current: `(B, S)` bool, true for real positions; None outside of a forward and where all are real.
        trains: Whether the forward that runs now trains the network.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch the forwards of a network.

        Args:
            model: One whose forward may take `attention_mask`; any other has no padding.
        """
        self.parameters = list(inspect.signature(model.forward).parameters)
        self.current: Tensor | None = None
        self.trains = False
        self.first_nodes: deque[int] = deque(maxlen=MAX_FORWARDS)
        self.masks: deque[Tensor | None] = deque(maxlen=MAX_FORWARDS)
        self.handles = Handles(
            [
                model.register_forward_pre_hook(self.open, with_kwargs=True),
                model.register_forward_hook(self.close, always_call=True),
            ]
        )

    def open(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: take its mask."""
        if in_backward():
            return
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        self.current = real_positions(given, model.training)
        self.trains = model.training and torch.is_grad_enabled()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.first_nodes.append(torch._C._autograd._get_sequence_nr())
            self.masks.append(self.current)

    def close(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a forward, or when it failed: there is no mask any more."""
        self.current, self.trains = None, False

    def units(self, x: Tensor) -> Tensor | None:
        """Which units of a layer's input `(*lead, D)` are real, `(T,)` bool, or None where all are.

        Units that are not the network's positions, such as pooled vectors, are all real.

        Raises:
            ValueError: The layer runs without gradients in a forward that trains, so it could record nothing.
        """
        if self.trains and not torch.is_grad_enabled() and not in_backward():
            raise ValueError(
                "A routed adapter runs without gradients while the network trains: its auxiliary losses and the counts "
                "for its biases would be lost. Gradient checkpointing does that with use_reentrant=True; pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        mask = self.recomputed() if in_backward() else self.current
        if mask is None or x.shape[:-1] not in (mask.shape, (mask.numel(),)):
            return None
        return mask.reshape(-1).to(x.device)

    def recomputed(self) -> Tensor | None:
        """The mask of the forward whose layer gradient checkpointing computes again.

        Raises:
            RuntimeError: It was too many forwards ago.
        """
        place = bisect_right(self.first_nodes, torch._C._current_autograd_node()._sequence_nr()) - 1
        if place < 0:
            raise RuntimeError(
                f"Gradient checkpointing recomputes a layer of a forward before the last {MAX_FORWARDS}: its "
                "attention_mask is not known any more. Call backward() sooner."
            )
        return self.masks[place]


def real_positions(given: dict[str, Any], training: bool) -> Tensor | None:
    """Which positions a forward really has, `(B, S)` bool, or None if nothing says that some are padding.

    While text is generated the mask also covers what is cached; the positions of the forward are its last.

    Args:
        given: The network's arguments by name.
        training: Whether the network trains. Otherwise masks of another form tell nothing about positions, as
            generation with a static cache makes them, and all positions count as real.

    Raises:
        ValueError: The mask has another form in training, so padding would be counted.
    """
    mask = given.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        if training:
            form = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            raise ValueError(
                f"attention_mask has {form}; expected (batch, length): routed adapters neither route nor count "
                "padding, and read from it which positions are."
            )
        return None
    inputs = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), mask)
    return mask[:, -inputs.shape[1] :].bool()
