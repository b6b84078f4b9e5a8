"""Soft MoE: experts read blends of all units of a sample instead of units."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.moe.experts import GroupedExperts, runs_dense
from zoo.moe.routed import RoutedModule
from zoo.moe.routers.base import linear_fp32, require
from zoo.moe.routing import RoutingOutput


class SoftMoELayer(RoutedModule):
    """Soft MoE (Puigcerver et al. 2023, arXiv 2308.00951, algorithm 1), beside `MoELayer` with the same experts.

    Each expert has P slots. A slot is a blend of a sample's units (softmax over units), a unit's output a blend of the
    slots' outputs (softmax over slots). Every unit sees all others, so it is not for causal models. The
    `RoutingOutput` has no slots; its probabilities are a unit's combine weights, summed over the slots of an expert.
    """

    def __init__(
        self, experts: GroupedExperts, slots_per_expert: int, aux_losses: Mapping[str, float] | None = None
    ) -> None:
        """Build the layer.

        Args:
            experts: E experts.
            slots_per_expert: P; the paper uses one slot per unit over all experts.
            aux_losses: Coefficients of auxiliary losses, see `RoutedModule`.

        Raises:
            ValueError: P is below 1.
        """
        super().__init__(aux_losses)
        require(slots_per_expert >= 1, "slots_per_expert", slots_per_expert, "must be at least 1")
        self.router = None
        self.experts = experts
        self.slots_per_expert = slots_per_expert
        slots = experts.num_experts * slots_per_expert
        self.slot_embedding = nn.Parameter(torch.randn(slots, experts.dim) / math.sqrt(experts.dim))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *, mask: Tensor | None = None, return_routing: bool = False) -> Any:
        """Apply the mixture.

        Args:
            x: `(B, N, D)`, samples of N units.
            mask: `(B, N)` bool, true for real units; padding is read by no slot and gives zero.
            return_routing: Whether to return the `RoutingOutput` too.

        Returns:
            `(B, N, out)`, and the `RoutingOutput` if asked for.

        Raises:
            ValueError: Shapes do not fit.
        """
        if x.ndim != 3 or (mask is not None and mask.shape != x.shape[:2]):
            shapes = tuple(x.shape), None if mask is None else tuple(mask.shape)
            raise ValueError(f"x and mask have shapes {shapes[0]} and {shapes[1]}; expected (B, N, D) and (B, N).")
        logits = self.logits(x)
        combine = torch.softmax(logits, dim=2)
        if mask is None:
            dispatch = torch.softmax(logits, dim=1)
        else:
            # A sample of padding only has no unit to blend: its slots are zero.
            scores = logits.masked_fill(~mask[..., None], float("-inf")).masked_fill(~mask.any(1)[:, None, None], 0.0)
            dispatch = torch.softmax(scores, dim=1).masked_fill(~mask[..., None], 0.0)
            combine = combine.masked_fill(~mask[..., None], 0.0)
        routing = self.describe(logits, mask)
        self.record(routing)
        slots = torch.einsum("bns,bnd->sbd", dispatch.to(x.dtype), x)
        rows = self.run(slots).unflatten(0, slots.shape[:2])
        out = torch.einsum("bns,sbd->bnd", combine.to(x.dtype), rows)
        return (out, routing) if return_routing else out

    def run(self, slots: Tensor) -> Tensor:
        """The experts on their slots, `(E * P, B, D)` to `(E * P * B, out)`."""
        experts, size, rows = self.experts.num_experts, self.slots_per_expert * slots.shape[1], slots.flatten(0, 1)
        if runs_dense(self.experts):
            return self.experts.forward_equal(rows.unflatten(0, (experts, size))).flatten(0, 1)
        out: Tensor = self.experts([rows], [size] * experts)
        return out

    def logits(self, x: Tensor) -> Tensor:
        """Scaled cosines of units and slots in float32, `(B, N, E * P)`, the slots of an expert side by side."""
        units = nn.functional.normalize(x.float(), dim=-1)
        return linear_fp32(units, self.scale * nn.functional.normalize(self.slot_embedding.float(), dim=-1))

    def describe(self, logits: Tensor, mask: Tensor | None) -> RoutingOutput:
        """The `RoutingOutput` without slots, from `(B, N, E * P)`."""
        batch, units, _ = logits.shape
        per_expert = logits.flatten(0, 1).unflatten(1, (-1, self.slots_per_expert)).logsumexp(2)
        return RoutingOutput(
            expert_index=torch.empty(batch * units, 0, dtype=torch.int64, device=logits.device),
            expert_weight=per_expert.new_empty(batch * units, 0),
            selected_index=torch.empty(batch * units, 0, dtype=torch.int64, device=logits.device),
            router_logits=per_expert,
            router_probs=torch.softmax(per_expert, dim=1),
            num_experts=self.experts.num_experts,
            mask=None if mask is None else mask.flatten(),
            sample_index=torch.arange(batch, device=logits.device).repeat_interleave(units),
        )
