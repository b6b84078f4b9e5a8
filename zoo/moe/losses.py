"""Auxiliary losses: pure functions of one layer's `RoutingOutput`.

The balance losses share one scale: perfect balance is 1 and full collapse is the number of columns, so a coefficient
means the same for each. They are computed per layer and never pooled over layers: two collapsed layers that complement
each other are not balanced. Counts carry no gradient; padding is left out.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

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

    Where a window is open (`zoo.moe.open_count_windows`), `f` is that of the global batch: over all processes and all
    micro-batches since the last optimiser step (Qiu et al. 2025, arXiv 2501.11873). Null experts share their mean `f`,
    so that only their total is balanced (AdaMoE, Zeng et al. 2024, arXiv 2406.13233).
    """
    share = column_share(routing)
    return routing.num_columns * (share * masked_mean(routing.router_probs, routing.mask)).sum()


def column_share(routing: RoutingOutput) -> Tensor:
    """Share of the selected slots per column, `(E',)`, the null experts' averaged; without gradient."""
    counts = routing.column_counts() if routing.window_counts is None else routing.window_counts
    experts, null = counts.split([routing.num_experts, routing.num_columns - routing.num_experts])
    if null.numel():
        counts = torch.cat([experts, null.mean().expand_as(null)])
    return counts / counts.sum().clamp(min=1.0)


def group_balancing_loss(routing: RoutingOutput) -> Tensor:
    """DeepSeekMoE's device-level balance loss (Dai et al. 2024, arXiv 2401.06066): balance between groups of experts.

    As `load_balancing_loss` over the router's groups: 1 if the groups are balanced, whatever happens inside them.

    Raises:
        ValueError: The router has no groups, so the loss would be constant.
    """
    if routing.num_groups < 2:
        raise ValueError("The group_balancing loss needs a router with num_groups > 1.")
    share = column_share(routing).unflatten(0, (routing.num_groups, -1)).sum(1)
    probs = masked_mean(routing.router_probs, routing.mask).unflatten(0, (routing.num_groups, -1)).sum(1)
    balance: Tensor = routing.num_groups * (share * probs).sum()
    return balance


def sequence_balancing_loss(routing: RoutingOutput) -> Tensor:
    """The balance loss of each sample by itself, averaged over samples (DeepSeek-V3, equations 17 to 20, scaled to 1).

    Null experts, if any, are columns like the others here.
    """
    if routing.sample_index is None:
        return load_balancing_loss(routing)
    ids, sample = routing.sample_index.unique(return_inverse=True)
    samples, columns = ids.shape[0], routing.num_columns
    real = torch.ones_like(sample, dtype=torch.bool) if routing.mask is None else routing.mask
    sizes = torch.zeros(samples, device=sample.device).index_add_(0, sample, real.float())
    probs = routing.router_probs.masked_fill(~real[:, None], 0.0)
    mass = probs.new_zeros(samples, columns).index_add(0, sample, probs)
    counts = sample_counts(routing, sample, samples) if routing.has_slots else mass.detach()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1.0)
    mean_probs = mass / sizes.clamp(min=1.0)[:, None]
    return masked_mean(columns * (share * mean_probs).sum(1), sizes > 0)


def sample_counts(routing: RoutingOutput, sample: Tensor, samples: int) -> Tensor:
    """How often each sample's units selected each column, `(S, E')` float32.

    Args:
        routing: Has slots.
        sample: `(T,)`, numbered from 0.
        samples: S.
    """
    columns = routing.num_columns
    chosen = sample[:, None] * (columns + 1) + routing.selected_index
    counts = torch.bincount(chosen.flatten(), minlength=samples * (columns + 1)).float()
    return counts.view(samples, columns + 1)[:, :columns]


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

    A forbidden column (-inf) has probability 0; one that competes with forbidden ones only has 1.
    """
    if top_k >= clean.shape[1]:
        return torch.ones_like(clean)
    top = noisy.topk(top_k + 1, dim=1).values
    kth, next_best = top[:, top_k - 1 : top_k], top[:, top_k:]
    threshold = torch.where(noisy > next_best, next_best, kth)
    # Infinities are kept out of the division, whose gradient they would make NaN.
    allowed = clean > float("-inf")
    contested = allowed & (threshold > float("-inf"))
    probability = torch.special.ndtr((clean - threshold).masked_fill(~contested, 0.0) / std)
    return torch.where(contested, probability, allowed.to(probability.dtype))


def z_loss(routing: RoutingOutput) -> Tensor:
    """ST-MoE's router z-loss, equation 5: mean squared log-sum-exp of the logits; keeps them small."""
    return masked_mean(torch.logsumexp(routing.router_logits, dim=1).square(), routing.mask)


def entropy_loss(routing: RoutingOutput) -> Tensor:
    """Mean entropy of the router in nats (Huang et al. 2024, arXiv 2403.07652): makes top-p need fewer experts."""
    probs = routing.router_probs
    # At 0 the entropy is 0, but its gradient infinite.
    return masked_mean(torch.special.entr(probs.clamp(min=torch.finfo(probs.dtype).tiny)).sum(1), routing.mask)


def distillation_loss(routing: RoutingOutput) -> Tensor:
    """Cross-entropy of a student router with the choice it should learn (StableMoE, Dai et al. 2022, arXiv 2204.08396).

    Raises:
        ValueError: The router has no student.
    """
    if routing.distilled_logits is None:
        raise ValueError("The distillation loss needs a router with a student, such as StableMoERouter.")
    choice = routing.selected_index[:, 0]
    loss = nn.functional.cross_entropy(
        routing.distilled_logits, choice, ignore_index=routing.num_columns, reduction="none"
    )
    return masked_mean(loss, routing.mask)


def consistency_loss(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """THOR's regulariser (Zuo et al. 2021, arXiv 2110.04260): half the symmetric Kullback-Leibler divergence, in nats.

    Args:
        first: `(..., C)` logits of one forward.
        second: `(..., C)` logits of another.
        mask: `(...)` bool, true where it counts; the loss is the mean over these.
    """
    log_p, log_q = first.float().log_softmax(-1), second.float().log_softmax(-1)
    divergence = 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    return masked_mean(divergence.flatten(), None if mask is None else mask.flatten())


def consistency_step(
    run: Callable[[], Tensor],
    task_loss: Callable[[Tensor], Tensor],
    coefficient: float = 5.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One training step of THOR: two forwards that draw different experts, and a pull between them.

    Args:
        run: Runs the model on the batch; called twice.
        task_loss: Maps logits `(..., C)` to a loss that is a mean, as the consistency is.
        coefficient: Of the consistency.
        mask: `(...)` bool, true for real units.

    Returns:
        `task_loss(first) + task_loss(second) + coefficient * consistency`, and the mean of both logits.

    Raises:
        ValueError: The coefficient is negative.
    """
    if coefficient < 0:
        raise ValueError(f"coefficient={coefficient}: must be 0 or larger.")
    first, second = run(), run()
    loss = task_loss(first) + task_loss(second) + coefficient * consistency_loss(first, second, mask)
    return loss, (first + second) / 2


LOSSES: dict[str, Callable[[RoutingOutput], Tensor]] = {
    "load_balancing": load_balancing_loss,
    "importance": importance_loss,
    "load": load_loss,
    "z": z_loss,
    "sequence_balancing": sequence_balancing_loss,
    "group_balancing": group_balancing_loss,
    "entropy": entropy_loss,
    "distillation": distillation_loss,
}
