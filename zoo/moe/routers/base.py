"""The contract of a router, and the checks and the padding rule that all routers share."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.moe.routing import RouterInput, RoutingOutput


def require(condition: bool, argument: str, value: object, rule: str) -> None:
    """Raise a `ValueError` that names an argument, its value and the rule it breaks."""
    if not condition:
        raise ValueError(f"{argument}={value!r}: {rule}.")


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map in float32 whatever the dtype of its operands or an active autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())


def linear_weight(rows: int, input_dim: int) -> nn.Parameter:
    """A weight `(rows, input_dim)` whose products with unit-variance inputs have unit variance.

    Raises:
        ValueError: The width is below 1.
    """
    require(input_dim >= 1, "input_dim", input_dim, "must be at least 1")
    return nn.Parameter(torch.randn(rows, input_dim) / math.sqrt(input_dim))


class Router(nn.Module):
    """Decides which experts each unit goes to.

    A subclass implements `route` and ends it with `self.output(...)`. Whatever competes (capacity, expert choice)
    competes within one `sample_index`; recurrent state comes in by argument and leaves in `RoutingOutput.state`.

    Attributes:
        noncausal: Whether a unit's routing depends on later units in eval mode too, so that causal models refuse it.
        needs_expert: Whether a unit that may use no expert must be left out; false where null experts take it.
    """

    noncausal: bool = False
    needs_expert: bool = True

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

    @property
    def compares_units(self) -> bool:
        """Whether the routing of a unit depends, in this mode, on other units of its sample."""
        return False

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
        """Route T units; the arguments are those of `RouterInput`."""
        units = RouterInput(x, mask, sample_index, token_ids, state, expert_output, expert_mask)
        return self.route(without_idle(units) if self.needs_expert else units)

    def route(self, units: RouterInput) -> RoutingOutput:
        """Decide for T units; what a subclass implements."""
        raise NotImplementedError(f"{type(self).__name__} must implement route(units).")

    def output(
        self,
        units: RouterInput,
        index: Tensor,
        weight: Tensor,
        *,
        logits: Tensor,
        probs: Tensor,
        selected: Tensor | None = None,
        identity_weight: Tensor | None = None,
        **extra: Any,
    ) -> RoutingOutput:
        """Build the `RoutingOutput`, emptying the slots of padded units and the weights of empty slots.

        Args:
            units: What was routed.
            index: `(T, K)` experts, E for an empty slot.
            weight: `(T, K)`.
            logits: `(T, E')`.
            probs: `(T, E')`.
            selected: `(T, K)` columns before dropping; `index` if left out.
            identity_weight: `(T,)`, see `RoutingOutput`.
            extra: Further fields of `RoutingOutput`.
        """
        columns, mask = logits.shape[1], units.mask
        if selected is None:
            selected = index.masked_fill(index == self.num_experts, columns)
        if mask is not None:
            index = index.masked_fill(~mask[:, None], self.num_experts)
            selected = selected.masked_fill(~mask[:, None], columns)
            identity_weight = None if identity_weight is None else identity_weight * mask
        weight = weight.masked_fill(index == self.num_experts, 0.0)
        return RoutingOutput(
            index,
            weight,
            selected,
            logits,
            probs,
            self.num_experts,
            mask,
            units.sample_index,
            identity_weight=identity_weight,
            **extra,
        )

    def output_all(self, units: RouterInput, keep: Tensor, weight: Tensor, **fields: Any) -> RoutingOutput:
        """As `output`, with every expert in its own slot (K = E), empty where `keep` `(T, E)` is false."""
        index = torch.arange(self.num_experts, device=keep.device).expand_as(keep)
        return self.output(units, index.masked_fill(~keep, self.num_experts), weight, **fields)


class LinearRouter(Router):
    """Base of the routers whose logits are a linear map of the router input, in float32."""

    def __init__(self, input_dim: int, num_experts: int, top_k: int, num_columns: int | None = None) -> None:
        """Build the map.

        Args:
            input_dim: D of the router input.
            num_experts: E.
            top_k: K.
            num_columns: E'; E if left out.

        Raises:
            ValueError: A size is not allowed; the message names it.
        """
        super().__init__(num_experts, top_k)
        columns = num_columns or num_experts
        rule = "must not exceed " + (f"num_experts={num_experts}" if columns == num_experts else f"{columns} columns")
        require(top_k <= columns, "top_k", top_k, rule)
        self.weight = linear_weight(columns, input_dim)

    def logits(self, units: RouterInput) -> Tensor:
        """Scores `(T, E')` before any normalisation, -inf for forbidden experts."""
        return forbid(linear_fp32(units.x, self.weight), units.expert_mask)


def without_idle(units: RouterInput) -> RouterInput:
    """Make padding of the units that `expert_mask` leaves without any expert: a softmax over nothing is NaN."""
    if units.expert_mask is None:
        return units
    able = units.expert_mask.any(-1)
    mask = able.expand(units.x.shape[0]) if units.mask is None else units.mask & able
    return replace(units, mask=mask, expert_mask=units.expert_mask | ~able[..., None])


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
