"""Auxiliary losses: pure functions of one layer's `RoutingOutput`.

The balance losses share one scale: perfect balance is 1 and full collapse is the number of columns, so a coefficient
means the same for each. They are computed per layer and never pooled over layers: two collapsed layers that complement
each other are not balanced. Counts carry no gradient; padding is left out.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.moe.routing import RoutingOutput


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the real units of dim 0, 0 where there is none.

    Args:
        values: `(T, ...)`.
        mask: `(T,)` bool or None.
    """
    if mask is None:
        return values.mean(0) if values.shape[0] else values.sum(0)
    keep = mask.view(-1, *[1] * (values.ndim - 1))
    return values.masked_fill(~keep, 0.0).sum(0) / mask.sum().clamp(min=1)


def squared_share(amount: Tensor) -> Tensor:
    """`E' * sum(share^2)` of a nonnegative vector, which is `1 + CV^2` with the population variance; 1 if all is 0."""
    total = amount.sum()
    share = amount / total.clamp(min=1e-20)
    return torch.where(total > 0, amount.numel() * share.square().sum(), torch.ones_like(total))


def load_balancing_loss(routing: RoutingOutput) -> Tensor:
    """Switch Transformer's balance loss, equations 4 to 6, counted over all K slots: `E' * sum_i f_i P_i`.

    `f_i` is the share of selected slots that went to column i, counted before dropping and without gradient; `P_i` is
    the mean probability of column i. The value is 1 at perfect balance whatever K is (transformers' form sums f to K).
    """
    counts = routing.column_counts()
    share = counts / counts.sum().clamp(min=1.0)
    return routing.num_columns * (share * masked_mean(routing.router_probs, routing.mask)).sum()


def importance_loss(routing: RoutingOutput) -> Tensor:
    """Shazeer et al. 2017, equation 7: `1 + CV^2` of the summed weights per expert (their loss is the CV^2 alone)."""
    return squared_share(routing.dense_weight().sum(0))


def load_loss(routing: RoutingOutput) -> Tensor:
    """Shazeer et al. 2017, equations 8 to 11: `1 + CV^2` of the expected number of units per expert.

    Under routing noise the load is the smooth probability that a fresh draw of a column's noise keeps it among the
    top K; without noise it is the plain count, which carries no gradient.
    """
    if routing.noise_std is None or routing.noisy_logits is None:
        return squared_share(routing.column_counts())
    probability = probability_in_top_k(
        routing.router_logits, routing.noisy_logits, routing.noise_std, routing.selected_index.shape[1]
    )
    if routing.mask is not None:
        probability = probability.masked_fill(~routing.mask[:, None], 0.0)
    return squared_share(probability.sum(0))


def probability_in_top_k(clean: Tensor, noisy: Tensor, std: Tensor, top_k: int) -> Tensor:
    """Probability `(T, E')` that a column stays among the top K when only its own noise is drawn anew.

    Args:
        clean: `(T, E')` logits without noise.
        noisy: `(T, E')` logits that were selected on.
        std: `(T, E')` standard deviation of the noise.
        top_k: K. With K = E' the probability is 1.
    """
    if top_k >= clean.shape[1]:
        return torch.ones_like(clean)
    top = noisy.topk(top_k + 1, dim=1).values
    kth, next_best = top[:, top_k - 1 : top_k], top[:, top_k:]
    threshold = torch.where(noisy > next_best, next_best, kth)
    probability: Tensor = torch.special.ndtr((clean - threshold) / std)
    return probability


def z_loss(routing: RoutingOutput) -> Tensor:
    """ST-MoE's router z-loss, equation 5: mean squared log-sum-exp of the logits; keeps them small."""
    return masked_mean(torch.logsumexp(routing.router_logits, dim=1).square(), routing.mask)


LOSSES: dict[str, Callable[[RoutingOutput], Tensor]] = {
    "load_balancing": load_balancing_loss,
    "importance": importance_loss,
    "load": load_loss,
    "z": z_loss,
}
