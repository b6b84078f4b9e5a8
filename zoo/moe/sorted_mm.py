"""The backend `sorted_mm`: gather, compute, weigh and add up in one autograd function with a backward of its own.

Plain autograd keeps every slot's output for the gradient of its weight and writes each intermediate result to fresh
memory. Here that gradient comes from the hidden units, so that no slot output outlives the forward; products are
written in place, those of the parameters' gradients into memory of the step before; and an expert's rows stay in the
cache from the first product to the last.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.moe.activations import activate, activate_backward

# Two experts share a batched product if the smaller one has at least this share of the larger one's rows.
MIN_SHARE = 0.75
# So many rows cost less than reading the weights: padding is free.
TINY_ROWS = 16

memory_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Experts of nearly the same load, run by one batched product on rows padded to the longest.

    Attributes:
        experts: A slice of the stacked parameters.
        sizes: Rows of each expert.
        rows: Where they lie among all padded rows.
    """

    experts: slice
    sizes: list[int]
    rows: slice

    def split(self, values: Tensor) -> Tensor:
        """Rows `(n * longest, D)` as `(n, longest, D)`."""
        return values.view(len(self.sizes), -1, values.shape[-1])


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

    def chunks(self) -> list[Chunk]:
        """The experts that have slots, in pairs where their loads are alike; all together where their rows are few.

        Two experts side by side keep two cores busier than one after the other, and any two lie at a stride in the
        stacked parameters, so that nothing is copied.
        """
        sizes, longest = self.sizes, max(self.sizes, default=0)
        if 0 < longest <= TINY_ROWS and 4 * sizes.count(0) <= len(sizes):
            return [Chunk(slice(0, len(sizes), 1), sizes, slice(0, len(sizes) * longest))]
        by_size = sorted((expert for expert, size in enumerate(sizes) if size), key=sizes.__getitem__)
        found, start = [], 0
        while by_size:
            pair = [by_size.pop()]
            longest = sizes[pair[0]]
            if by_size and sizes[by_size[-1]] >= min(MIN_SHARE * longest, longest - TINY_ROWS):
                pair = sorted([*pair, by_size.pop()])
            end = start + len(pair) * longest
            experts = slice(pair[0], pair[-1] + 1, max(pair[-1] - pair[0], 1))
            found.append(Chunk(experts, [sizes[expert] for expert in pair], slice(start, end)))
            start = end
        return found

    def places(self, chunks: Sequence[Chunk]) -> Tensor:
        """Where each sorted slot lies, `(N,)`, among the padded rows of all chunks."""
        shifts = [-start for start in accumulate(self.sizes[:-1], initial=0)]
        for chunk in chunks:
            experts = range(len(shifts))[chunk.experts]
            for expert, start in zip(experts, range(chunk.rows.start, chunk.rows.stop, max(chunk.sizes)), strict=True):
                shifts[expert] += start
        shift, sizes = torch.tensor([shifts, self.sizes], device=self.unit.device).unbind()
        return torch.arange(len(self.unit), device=sizes.device) + shift.repeat_interleave(sizes)

    def add_up(self, rows: Tensor, place: Tensor, weight: Tensor | None = None) -> Tensor:
        """Add rows, times their weights `(N,)`, up to units `(T, D)`.

        Args:
            rows: `(P, D)`.
            place: `(N,)` where among them each sorted slot lies.
            weight: Of the sorted slots; 1 if left out.
        """
        units, slots = self.shape
        if len(place) < units * slots or not units:
            filled = rows.index_select(0, place)
            filled = filled if weight is None else filled * weight[:, None]
            return rows.new_zeros(units, rows.shape[1]).index_add_(0, self.unit, filled)
        # Every slot is filled: reading the rows in the order of the units is faster than adding by index.
        inverse = torch.empty_like(place).scatter_(0, self.slot, place).view(units, slots)
        ordered = None if weight is None else torch.empty_like(weight).scatter_(0, self.slot, weight).view(units, slots)
        return nn.functional.embedding_bag(inverse, rows, mode="sum", per_sample_weights=ordered)


class Recycled:
    """CPU memory for one large tensor at a time, used again once nobody holds the last tensor that lay in it.

    The system clears every page of fresh memory when it is first touched, which takes longer than the product that
    fills a gradient of a hundred megabytes. Other devices have allocators that recycle by themselves.
    """

    def __init__(self) -> None:
        """Start without memory."""
        self.storage: torch.UntypedStorage | None = None

    def empty_like(self, like: Tensor) -> Tensor:
        """An uninitialised tensor of the shape and dtype of `like`."""
        if like.device.type != "cpu" or not like.is_contiguous():
            return torch.empty_like(like)
        with memory_lock:
            if self.storage is None or self.storage.nbytes() != like.nbytes or is_held(self.storage):
                self.storage = torch.UntypedStorage(like.nbytes)
            return like.new_empty(0).set_(self.storage, 0, like.shape, like.stride())

    def __reduce__(self) -> tuple[type["Recycled"], tuple[()]]:
        """Copies and pickles start without memory."""
        return type(self), ()


def is_held(storage: torch.UntypedStorage) -> bool:
    """Whether any tensor, here or in another process, lies in memory that the caller holds too."""
    return storage.is_shared() or torch._C._storage_Use_Count(storage._cdata) > 1


