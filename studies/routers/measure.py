"""What is recorded of a trained model."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from studies.routers.data import Batch, Corpus, Objective, make_batch
from studies.routers.model import expert_parameters, parameters
from zoo.moe import RoutingOutput, SoftMoELayer, observe_model, routed_modules
from zoo.moe.health import DEAD_BELOW
from zoo.moe.losses import masked_mean

SHUFFLES = 20


class Recorder:
    """Collects what a mixture did with each sequence and each scored token.

    Attributes:
        per_sequence: `(S, E)` slots that each expert computed, or the mass of a soft mixture, one tensor per batch.
        per_token: `(scored,)` experts per scored token, one tensor per batch.
        entropy: Of the router, per token, as a share of the largest possible.
        scored: The scored positions of the batch that comes next.
    """

    def __init__(self, slots_per_token: float | None) -> None:
        """Start empty; a soft mixture has a fixed number of slots per token."""
        self.slots_per_token = slots_per_token
        self.per_sequence: list[Tensor] = []
        self.per_token: list[Tensor] = []
        self.entropy: list[float] = []
        self.scored = torch.empty(0, 0, dtype=torch.bool)

    def __call__(self, routing: RoutingOutput) -> None:
        """Add one forward."""
        table = routing.router_probs
        if self.slots_per_token is None:
            empty = torch.zeros(table.shape[0], routing.num_experts + 1)
            ones = torch.ones_like(routing.expert_index, dtype=empty.dtype)
            table = empty.scatter_add(1, routing.expert_index, ones)[:, :-1]
        else:
            table = self.slots_per_token * table
        self.per_sequence.append(table.unflatten(0, self.scored.shape).sum(1))
        self.per_token.append(table.sum(1)[self.scored.flatten()])
        columns = max(routing.num_columns, 2)
        entropy = torch.special.entr(routing.router_probs).sum(1)
        self.entropy.append(float(masked_mean(entropy, routing.mask)) / math.log(columns))


def evaluate(model: nn.Module, corpus: Corpus, objective: Objective, batch_size: int, seed: int) -> dict[str, Any]:
    """Validation loss, and what the mixtures did meanwhile; keys of mixtures are None for a dense model.

    Args:
        model: A `LanguageModel`.
        corpus: Its validation windows are used.
        objective: What the model learned.
        batch_size: Sequences per forward.
        seed: Of routing noise in validation and of the shuffled control; the masks are the same for all.
    """
    model.eval()
    torch.manual_seed(seed)
    masks = torch.Generator().manual_seed(0)
    length = corpus.val.ids.shape[1]
    recorders = {name: Recorder(soft_slots(module, length)) for name, module in routed_modules(model).items()}
    handles = observe_model(model, recorders.__getitem__) if recorders else None
    losses = []
    for ids in corpus.val.ids.split(batch_size):
        batch = make_batch(ids, objective, masks)
        for recorder in recorders.values():
            recorder.scored = batch.scored
        losses.append(token_losses(model, batch))
    if handles:
        handles.remove()
    loss = torch.cat(losses)
    row = {"val_loss": float(loss.mean())}
    return {**row, **routing_numbers(model, list(recorders.values()), corpus, loss, seed)}


@torch.no_grad()
def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each scored token."""
    return nn.functional.cross_entropy(model(batch.ids, batch.scored), batch.targets, reduction="none")


def soft_slots(module: nn.Module, length: int) -> float | None:
    """Slots per token of a soft mixture; None for others."""
    return module.slots_per_expert * module.experts.num_experts / length if isinstance(module, SoftMoELayer) else None


def routing_numbers(
    model: nn.Module, recorders: list[Recorder], corpus: Corpus, loss: Tensor, seed: int
) -> dict[str, Any]:
    """Numbers of the mixtures, means over layers unless the key says otherwise."""
    total = parameters(model)
    if not recorders:
        return {**dict.fromkeys(ROUTING_KEYS), "parameters_active": total, "parameters_total": total}
    tables = [torch.cat(recorder.per_sequence) for recorder in recorders]
    loads = [table.sum(0) for table in tables]
    active = [float(load.sum()) / corpus.val.ids.numel() for load in loads]
    idle = sum(
        expert_parameters(module) * (1 - number / len(load))
        for module, number, load in zip(routed_modules(model).values(), active, loads, strict=True)
    )
    domain, count = corpus.val.domain, len(corpus.domains)
    random = torch.Generator().manual_seed(seed)
    shuffled = [domain[torch.randperm(len(domain), generator=random)] for _ in range(SHUFFLES)]
    dead = [(load < DEAD_BELOW * load.mean()).sum() for load in loads]
    per_token = torch.stack([torch.cat(recorder.per_token) for recorder in recorders]).mean(0)
    return {
        "active_experts": mean(active),
        "active_per_layer": active,
        "active_by_difficulty": by_difficulty(per_token, loss),
        "load_max_over_mean": mean(float(load.max() / load.mean().clamp(min=1e-9)) for load in loads),
        "dead_experts": float(sum(dead)),
        "specialisation": mean(specialisation(table, domain, count) for table in tables),
        "specialisation_shuffled": mean(specialisation(table, other, count) for table in tables for other in shuffled),
        "entropy": mean(value for recorder in recorders for value in recorder.entropy),
        "parameters_active": round(total - idle),
        "parameters_total": total,
    }


ROUTING_KEYS = (
    "active_experts",
    "active_per_layer",
    "active_by_difficulty",
    "load_max_over_mean",
    "dead_experts",
    "specialisation",
    "specialisation_shuffled",
    "entropy",
)


def specialisation(per_sequence: Tensor, domain: Tensor, domains: int) -> float:
    """How much of its domain a slot's expert gives away: mutual information over the entropy of the domains, 0..1.

    Args:
        per_sequence: `(S, E)` slots of each sequence in each expert.
        domain: `(S,)`.
        domains: Number of domains.
    """
    joint = torch.zeros(domains, per_sequence.shape[1]).index_add(0, domain, per_sequence).double()
    joint = joint / joint.sum().clamp(min=1e-12)
    marginals = joint.sum(1), joint.sum(0)
    information = sum(entropy(part) for part in marginals) - entropy(joint)
    return information / max(entropy(marginals[0]), 1e-12)


def entropy(shares: Tensor) -> float:
    """Entropy in nats."""
    return float(torch.special.entr(shares).sum())


def by_difficulty(per_token: Tensor, loss: Tensor) -> list[float]:
    """Mean experts per token in each quarter of the scored tokens, the easiest first."""
    order = loss.argsort()
    return [float(part.mean()) for part in per_token[order].tensor_split(4)]


def mean(values: Any) -> float:
    """Arithmetic mean."""
    values = list(values)
    return float(sum(values) / len(values))
