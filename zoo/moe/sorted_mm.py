"""The backend `sorted_mm`: gather, compute, weigh and add up in one autograd function with a backward of its own.

Plain autograd keeps every slot's output for the gradient of its weight and writes each intermediate result to fresh
memory. Here the weight scales the hidden units instead, so that no slot output outlives the forward; products are
written in place; and an expert's rows stay in the cache from the first product to the last.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.moe.activations import activate, activate_backward

# Up to this many rows per expert one batched product beats a product per expert; measured by benchmarks/moe_layer.py.
FEW_ROWS = 160
# So many rows cost less than reading the weights: padding is free.
TINY_ROWS = 16
# Most rows that padding may add up to, over the rows there are.
MAX_PADDING = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the filled slots lie once they are sorted by expert.

    Attributes:
        unit: `(N,)` the unit of each sorted slot.
        slot: `(N,)` its position in the flattened `(T, K)` slots.
        sizes: Slots per expert, summing to N.
        shape: T and K.
    """

    unit: Tensor
    slot: Tensor
    sizes: list[int]
    shape: tuple[int, int]

    def parts(self) -> list[tuple[int, slice]]:
        """The experts that have slots, and where these lie."""
        found, start = [], 0
        for expert, size in enumerate(self.sizes):
            if size:
                found.append((expert, slice(start, start + size)))
            start += size
        return found

    @property
    def pads_well(self) -> bool:
        """Whether one batched product is worth its padding: few rows for each of nearly all experts."""
        longest, busy = max(self.sizes, default=0), sum(size > 0 for size in self.sizes)
        few = longest <= FEW_ROWS and len(self.sizes) * longest <= MAX_PADDING * len(self.unit)
        return 4 * busy >= 3 * len(self.sizes) and (few or 0 < longest <= TINY_ROWS)

    def padded_places(self) -> Tensor:
        """Where each sorted slot lies, `(N,)`, once every expert's rows are padded to the longest."""
        sizes = torch.tensor(self.sizes, device=self.unit.device)
        gaps = torch.arange(len(sizes), device=sizes.device) * max(self.sizes) - (sizes.cumsum(0) - sizes)
        return torch.arange(len(self.unit), device=sizes.device) + gaps.repeat_interleave(sizes)

    def add_up(self, rows: Tensor) -> Tensor:
        """Add sorted rows `(N, D)` up to units `(T, D)`."""
        units, slots = self.shape
        if rows.shape[0] < units * slots:
            return rows.new_zeros(units, rows.shape[1]).index_add_(0, self.unit, rows)
        # Every slot is filled: one gather puts them into order, which is faster than adding by index.
        inverse = torch.empty_like(self.slot)
        inverse[self.slot] = torch.arange(len(self.slot), device=self.slot.device)
        ordered = rows.index_select(0, inverse)
        return ordered if slots == 1 else ordered.view(units, slots, rows.shape[1]).sum(1)


class SortedFeedForward(torch.autograd.Function):
    """Weighted sum over experts of `down(act(gate) * up)`, or of `down(act(up))`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        plan: Plan,
        activation: str,
        gated: bool,
        keep: bool,
    ) -> Tensor:
        """Compute `(T, out)`.

        Args:
            ctx: autograd's context.
            x: `(T, D)`.
            weight: `(N,)` of the sorted slots.
            up: `(E, W, D)`, W = 2H where gated.
            down: `(E, out, H)`.
            up_bias: `(E, W)` or None.
            down_bias: `(E, out)` or None.
            plan: Of the slots.
            activation: Name of the nonlinearity.
            gated: Whether the first half of W gates the second.
            keep: Whether a backward will follow.
        """
        rows = x.index_select(0, plan.unit)
        scale = weight[:, None]
        # Without a backward one expert's hidden units are written over the last one's.
        kept = len(rows) if keep else max(plan.sizes, default=0)
        hidden = x.new_empty(kept, up.shape[1])
        out = x.new_empty(len(rows), down.shape[1])
        for expert, part in plan.parts():
            before = hidden[part] if keep else hidden[: part.stop - part.start]
            multiply(rows[part], up[expert].t(), None if up_bias is None else up_bias[expert], before)
            torch.mm(activate(before, activation, gated) * scale[part], down[expert].t(), out=out[part])
            if down_bias is not None:
                out[part].addcmul_(scale[part], down_bias[expert])
        if keep:
            ctx.save_for_backward(rows, weight, hidden, up, down, up_bias, down_bias)
            ctx.plan, ctx.activation, ctx.gated = plan, activation, gated
        return plan.add_up(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and the four parameters."""
        rows, weight, hidden, up, down, up_bias, down_bias = ctx.saved_tensors
        grads = grad_out.index_select(0, ctx.plan.unit)
        scale = weight[:, None]
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight)
        grad_up, grad_down = (empty_gradient(parameter, ctx.plan.sizes) for parameter in (up, down))
        grad_up_bias, grad_down_bias = (
            None if parameter is None else empty_gradient(parameter, ctx.plan.sizes)
            for parameter in (up_bias, down_bias)
        )
        for expert, part in ctx.plan.parts():
            grad, before = grads[part], hidden[part]
            inner = activate(before, ctx.activation, ctx.gated)
            grad_inner = grad @ down[expert]
            torch.linalg.vecdot(grad_inner, inner, out=grad_weight[part])
            torch.mm(grad.t(), inner * scale[part], out=grad_down[expert])
            if grad_down_bias is not None:
                grad_weight[part] += grad @ down_bias[expert]
                torch.mv(grad.t(), weight[part], out=grad_down_bias[expert])
            grad_before = activate_backward(grad_inner.mul_(scale[part]), before, ctx.activation, ctx.gated)
            torch.mm(grad_before.t(), rows[part], out=grad_up[expert])
            if grad_up_bias is not None:
                torch.sum(grad_before, 0, out=grad_up_bias[expert])
            if grad_rows is not None:
                torch.mm(grad_before, up[expert], out=grad_rows[part])
        grad_x = None if grad_rows is None else ctx.plan.add_up(grad_rows)
        return grad_x, grad_weight, grad_up, grad_down, grad_up_bias, grad_down_bias, None, None, None, None


