"""The seam between deciding and doing: `RouterInput` goes into a router, `RoutingOutput` comes out.

Letters used everywhere in `zoo.moe`: T routed units (tokens, images, stock-days, prompts), D model width, H expert
width, E experts, K slots per unit, E' router columns (E' > E where there are null experts), S samples.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PER_UNIT = (
    "expert_index",
    "expert_weight",
    "selected_index",
    "router_logits",
    "router_probs",
    "mask",
    "sample_index",
    "noise_std",
    "noisy_logits",
    "distilled_logits",
    "identity_weight",
    "state",
)


@dataclass(slots=True)
class RouterInput:
    """T units and all that is known about them.

    Attributes:
        x: `(T, D)` what the router reads.
        mask: `(T,)` bool, true for real units; padding is neither routed nor counted.
        sample_index: `(T,)` int64, the sample of each unit.
        token_ids: `(T,)` int64, for routers that look them up.
        state: `(T, ...)` what the previous layer's router handed on.
        expert_output: `(T, E, *out)` where the layer runs its experts first.
        expert_mask: `(E,)` or `(T, E)` bool; experts that are false cannot be chosen. A unit without any is padding.
    """

    x: Tensor
    mask: Tensor | None = None
    sample_index: Tensor | None = None
    token_ids: Tensor | None = None
    state: Tensor | None = None
    expert_output: Tensor | None = None
    expert_mask: Tensor | None = None

    def samples(self) -> tuple[Tensor, Tensor]:
        """The sample of each unit, numbered from 0, `(T,)`, and the real units of each sample, `(S,)`.

        Raises:
            ValueError: The samples were not given.
        """
        if self.sample_index is None:
            raise ValueError("sample_index=None: this router compares the units of a sample, so it must be given.")
        ids, sample = self.sample_index.unique(return_inverse=True)
        real = torch.ones_like(sample) if self.mask is None else self.mask.long()
        return sample, torch.zeros_like(ids).index_add_(0, sample, real)

    def known_token_ids(self) -> Tensor:
        """`token_ids`, for a router that cannot do without.

        Raises:
            ValueError: They were not given.
        """
        if self.token_ids is None:
            raise ValueError("token_ids=None: this router looks tokens up by their ids, so they must be given.")
        return self.token_ids


@dataclass(slots=True)
class RoutingOutput:
    """What a router decided for T units.

    Dispatch reads `expert_index` and `expert_weight` only; losses, health and tools read the rest. A soft mixture
    (every expert sees a blend of all units) has no slots: K = 0, and its probabilities stand for its counts.

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
        distilled_logits: `(T, E')` logits of a student that learns the choice, or None.
        identity_weight: `(T,)` weight of the unit itself in the output (identity null experts), or None.
        state: `(T, ...)` what the router hands to the next layer, or None.
        num_groups: The columns form this many equal contiguous groups (devices, modalities).
        window_counts: `(E',)` column counts of the global batch so far, which balance losses use instead of this
            micro-batch's own, or None.
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
    distilled_logits: Tensor | None = None
    identity_weight: Tensor | None = None
    state: Tensor | None = None
    num_groups: int = 1
    window_counts: Tensor | None = None

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
        return count_index(self.selected_index, self.num_columns) if self.has_slots else self.mass()

    def expert_counts(self) -> Tensor:
        """How many slots each expert really computes, `(E,)` float32 without gradient."""
        return count_index(self.expert_index, self.num_experts) if self.has_slots else self.mass()

    @property
    def has_slots(self) -> bool:
        """Whether units choose experts; false for a soft mixture."""
        return self.expert_index.shape[1] > 0

    def mass(self) -> Tensor:
        """Probability of each column summed over real units, `(E',)` without gradient."""
        probs = self.router_probs.detach()
        return (probs if self.mask is None else probs[self.mask]).sum(0)

    def dense_weight(self) -> Tensor:
        """The weights laid out per expert, `(T, E)`; differentiable."""
        if not self.has_slots:
            return self.router_probs if self.mask is None else self.router_probs * self.mask[:, None]
        rows = self.expert_weight.shape[0]
        dense = self.expert_weight.new_zeros(rows, self.num_experts + 1)
        return dense.scatter_add(1, self.expert_index, self.expert_weight)[:, : self.num_experts]

    def take(self, unit: Tensor) -> "RoutingOutput":
        """The decisions made for the units `(N,)`, as the routing of N units; one may be taken many times."""
        values = {name: getattr(self, name) for name in PER_UNIT}
        taken: dict[str, Any] = {name: value if value is None else value[unit] for name, value in values.items()}
        return replace(self, **taken)


def membership(index: Tensor, size: int) -> Tensor:
    """Which units are where, `(T, size)` float32 of 0 and 1.

    Args:
        index: `(T, K)` in `0..size`; values equal to `size` (the sentinel) are left out.
        size: Number of columns.
    """
    return torch.zeros(index.shape[0], size + 1, device=index.device).scatter_(1, index, 1.0)[:, :size]


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
