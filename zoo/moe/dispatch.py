"""Dispatch: bring each unit to its experts and the outputs back to slots. No parameters, no decisions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.moe.experts import Experts
from zoo.moe.sorted_mm import Plan


class LocalDispatcher:
    """All experts live in this process: sort the filled slots by expert, gather, compute, scatter."""

    def slots(self, experts: Experts, streams: Sequence[Tensor], index: Tensor) -> Tensor:
        """Compute every filled slot.

        Args:
            experts: E experts.
            streams: Tensors `(T, *unit)`.
            index: `(T, K)` in `0..E`; E is an empty slot.

        Returns:
            `(T, K, *out)`, zero in empty slots.
        """
        slot, sizes = sort_slots(index, experts.num_experts)
        rows = experts(streams, sizes, slot // index.shape[1])
        out = rows.new_zeros(index.numel(), *rows.shape[1:])
        slots: Tensor = out.index_copy(0, slot, rows).unflatten(0, index.shape)
        return slots

    def weighted_sum(self, experts: Experts, streams: Sequence[Tensor], index: Tensor, weight: Tensor) -> Tensor:
        """Compute every filled slot and add the slots of a unit up, without the `(T, K, *out)` in between.

        Args:
            experts: E experts.
            streams: Tensors `(T, *unit)`.
            index: `(T, K)` in `0..E`.
            weight: `(T, K)`.

        Returns:
            `(T, *out)`.
        """
        slot, sizes = sort_slots(index, experts.num_experts)
        unit = slot // index.shape[1]
        fused = experts.fused_sum(streams, weight, Plan(unit, slot, sizes, (index.shape[0], index.shape[1])))
        if fused is not None:
            return fused
        rows = experts(streams, sizes, unit)
        scale = weight.flatten()[slot].to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))
        out: Tensor = rows.new_zeros(index.shape[0], *rows.shape[1:]).index_add(0, unit, rows * scale)
        return out


def sort_slots(index: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """The filled slots in the order of their experts, and how many each expert has.

    Args:
        index: `(T, K)` in `0..E`.
        num_experts: E.

    Returns:
        `(N,)` positions in the flattened `index`, and E sizes that sum to N.
    """
    flat = index.reshape(-1)
    sizes: list[int] = torch.bincount(flat, minlength=num_experts + 1)[:num_experts].tolist()
    return stable_order(flat, num_experts)[: sum(sizes)], sizes


def stable_order(index: Tensor, num_experts: int) -> Tensor:
    """The positions `(N,)` that sort integers `(N,)` in `0..num_experts`, equal ones in their order."""
    if index.device.type != "cpu" or num_experts >= 2**15:
        return index.argsort(stable=True)
    # Small integers are what numpy sorts by radix, ten times as fast.
    return torch.from_numpy(index.to(torch.int16).numpy().argsort(kind="stable"))


def gather_slots(all_outputs: Tensor, index: Tensor) -> Tensor:
    """Pick the slots from outputs of all experts.

    Args:
        all_outputs: `(T, E, *out)`.
        index: `(T, K)` in `0..E`.

    Returns:
        `(T, K, *out)`, zero in empty slots.
    """
    num_experts = all_outputs.shape[1]
    tail = [1] * (all_outputs.ndim - 2)
    picked = index.clamp(max=num_experts - 1).view(*index.shape, *tail)
    slots = all_outputs.gather(1, picked.expand(*index.shape, *all_outputs.shape[2:]))
    return slots.masked_fill((index == num_experts).view(*index.shape, *tail), 0.0)
