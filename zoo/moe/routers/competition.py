"""Units that compete for experts, always within one sample."""

import torch
from torch import Tensor

from zoo.moe.routing import RouterInput


def rank_within(group: Tensor, *keys: Tensor) -> Tensor:
    """Rank of each entry among those of its group, `(N,)`, 0 for the first.

    Args:
        group: `(N,)` int64.
        keys: `(N,)` each; entries are ordered by the first, ties by the next, remaining ties by position.
    """
    order = torch.arange(group.shape[0], device=group.device)
    for key in (*reversed(keys), group):
        order = order[key[order].argsort(stable=True)]
    ordered = group[order]
    rank = torch.arange(group.shape[0], device=group.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).index_copy_(0, order, rank)


def capacities(sizes: Tensor, share: float) -> Tensor:
    """`ceil(sizes * share)`, `(S,)`, not fooled by the last bit of a product that should be whole."""
    return (sizes.double() * share - 1e-9).ceil().long()


def limit_capacity(
    units: RouterInput, index: Tensor, num_experts: int, factor: float, priority: Tensor | None
) -> Tensor:
    """Empty the slots that come too late to an expert that takes `ceil(units * K / E * factor)` per sample.

    First choices go before second ones; among equals larger priorities first, or earlier units where there is none.

    Args:
        units: What is routed.
        index: `(T, K)` in `0..E`, the best choice first.
        num_experts: E.
        factor: Capacity over the fair share.
        priority: `(T, K)` or None.

    Returns:
        `(T, K)` in `0..E`.
    """
    sample, sizes = units.samples()
    top_k = index.shape[1]
    if units.mask is not None:
        index = index.masked_fill(~units.mask[:, None], num_experts)
    capacity = capacities(sizes, top_k * factor / num_experts)[sample]
    choice = torch.arange(top_k, device=index.device).expand_as(index)
    keys = [choice.flatten()] if priority is None else [choice.flatten(), -priority.detach().flatten()]
    rank = rank_within((sample[:, None] * (num_experts + 1) + index).flatten(), *keys).view_as(index)
    return index.masked_fill(rank >= capacity[:, None], num_experts)


def sample_rows(units: RouterInput) -> Tensor:
    """The real units of each sample in their order, `(S, L)`; T where a row has ended."""
    sample, sizes = units.samples()
    real = torch.arange(sample.shape[0], device=sample.device)
    if units.mask is not None:
        real = real[units.mask]
    length = int(sizes.max()) if sizes.numel() else 0
    rows = real.new_full((sizes.shape[0], length), sample.shape[0])
    rows[sample[real], rank_within(sample[real])] = real
    return rows


@torch.no_grad()
def balanced_assignment(scores: Tensor, tolerance: float = 0.01) -> Tensor:
    """Give each of n units one expert, at most `ceil(n / E)` units to each, with nearly the largest total score.

    Bertsekas' auction for similar objects (Bertsekas and Castanon 1989): every unit without an expert bids for its
    best one what makes it as good as its second best, and an expert keeps its highest bids. The total is within
    `n * tolerance * (range of the scores)` of the best one.

    Args:
        scores: `(n, E)`; -inf is avoided where the capacity allows it.
        tolerance: The smallest raise of a bid, as a share of the range of the scores.

    Returns:
        `(n,)` int64.
    """
    units, experts = scores.shape
    capacity = -(-units // experts)
    finite = scores[scores.isfinite()].double()
    spread = (float(finite.max() - finite.min()) if finite.numel() else 0.0) or 1.0
    worst = float(finite.min()) - 10 * spread if finite.numel() else 0.0
    value = scores.double().nan_to_num(neginf=worst)
    step = tolerance * spread
    expert = torch.full((units,), -1, device=scores.device)
    bid = value.new_zeros(units)
    price = value.new_zeros(experts)
    while (free := (expert < 0).nonzero().flatten()).numel():
        best = (value[free] - price).topk(min(2, experts), dim=1)
        expert[free] = best.indices[:, 0]
        bid[free] = price[best.indices[:, 0]] + best.values[:, 0] - best.values[:, -1] + step
        rank = rank_within(expert, -bid)
        last = rank == capacity - 1
        price[expert[last]] = bid[last]
        expert[rank >= capacity] = -1
    return expert
