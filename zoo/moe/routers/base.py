"""The contract of a router, and the checks and the padding rule that all routers share."""

from typing import Any

import torch
from torch import Tensor, nn

from zoo.moe.routing import RoutingOutput


def require(condition: bool, argument: str, value: object, rule: str) -> None:
    """Raise a `ValueError` that names an argument, its value and the rule it breaks."""
    if not condition:
        raise ValueError(f"{argument}={value!r}: {rule}.")


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map in float32 whatever the dtype of its operands or an active autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())


class Router(nn.Module):
    """Decides which experts each unit goes to.

    A subclass implements `forward` and ends it with `self.output(...)`. Whatever competes (capacity, expert choice)
    competes within one `sample_index`; recurrent state comes in by argument and leaves in `RoutingOutput.state`.
    """

    def __init__(self, num_experts: int, top_k: int) -> None:
        """Store the sizes.

        Args:
            num_experts: E.
            top_k: K, slots per unit.

        Raises:
            ValueError: A size is not allowed; the message names it.
        """
        super().__init__()
        require(num_experts >= 1, "num_experts", num_experts, "must be at least 1")
        require(top_k >= 1, "top_k", top_k, "must be at least 1")
        self.num_experts = num_experts
        self.top_k = top_k

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
        """Route T units.

        Args:
            x: `(T, D)` router input.
            mask: `(T,)` bool, true for real units; padding is neither routed nor counted.
            sample_index: `(T,)` int64, the sample of each unit.
            token_ids: `(T,)` int64, for routers that look them up.
            state: Recurrent state of the previous layer.
            expert_output: `(T, E, *out)` where the layer runs its experts first.
            expert_mask: `(E,)` or `(T, E)` bool; experts that are false cannot be chosen.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward.")

    def output(
        self,
        index: Tensor,
        weight: Tensor,
        *,
        logits: Tensor,
        probs: Tensor,
        selected: Tensor | None = None,
        mask: Tensor | None = None,
        **extra: Any,
    ) -> RoutingOutput:
        """Build the `RoutingOutput`, emptying the slots of padded units and the weights of empty slots.

        Args:
            index: `(T, K)` experts, E for an empty slot.
            weight: `(T, K)`.
            logits: `(T, E')`.
            probs: `(T, E')`.
            selected: `(T, K)` columns before dropping; `index` if left out.
            mask: `(T,)` bool.
            extra: The remaining fields of `RoutingOutput`.
        """
        columns = logits.shape[1]
        if selected is None:
            selected = index.masked_fill(index == self.num_experts, columns)
        if mask is not None:
            index = index.masked_fill(~mask[:, None], self.num_experts)
            selected = selected.masked_fill(~mask[:, None], columns)
        weight = weight.masked_fill(index == self.num_experts, 0.0)
        return RoutingOutput(index, weight, selected, logits, probs, self.num_experts, mask, **extra)


def forbid(scores: Tensor, expert_mask: Tensor | None) -> Tensor:
    """Set the scores of forbidden experts to -inf; columns beyond the mask (null experts) stay.

    Args:
        scores: `(T, E')`.
        expert_mask: `(E,)` or `(T, E)` bool, or None.
    """
    if expert_mask is None:
        return scores
    missing = scores.shape[1] - expert_mask.shape[-1]
    return scores.masked_fill(~nn.functional.pad(expert_mask, (0, missing), value=True), float("-inf"))
