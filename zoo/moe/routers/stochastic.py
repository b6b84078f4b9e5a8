"""Experts drawn at random: no router to learn."""

from typing import Literal

import torch

from zoo.moe.routers.base import Router, forbid, require
from zoo.moe.routing import RouterInput, RoutingOutput

INFERENCE = ("all", "unit", "sample")


class StochasticRouter(Router):
    """THOR (Zuo et al. 2021, arXiv 2110.04260): in training every forward draws one expert for the whole batch.

    Train it with `zoo.moe.consistency_step`, which makes two draws agree. In eval mode `all` averages all experts, the
    only choice without luck; `unit` and `sample` draw one for each unit or each sample, as the paper does.
    """

    def __init__(self, num_experts: int, inference: Literal["all", "unit", "sample"] = "all") -> None:
        """Build the router; it has no parameters.

        Args:
            num_experts: E.
            inference: What eval mode does.

        Raises:
            ValueError: An argument is not allowed; the message names it.
        """
        super().__init__(num_experts, top_k=1 if inference != "all" else num_experts)
        require(inference in INFERENCE, "inference", inference, f"must be one of {', '.join(INFERENCE)}")
        self.inference = inference

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units; only the length of `x` is read."""
        size, device = units.x.shape[0], units.x.device
        logits = forbid(torch.zeros(size, self.num_experts, device=device), units.expert_mask)
        probs = torch.softmax(logits, dim=1)
        if not self.training and self.inference == "all":
            return self.output_all(units, probs > 0, probs, logits=logits, probs=probs)
        if self.training:
            luck = torch.rand(1, self.num_experts, device=device).expand(size, -1)
        elif self.inference == "unit":
            luck = torch.rand(size, self.num_experts, device=device)
        else:
            sample, sizes = units.samples()
            luck = torch.rand(sizes.shape[0], self.num_experts, device=device)[sample]
        best, index = forbid(luck, units.expert_mask).max(dim=1, keepdim=True)
        index = index.masked_fill(best == float("-inf"), self.num_experts)
        return self.output(units, index, torch.ones_like(best), logits=logits, probs=probs)
