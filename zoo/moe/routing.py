"""The seam between deciding and doing: `RoutingOutput`.

Letters used everywhere in `zoo.moe`: T routed units (tokens, images, stock-days, prompts), D model width, H expert
width, E experts, K slots per unit, E' router columns (E' > E where there are null experts).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class RoutingOutput:
    """What a router decided for T units.

    Dispatch reads `expert_index` and `expert_weight` only; losses, health and tools read the rest.

    Attributes:
        expert_index: `(T, K)` int64 in `0..E`. E is the empty slot: dropped, null, padding or not reached by top-p.
        expert_weight: `(T, K)` float; 0 in empty slots.
        selected_index: `(T, K)` int64 in `0..E'`, the columns chosen before anything was dropped; E' is no choice.
        router_logits: `(T, E')` float32, without noise.
        router_probs: `(T, E')` float32, each row sums to 1.
        num_experts: E.
        mask: `(T,)` bool, true for real units, or None where every unit is real.
        sample_index: `(T,)` int64, the sample each unit belongs to. What competes, competes within one sample.
        noise_std: `(T, E')` standard deviation of the routing noise, or None.
        noisy_logits: `(T, E')` the logits that the choice was made on where noise was added, or None.
        state: What a recurrent router hands to the next layer, or None.
    """

    expert_index: Tensor
    expert_weight: Tensor
    selected_index: Tensor
    router_logits: Tensor
    router_probs: Tensor
    num_experts: int
    mask: Tensor | None = None
    sample_index: Tensor | None = None
    noise_std: Tensor | None = None
    noisy_logits: Tensor | None = None
    state: Tensor | None = None

    @property
    def num_columns(self) -> int:
        """E', the number of router columns."""
        return self.router_logits.shape[-1]

    def num_units(self) -> Tensor:
        """Number of real units, a scalar tensor."""
        if self.mask is None:
            return torch.tensor(self.router_logits.shape[0], device=self.router_logits.device)
        return self.mask.sum()

    def column_counts(self) -> Tensor:
        """How often each router column was selected before dropping, `(E',)` float32 without gradient."""
        return count_index(self.selected_index, self.num_columns)

    def expert_counts(self) -> Tensor:
        """How many slots each expert really computes, `(E,)` float32 without gradient."""
        return count_index(self.expert_index, self.num_experts)

    def dense_weight(self) -> Tensor:
        """The weights laid out per expert, `(T, E)`; differentiable."""
        rows = self.expert_weight.shape[0]
        dense = self.expert_weight.new_zeros(rows, self.num_experts + 1)
        return dense.scatter_add(1, self.expert_index, self.expert_weight)[:, : self.num_experts]


def count_index(index: Tensor, size: int) -> Tensor:
    """Count the values of an index tensor; values equal to `size` (the sentinel) are left out.

    Args:
        index: Integers in `0..size`, any shape.
        size: Number of bins.

    Returns:
        `(size,)` float32 counts.
    """
    flat = index.reshape(-1)
    counts = torch.zeros(size + 1, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=counts.dtype))[:size]
