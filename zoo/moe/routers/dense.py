"""Every unit visits every expert."""

from typing import Literal

import torch

from zoo.moe.routers.base import Router, forbid, linear_fp32, linear_weight, require
from zoo.moe.routing import RouterInput, RoutingOutput

SCORES = ("softmax", "sigmoid", "none")


class DenseRouter(Router):
    """All experts in order of their ids (K = E), weighted by a softmax, a sigmoid, or not at all.

    With `score="none"` the router has no parameters and every weight is 1: DMoERM's inner layer, under `concat`.
    """

    def __init__(
        self, num_experts: int, input_dim: int | None = None, score: Literal["softmax", "sigmoid", "none"] = "none"
    ) -> None:
        """Build the router.

        Args:
            num_experts: E.
            input_dim: D of the router input; needed unless `score="none"`.
            score: How logits become weights.

        Raises:
            ValueError: An argument is missing or not allowed.
        """
        super().__init__(num_experts, top_k=num_experts)
        require(score in SCORES, "score", score, f"must be one of {', '.join(SCORES)}")
        require(score == "none" or input_dim is not None, "input_dim", input_dim, f"is needed for score={score!r}")
        self.score = score
        self.weight = None if input_dim is None or score == "none" else linear_weight(num_experts, input_dim)

    def route(self, units: RouterInput) -> RoutingOutput:
        """Send T units to all experts. Without scores only the length of `x` is read."""
        if self.weight is None:
            logits = torch.zeros(units.x.shape[0], self.num_experts, device=units.x.device)
        else:
            logits = linear_fp32(units.x, self.weight)
        logits = forbid(logits, units.expert_mask)
        probs = torch.softmax(logits, dim=1)
        weight = {"softmax": probs, "sigmoid": torch.sigmoid(logits), "none": torch.ones_like(probs)}[self.score]
        return self.output_all(units, logits > float("-inf"), weight, logits=logits, probs=probs)
