"""Combiners: how the K slot outputs of a unit become one output."""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.moe.routing import RoutingOutput


def combine_sum(slots: Tensor, routing: RoutingOutput) -> Tensor:
    """Weighted sum of the slots `(T, K, *out)`; a unit without a filled slot gives zero."""
    return (slots * align(routing.expert_weight, slots).to(slots.dtype)).sum(1)


def combine_logsumexp(slots: Tensor, routing: RoutingOutput) -> Tensor:
    """MoE-Fusion's mixture `log sum_e g_e exp(E_e)`, computed stably in float32; padded units give zero.

    Raises:
        ValueError: A real unit has no filled slot, so its output would be minus infinity.
    """
    filled = (routing.expert_index < routing.num_experts) & (routing.expert_weight > 0)
    alive = filled.any(1)
    if not torch.compiler.is_compiling():
        real = alive if routing.mask is None else alive | ~routing.mask
        if not bool(real.all()):
            raise ValueError(
                f"combine='logsumexp': {int((~real).sum())} of {real.numel()} units have no expert with a positive "
                "weight. Use a router without dropping, or combine='sum'."
            )
    # Empty slots are filled before the logarithm, so that their gradient is 0 and not NaN.
    log_weight = torch.where(filled, routing.expert_weight, 1.0).float().log()
    terms = slots.float() + align(log_weight, slots)
    usable = align(filled | ~alive[:, None], slots)
    out = torch.logsumexp(terms.masked_fill(~usable, float("-inf")), dim=1)
    return out.masked_fill(~align(alive, out), 0.0).to(slots.dtype)


def combine_select(slots: Tensor, routing: RoutingOutput) -> Tensor:
    """The one slot as it is, unweighted (K = 1); zero where it is empty.

    Raises:
        ValueError: K is not 1.
    """
    if slots.shape[1] != 1:
        raise ValueError(f"combine='select' takes one slot per unit, but the router gives top_k={slots.shape[1]}.")
    return slots[:, 0]


def combine_concat(slots: Tensor, routing: RoutingOutput) -> Tensor:
    """All experts' outputs in the order of their ids, joined along the last dimension (K = E); weights are not used.

    An expert that a unit does not use gives zero there.

    Raises:
        ValueError: K is not E.
    """
    if slots.shape[1] != routing.num_experts:
        raise ValueError(
            f"combine='concat' needs every expert in every unit, but top_k={slots.shape[1]} of "
            f"{routing.num_experts}. Use DenseRouter."
        )
    # Empty slots go to a column of their own, which is cut off, so that every expert keeps its place.
    by_id = slots.new_zeros(slots.shape[0], routing.num_experts + 1, *slots.shape[2:])
    by_id = by_id.scatter(1, align(routing.expert_index, slots).expand_as(slots), slots)
    return torch.cat(by_id[:, : routing.num_experts].unbind(1), dim=-1)


def align(values: Tensor, like: Tensor) -> Tensor:
    """Append dimensions of size 1 until `values` broadcasts against `like` from the left."""
    return values.view(*values.shape, *[1] * (like.ndim - values.ndim))


COMBINERS: dict[str, Callable[[Tensor, RoutingOutput], Tensor]] = {
    "sum": combine_sum,
    "logsumexp": combine_logsumexp,
    "select": combine_select,
    "concat": combine_concat,
}
