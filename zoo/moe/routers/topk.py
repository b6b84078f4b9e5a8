"""Top-k routing: every unit chooses its K best experts."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.moe.routers.base import LinearRouter, forbid, linear_fp32, linear_weight, require
from zoo.moe.routers.competition import limit_capacity
from zoo.moe.routing import RouterInput, RoutingOutput

ORDERS = ("softmax_then_topk", "topk_then_softmax")
SCORES = ("softmax", "sigmoid")
DROP_POLICIES = ("probs", "position")


class TopKRouter(LinearRouter):
    """Linear scores, the K best experts per unit.

    Covers Switch (`top_k=1, normalize=False`), GShard (`random_second`, capacity), Mixtral and Qwen (softmax,
    normalised), gpt-oss (`topk_then_softmax`), DeepSeek-V3 (sigmoid, selection bias, group-limited) and modality-tied
    mixtures (`min_per_group`).
    """

    expert_bias: Tensor

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
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        drop_policy: Literal["probs", "position"] | None = None,
        random_second: bool = False,
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
            capacity_factor: In training an expert takes at most `ceil(units * K / E * capacity_factor)` slots of one
                sample; the others are dropped. None drops nothing.
            eval_capacity_factor: The same in eval mode. Who is dropped then depends on later units too, so a layer of a
                causal model refuses it.
            drop_policy: Who stays when an expert is full. First choices go before second ones; among equals the more
                probable (`probs`) or the earlier (`position`) unit stays. Needed for a capacity.
            random_second: In training the second expert is kept with probability `min(1, 2 w)`, w being its weight
                (GShard, algorithm 1). Needs `top_k=2`.

        Raises:
            ValueError: An argument is outside its range or does not fit another; the message names both.
        """
        super().__init__(input_dim, num_experts, top_k)
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
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            require(factor is None or factor > 0, name, factor, "must be positive")
            require(factor is None or drop_policy is not None, name, factor, "needs a drop_policy")
        require(
            drop_policy is None or drop_policy in DROP_POLICIES,
            "drop_policy",
            drop_policy,
            f"must be one of {', '.join(DROP_POLICIES)}",
        )
        require(not random_second or top_k == 2, "random_second", random_second, f"needs top_k=2, not {top_k}")
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
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.noncausal = eval_capacity_factor is not None
        self.drop_policy = drop_policy
        self.random_second = random_second
        self.register_buffer("expert_bias", torch.zeros(num_experts) if selection_bias else None)
        # Not a buffer: DistributedDataParallel overwrites buffers with those of rank 0 in every forward.
        self.window_counts = torch.zeros(num_experts)
        self.window_forwards = 0

    @property
    def compares_units(self) -> bool:
        """Whether there is a capacity in this mode."""
        return self.active_capacity is not None

    @property
    def active_capacity(self) -> float | None:
        """The capacity factor of this mode."""
        return self.capacity_factor if self.training else self.eval_capacity_factor

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by `x` `(T, D)`."""
        if self.training and self.jitter:
            noise = torch.empty_like(units.x).uniform_(1 - self.jitter, 1 + self.jitter)
            units = replace(units, x=units.x * noise)
        return self.choose(units, self.logits(units))

    def choose(
        self, units: RouterInput, logits: Tensor, noisy_logits: Tensor | None = None, noise_std: Tensor | None = None
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
        selected = index.masked_fill(empty, self.num_experts)
        return self.output(
            units,
            self.drop(units, selected, weight, probs),
            weight * self.scale,
            logits=logits,
            probs=probs,
            selected=selected,
            noisy_logits=noisy_logits,
            noise_std=noise_std,
            num_groups=self.num_groups,
        )

    def drop(self, units: RouterInput, index: Tensor, weight: Tensor, probs: Tensor) -> Tensor:
        """Empty the slots that GShard's dice or a full expert refuse.

        Args:
            units: What is routed.
            index: `(T, K)` in `0..E`.
            weight: `(T, K)`.
            probs: `(T, E)`, by which units stay under `drop_policy="probs"`.
        """
        if self.training and self.random_second:
            refused = torch.rand_like(weight) >= 2 * weight
            refused[:, 0] = False
            index = index.masked_fill(refused, self.num_experts)
        if self.active_capacity is None:
            return index
        by_probs = self.drop_policy == "probs"
        priority = probs.gather(1, index.clamp(max=self.num_experts - 1)) if by_probs else None
        return limit_capacity(units, index, self.num_experts, self.active_capacity, priority)

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
        if self.top_k == 1:
            # Ten times as fast as topk on a CPU.
            return choice.argmax(dim=1, keepdim=True)
        if self.min_per_group == 0:
            return best_two(choice) if self.top_k == 2 else choice.topk(self.top_k, dim=1).indices
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
        return self


def best_two(choice: Tensor) -> Tensor:
    """The two best columns of `choice` `(T, E)`, `(T, 2)`; on a CPU in half the time of topk."""
    # Forbidden columns must stay above the one that is taken out, or it would be chosen twice.
    finite = choice.detach().clamp(min=torch.finfo(choice.dtype).min)
    first = finite.max(dim=1, keepdim=True).indices
    second = finite.scatter(1, first, float("-inf")).max(dim=1, keepdim=True).indices
    return torch.cat([first, second], dim=1)


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

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by `x` `(T, D)`."""
        logits = self.logits(units)
        if not self.training:
            return self.choose(units, logits)
        std = nn.functional.softplus(linear_fp32(units.x, self.noise_weight)) + 1e-2
        return self.choose(units, logits, logits + torch.randn_like(logits) * std, std)


class CosineRouter(TopKRouter):
    """X-MoE's router (Chi et al. 2022, arXiv 2204.09179): cosines of projected units and expert embeddings.

    A learned temperature scales them. Cosines keep long hidden vectors from collapsing onto the expert embeddings,
    which are normalised in every forward (the paper's code renormalises the stored ones instead).
    """

    def __init__(
        self,
        input_dim: int,
        num_experts: int,
        top_k: int,
        *,
        project_dim: int | None = None,
        temperature: float = 0.07,
        **options: Any,
    ) -> None:
        """Build the router.

        Args:
            input_dim: D of the router input.
            num_experts: E.
            top_k: K.
            project_dim: Width in which cosines are taken; the paper's E/2 if left out, at least 2.
            temperature: What cosines are divided by at the start; learned.
            options: The options of `TopKRouter`.

        Raises:
            ValueError: An argument is not allowed; the message names it.
        """
        project_dim = max(num_experts // 2, 2) if project_dim is None else project_dim
        require(project_dim >= 1, "project_dim", project_dim, "must be at least 1")
        require(temperature > 0, "temperature", temperature, "must be positive")
        super().__init__(project_dim, num_experts, top_k, **options)
        self.project = linear_weight(project_dim, input_dim)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def logits(self, units: RouterInput) -> Tensor:
        """Cosines over temperature, `(T, E)`."""
        projected = nn.functional.normalize(linear_fp32(units.x, self.project), dim=1)
        embeddings = nn.functional.normalize(self.weight.float(), dim=1)
        cosine = linear_fp32(projected, embeddings)
        return forbid(cosine / self.log_temperature.float().exp(), units.expert_mask)