class PaddedFeedForward(torch.autograd.Function):
    """The same as `SortedFeedForward`, all experts in one batched product, each expert's rows padded to the longest.

    Padding rows have weight 0, so they add nothing to any output or gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        plan: Plan,
        activation: str,
        gated: bool,
        keep: bool,
    ) -> Tensor:
        """Compute `(T, out)`; the arguments are those of `SortedFeedForward`."""
        place = plan.padded_places()
        experts, longest = len(plan.sizes), max(plan.sizes)
        unit = plan.unit.new_zeros(experts * longest)
        unit[place] = plan.unit
        scale = weight.new_zeros(experts * longest)
        scale[place] = weight
        rows = x.index_select(0, unit).view(experts, longest, -1)
        scale = scale.view(experts, longest, 1)
        hidden = torch.bmm(rows, up.transpose(1, 2))
        if up_bias is not None:
            hidden += up_bias[:, None]
        out = torch.bmm(activate(hidden, activation, gated) * scale, down.transpose(1, 2))
        if down_bias is not None:
            out.addcmul_(scale, down_bias[:, None])
        if keep:
            ctx.save_for_backward(rows, scale, hidden, up, down, up_bias, down_bias, unit, place)
            ctx.plan, ctx.activation, ctx.gated = plan, activation, gated
        return plan.add_up(out.flatten(0, 1).index_select(0, place))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and the four parameters."""
        rows, scale, hidden, up, down, up_bias, down_bias, unit, place = ctx.saved_tensors
        grad = grad_out.index_select(0, unit).view(*rows.shape[:2], -1)
        inner = activate(hidden, ctx.activation, ctx.gated)
        grad_inner = torch.bmm(grad, down)
        grad_scale = torch.linalg.vecdot(grad_inner, inner)
        grad_down = torch.bmm(grad.transpose(1, 2), inner * scale)
        grad_down_bias = None
        if down_bias is not None:
            grad_scale = grad_scale + torch.linalg.vecdot(grad, down_bias[:, None])
            grad_down_bias = (grad * scale).sum(1)
        grad_hidden = activate_backward(grad_inner.mul_(scale), hidden, ctx.activation, ctx.gated)
        grad_up = torch.bmm(grad_hidden.transpose(1, 2), rows)
        grad_up_bias = None if up_bias is None else grad_hidden.sum(1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.plan.add_up(torch.bmm(grad_hidden, up).flatten(0, 1).index_select(0, place))
        grad_weight = grad_scale.flatten().index_select(0, place)
        return grad_x, grad_weight, grad_up, grad_down, grad_up_bias, grad_down_bias, None, None, None, None


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write `rows @ weight + bias` to `out`."""
    if bias is None:
        torch.mm(rows, weight, out=out)
    else:
        torch.addmm(bias, rows, weight, out=out)


def empty_gradient(parameter: Tensor, sizes: list[int]) -> Tensor:
    """Memory for a stacked gradient, zero for experts that had no slot."""
    gradient = torch.empty_like(parameter)
    for expert, size in enumerate(sizes):
        if not size:
            gradient[expert].zero_()
    return gradient
