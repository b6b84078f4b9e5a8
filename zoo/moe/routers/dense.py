"""Every unit visits every expert."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.moe.routers.base import Router, forbid, linear_fp32, require
from zoo.moe.routing import RoutingOutput

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
        self.weight = nn.Parameter(torch.empty(num_experts, input_dim)) if input_dim and score != "none" else None
        if self.weight is not None:
            nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[1]))

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        sample_index: Tensor | None = None,
        token_ids: Tensor | None = None,
        state: Tensor | None = None,
        expert_output: Tensor | None = None,
        expert_mask: Tensor | None = None,
    ) -> RoutingOutput:
        """Send T units to all experts; see `Router.forward`. Without scores only the length of `x` is read."""
        if self.weight is None:
            logits = torch.zeros(x.shape[0], self.num_experts, device=x.device)
        else:
            logits = linear_fp32(x, self.weight)
        logits = forbid(logits, expert_mask)
        probs = torch.softmax(logits, dim=1)
        weight = {"softmax": probs, "sigmoid": torch.sigmoid(logits), "none": torch.ones_like(probs)}[self.score]
        index = torch.arange(self.num_experts, device=x.device).expand_as(logits)
        index = index.masked_fill(logits == float("-inf"), self.num_experts)
        return self.output(index, weight, logits=logits, probs=probs, mask=mask, sample_index=sample_index)