class SortedFeedForward(torch.autograd.Function):
    """Weighted sum over experts of `down(act(gate) * up)`, or of `down(act(up))`.

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
        memory: tuple[Recycled, Recycled],
    ) -> Tensor:
        """Compute `(T, out)`.

        Args:
            ctx: autograd's context.
            x: `(T, D)`.
            weight: `(T, K)`.
            up: `(E, W, D)`, W = 2H where gated.
            down: `(E, out, H)`.
            up_bias: `(E, W)` or None.
            down_bias: `(E, out)` or None.
            plan: Of the slots.
            activation: Name of the nonlinearity.
            gated: Whether the first half of W gates the second.
            keep: Whether a backward will follow.
            memory: For the gradients of up and down.
        """
        chunks = plan.chunks()
        place = plan.places(chunks)
        total = chunks[-1].rows.stop if chunks else 0
        # Padding repeats a unit that is routed: what is not may hold anything, NaN included.
        unit = plan.unit[:1].repeat(total).scatter_(0, place, plan.unit)
        weight = weight.flatten().index_select(0, plan.slot)
        # Without a backward one chunk's rows and hidden units are written over the last one's.
        parts = [chunk.rows if keep else slice(0, chunk.rows.stop - chunk.rows.start) for chunk in chunks]
        kept = max((part.stop for part in parts), default=0)
        rows = x.new_empty(kept, x.shape[1])
        hidden = x.new_empty(kept, up.shape[1])
        out = x.new_empty(total, down.shape[1])
        for chunk, part in zip(chunks, parts, strict=True):
            torch.index_select(x, 0, unit[chunk.rows], out=rows[part])
            before, after = chunk.split(hidden[part]), chunk.split(out[chunk.rows])
            multiply(chunk.split(rows[part]), up, up_bias, chunk.experts, before)
            multiply(activate(before, activation, gated), down, down_bias, chunk.experts, after)
        if keep:
            ctx.save_for_backward(rows, weight, hidden, up, down, up_bias, down_bias, unit, place)
            ctx.plan, ctx.activation, ctx.gated, ctx.memory = plan, activation, gated, memory
        return plan.add_up(out, place, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and the four parameters."""
        rows, weight, hidden, up, down, up_bias, down_bias, unit, place = ctx.saved_tensors
        scales = weight.new_zeros(len(rows), 1).index_copy_(0, place, weight[:, None])
        grad_scales = torch.empty_like(scales)
        grad_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        grad_up, grad_down = (memory.empty_like(of) for memory, of in zip(ctx.memory, (up, down), strict=True))
        grad_up_bias, grad_down_bias = (
            None if bias is None else torch.empty_like(bias) for bias in (up_bias, down_bias)
        )
        clear_idle((grad_up, grad_down, grad_up_bias, grad_down_bias), ctx.plan.sizes)
        for chunk in ctx.plan.chunks():
            experts, part = chunk.experts, chunk.rows
            grad = chunk.split(grad_out.index_select(0, unit[part]))
            before, scale, grad_scale = (chunk.split(values[part]) for values in (hidden, scales, grad_scales))
            grad_inner = torch.bmm(grad, down[experts])
            inner, grad_before = activate_backward(grad_inner * scale, before, ctx.activation, ctx.gated)
            torch.linalg.vecdot(grad_inner, inner, out=grad_scale[..., 0])
            multiply_each(chunk, grad, inner * scale, grad_down)
            if grad_down_bias is not None:
                grad_scale += torch.linalg.vecdot(grad, down_bias[experts][:, None])[..., None]
                grad_down_bias[experts] = (grad * scale).sum(1)
            multiply_each(chunk, grad_before, chunk.split(rows[part]), grad_up)
            if grad_up_bias is not None:
                grad_up_bias[experts] = grad_before.sum(1)
            if grad_rows is not None:
                torch.bmm(grad_before, up[experts], out=chunk.split(grad_rows[part]))
        grad_x = None if grad_rows is None else ctx.plan.add_up(grad_rows, place)
        grad_weight = weight.new_zeros(ctx.plan.shape)
        grad_weight.view(-1).index_copy_(0, ctx.plan.slot, grad_scales.flatten().index_select(0, place))
        return grad_x, grad_weight, grad_up, grad_down, grad_up_bias, grad_down_bias, None, None, None, None, None


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, experts: slice, out: Tensor) -> None:
    """Write the linear maps of some experts, of rows `(n, longest, D)`, to `out`."""
    torch.bmm(rows, weight[experts].transpose(1, 2), out=out)
    if bias is not None:
        out += bias[experts][:, None]


def multiply_each(chunk: Chunk, left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write `left.t() @ right` of each expert to its place in `out` `(E, ..)`; one has zeros in its padding rows."""
    if len(chunk.sizes) > 2:
        torch.bmm(left.transpose(1, 2), right, out=out[chunk.experts])
        return
    for a, b, size, product in zip(left, right, chunk.sizes, out[chunk.experts], strict=True):
        torch.mm(a[:size].t(), b[:size], out=product)


def clear_idle(gradients: Sequence[Tensor | None], sizes: list[int]) -> None:
    """Zero the stacked gradients of experts that had no slot."""
    for expert, size in enumerate(sizes):
        for gradient in gradients:
            if gradient is not None and not size:
                gradient[expert].zero_()
