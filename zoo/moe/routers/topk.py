"""Top-k routing: every unit chooses its K best experts."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.moe.routers.base import Router, forbid, linear_fp32, require
from zoo.moe.routing import RoutingOutput

ORDERS = ("softmax_then_topk", "topk_then_softmax")
SCORES = ("softmax", "sigmoid")


class TopKRouter(Router):
    """Linear scores, the K best experts per unit.

    Covers Switch (`top_k=1, normalize=False`), Mixtral and Qwen (softmax, normalised), gpt-oss (`topk_then_softmax`),
    DeepSeek-V3 (sigmoid, selection bias, group-limited) and modality-tied mixtures (`min_per_group`).
    """

    expert_bias: Tensor
    window_counts: Tensor

    def __init__(
        self,
        input_dim: int,
        num_experts: int,
        top_k: int,
        *,
        score: Literal["softmax", "sigmoid"] = "softmax",
        order: Literal["softmax_then_topk", "topk_then_softmax"] = "softmax_then_topk",
        normalize: bool = True,
        scale: float = 1.0,
        jitter: float = 0.0,
        num_groups: int = 1,
        top_groups: int | None = None,
        group_score_k: int = 2,
        min_per_group: int = 0,
        selection_bias: bool = False,
    ) -> None:
        """Build the router.

        Args:
            input_dim: D of the router input.
            num_experts: E.
            top_k: K.
            score: How logits become scores.
            order: `softmax_then_topk` scores all experts, then keeps K; `topk_then_softmax` keeps the K best logits
                and normalises over these alone. With `normalize=True` both give the same weights.
            normalize: Whether the K kept weights are made to sum to 1 (before `scale`). Keep it off for `top_k=1`:
                a normalised single weight is constant and gives the router no gradient.
            scale: Factor on the weights (SMoRA's "gates sum to k" is `normalize=True, scale=k`).
            jitter: In training the input is multiplied by U(1 - jitter, 1 + jitter).
            num_groups: Experts form this many equal contiguous groups.
            top_groups: Only experts of the best this-many groups can be chosen; None allows all groups.
            group_score_k: A group's score is the sum of its this-many best experts.
            min_per_group: Every group is given at least this many of the K slots.
            selection_bias: Keep a float32 buffer that is added for the choice but not to the weights and is moved by
                `update_bias` (auxiliary-loss-free balancing, DeepSeek-V3).

        Raises:
            ValueError: An argument is outside its range or does not fit another; the message names both.
        """
        super().__init__(num_experts, top_k)
        require(input_dim >= 1, "input_dim", input_dim, "must be at least 1")
        require(top_k <= num_experts, "top_k", top_k, f"must not exceed num_experts={num_experts}")
        require(score in SCORES, "score", score, f"must be one of {', '.join(SCORES)}")
        require(order in ORDERS, "order", order, f"must be one of {', '.join(ORDERS)}")
        require(
            score == "softmax" or order == "softmax_then_topk",
            "order",
            order,
            "is for softmax scores; sigmoid scores do not depend on the order",
        )
        require(0 <= jitter < 1, "jitter", jitter, "must be in [0, 1)")
        require(
            num_groups >= 1 and num_experts % num_groups == 0,
            "num_groups",
            num_groups,
            f"must divide num_experts={num_experts}",
        )
        group_size = num_experts // num_groups
        if top_groups is not None:
            require(1 <= top_groups <= num_groups, "top_groups", top_groups, f"must be in 1..num_groups={num_groups}")
            require(
                top_k <= top_groups * group_size, "top_k", top_k, f"must fit into {top_groups} groups of {group_size}"
            )
            require(min_per_group == 0, "min_per_group", min_per_group, "cannot be combined with top_groups")
        require(
            0 <= min_per_group <= group_size and min_per_group * num_groups <= top_k,
            "min_per_group",
            min_per_group,
            f"times num_groups={num_groups} must not exceed top_k={top_k} nor the group size {group_size}",
        )
        require(group_score_k >= 1, "group_score_k", group_score_k, "must be at least 1")
        self.score = score
        self.order = order
        self.normalize = normalize
        self.scale = scale
        self.jitter = jitter
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.group_score_k = min(group_score_k, group_size)
        self.min_per_group = min_per_group
        self.selection_bias = selection_bias
        self.weight = nn.Parameter(torch.empty(num_experts, input_dim))
        nn.init.normal_(self.weight, std=1 / math.sqrt(input_dim))
        self.register_buffer("expert_bias", torch.zeros(num_experts) if selection_bias else None)
        self.register_buffer("window_counts", torch.zeros(num_experts) if selection_bias else None, persistent=False)

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
        """Route T units by `x` `(T, D)`; see `Router.forward`."""
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = forbid(linear_fp32(x, self.weight), expert_mask)
        return self.choose(logits, mask=mask, sample_index=sample_index)

    def choose(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None,
        sample_index: Tensor | None,
        noisy_logits: Tensor | None = None,
        noise_std: Tensor | None = None,
    ) -> RoutingOutput:
        """Select and weight experts from logits `(T, E)`; the choice is made on `noisy_logits` where given."""
        deciding = logits if noisy_logits is None else noisy_logits
        scores = torch.sigmoid(deciding) if self.score == "sigmoid" else torch.softmax(deciding, dim=1)
        choice = deciding if self.order == "topk_then_softmax" else scores
        if self.selection_bias:
            choice = choice + self.expert_bias
        choice = self.limit_groups(choice.masked_fill(deciding == float("-inf"), float("-inf")))
        index = self.select(choice)
        if self.order == "topk_then_softmax":
            weight = torch.softmax(deciding.gather(1, index), dim=1)
        else:
            weight = scores.gather(1, index)
        empty = choice.gather(1, index) == float("-inf")
        weight = weight.masked_fill(empty, 0.0)
        if self.normalize:
            weight = weight / (weight.sum(1, keepdim=True) + 1e-20)
        probs = scores if self.score == "softmax" else scores / scores.sum(1, keepdim=True).clamp(min=1e-20)
        routing = self.output(
            index.masked_fill(empty, self.num_experts),
            weight * self.scale,
            logits=logits,
            probs=probs,
            mask=mask,
            sample_index=sample_index,
            noisy_logits=noisy_logits,
            noise_std=noise_std,
        )
        return routing

    def limit_groups(self, choice: Tensor) -> Tensor:
        """Forbid the experts outside the best `top_groups` groups; `choice` is `(T, E)`."""
        if self.top_groups is None or self.top_groups == self.num_groups:
            return choice
        grouped = choice.unflatten(1, (self.num_groups, -1))
        group_score = grouped.topk(self.group_score_k, dim=2).values.sum(2)
        kept = torch.zeros_like(group_score, dtype=torch.bool)
        kept = kept.scatter(1, group_score.topk(self.top_groups, dim=1).indices, True)
        limited: Tensor = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
        return limited

    def select(self, choice: Tensor) -> Tensor:
        """The K best experts of `choice` `(T, E)`, best first, each group having its minimum."""
        if self.min_per_group == 0:
            return choice.topk(self.top_k, dim=1).indices
        grouped = choice.unflatten(1, (self.num_groups, -1))
        best = grouped.topk(self.min_per_group, dim=2).indices
        guaranteed = torch.zeros_like(grouped, dtype=torch.bool).scatter(2, best, True).flatten(1)
        index = choice.masked_fill(guaranteed, float("inf")).topk(self.top_k, dim=1).indices
        by_choice = choice.gather(1, index).argsort(dim=1, descending=True)
        return index.gather(1, by_choice)

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float) -> None:
        """Raise the bias of under-used experts and lower that of over-used ones by `rate` (DeepSeek-V3, section 2.1.2).

        Args:
            counts: `(E,)` units per expert since the last optimiser step, summed over ranks.
            rate: Step of the sign update.
        """
        require(self.selection_bias, "selection_bias", self.selection_bias, "must be True for bias balancing")
        self.expert_bias += rate * torch.sign(counts.mean() - counts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Move and cast as usual, but keep the bias in float32: steps of 1e-3 vanish in bfloat16."""
        bias = self.expert_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if bias is not None and self.expert_bias.dtype != torch.float32:
            self.expert_bias = bias.to(self.expert_bias.device)
            self.window_counts = self.window_counts.float()
        return self


class NoisyTopKRouter(TopKRouter):
    """Noisy top-k gating of Shazeer et al. 2017, equations 3 to 5: learned Gaussian noise in training.

    `RoutingOutput` carries the noise, so that `load_loss` can use the smooth load. The weights are the softmax over
    the kept logits. Initialised at zero as in the paper, all experts tie until noise separates them, and in eval mode
    without any training step ties go to the first experts; the default is a small random start instead.
    """

    def __init__(
        self,
        input_dim: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int = 1,
        min_per_group: int = 0,
        init_std: float = 0.01,
    ) -> None:
        """Build the router.

        Args:
            input_dim: D of the router input.
            num_experts: E.
            top_k: K.
            num_groups: Experts form this many equal contiguous groups.
            min_per_group: Every group is given at least this many of the K slots.
            init_std: Standard deviation of the initial weights; 0 is the paper's start.
        """
        super().__init__(
            input_dim,
            num_experts,
            top_k,
            order="topk_then_softmax",
            num_groups=num_groups,
            min_per_group=min_per_group,
        )
        require(init_std >= 0, "init_std", init_std, "must be 0 or larger")
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, input_dim))
        nn.init.normal_(self.weight, std=init_std)

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
        """Route T units by `x` `(T, D)`; see `Router.forward`."""
        logits = forbid(linear_fp32(x, self.weight), expert_mask)
        if not self.training:
            return self.choose(logits, mask=mask, sample_index=sample_index)
        std = nn.functional.softplus(linear_fp32(x, self.noise_weight)) + 1e-2
        noisy = logits + torch.randn_like(logits) * std
        return self.choose(logits, mask=mask, sample_index=sample_index, noisy_logits=noisy, noise_std=std)
