"""Routers that are balanced by construction: experts choose units, or an assignment does."""

import torch

from zoo.moe.routers.base import LinearRouter, require
from zoo.moe.routers.competition import balanced_assignment, capacities, rank_within, sample_rows
from zoo.moe.routing import RouterInput, RoutingOutput


class ExpertChoiceRouter(LinearRouter):
    """Expert choice (Zhou et al. 2022, arXiv 2202.09368): every expert takes its best units of each sample.

    An expert takes `ceil(units * capacity_factor / E)`, so the load is perfect and a unit has 0 to E experts. Which
    ones depends on the units after it, so a layer of a causal model refuses this router unless `allow_causal` is set.
    """

    def __init__(
        self, input_dim: int, num_experts: int, capacity_factor: float = 2.0, allow_causal: bool = False
    ) -> None:
        """Build the router.

        Args:
            input_dim: D of the router input.
            num_experts: E.
            capacity_factor: Mean number of experts per unit.
            allow_causal: Let causal models use it although units then see the future.

        Raises:
            ValueError: An argument is not allowed; the message names it.
        """
        super().__init__(input_dim, num_experts, top_k=num_experts)
        require(
            0 < capacity_factor <= num_experts,
            "capacity_factor",
            capacity_factor,
            f"must be in (0, num_experts={num_experts}]",
        )
        self.capacity_factor = capacity_factor
        self.noncausal = not allow_causal

    @property
    def compares_units(self) -> bool:
        """The units of a sample compete in every mode."""
        return True

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by `x` `(T, D)`."""
        logits = self.logits(units)
        probs = torch.softmax(logits, dim=1)
        sample, sizes = units.samples()
        capacity = capacities(sizes, self.capacity_factor / self.num_experts)[sample]
        # Padding and forbidden pairs come last.
        score = probs.detach() if units.mask is None else probs.detach().masked_fill(~units.mask[:, None], -1.0)
        group = sample[:, None] * self.num_experts + torch.arange(self.num_experts, device=sample.device)
        rank = rank_within(group.flatten(), -score.flatten()).view_as(score)
        return self.output_all(units, (rank < capacity[:, None]) & (score > 0), probs, logits=logits, probs=probs)


class BaseRouter(LinearRouter):
    """BASE layers (Lewis et al. 2021, arXiv 2103.16716): in training the units of a sample are spread evenly.

    One expert per unit with the largest total score, weighted by the sigmoid of its score; each unit's own best expert
    in eval mode. The paper assigns over the whole batch: pass `sample_index=0` for all units to have that.
    """

    def __init__(self, input_dim: int, num_experts: int, tolerance: float = 0.01) -> None:
        """Build the router.

        Args:
            input_dim: D of the router input.
            num_experts: E.
            tolerance: How far from the best assignment a unit may end, as a share of the range of scores.

        Raises:
            ValueError: An argument is not allowed; the message names it.
        """
        super().__init__(input_dim, num_experts, top_k=1)
        require(tolerance > 0, "tolerance", tolerance, "must be positive")
        self.tolerance = tolerance

    @property
    def compares_units(self) -> bool:
        """In training all units of a sample are assigned together."""
        return self.training

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by `x` `(T, D)`."""
        logits = self.logits(units)
        index = logits.argmax(1)
        if self.training:
            for row in sample_rows(units):
                unit = row[row < logits.shape[0]]
                index[unit] = balanced_assignment(logits[unit], self.tolerance)
        score = logits.gather(1, index[:, None])
        index = index[:, None].masked_fill(score == float("-inf"), self.num_experts)
        return self.output(units, index, torch.sigmoid(score), logits=logits, probs=torch.softmax(logits, dim=1))
