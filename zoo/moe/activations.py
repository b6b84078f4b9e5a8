"""Nonlinearities of the experts, and their gradients for backends with a backward of their own."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

aten = torch.ops.aten

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}

# Gradient of the input, from the gradient of the output and the input.
GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": aten.silu_backward,
    "gelu": aten.gelu_backward,
    "relu": lambda grad, x: aten.threshold_backward(grad, x, 0),
    "tanh": lambda grad, x: aten.tanh_backward(grad, torch.tanh(x)),
    "identity": lambda grad, x: grad,
}


def activate(hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """Apply a nonlinearity; where gated, the first half of the columns, activated, multiplies the second.

    Args:
        hidden: `(..., 2H)` if gated, else `(..., H)`.
        activation: Name in `ACTIVATIONS`.
        gated: Whether there is a gate.
    """
    if not gated:
        return ACTIVATIONS[activation](hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def activate_backward(grad: Tensor, hidden: Tensor, activation: str, gated: bool) -> tuple[Tensor, Tensor]:
    """`activate(hidden, activation, gated)` once more, and the gradient of `hidden` from that of the result."""
    if not gated:
        return ACTIVATIONS[activation](hidden), GRADIENTS[activation](grad, hidden)
    gate, up = hidden.chunk(2, dim=-1)
    activated = ACTIVATIONS[activation](gate)
    grad_hidden = torch.empty_like(hidden)
    grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
    grad_gate.copy_(GRADIENTS[activation](grad * up, gate))
    torch.mul(grad, activated, out=grad_up)
    return activated * up, grad_hidden
