"""Health of the routing: who works, who idles, how sure the router is, and what to do about it."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.moe.losses import masked_mean
from zoo.moe.observe import observe_model
from zoo.moe.routing import RoutingOutput, membership

# An expert with less than a tenth of its fair share of the slots counts as dead.
DEAD_BELOW = 0.1


@dataclass(slots=True)
class Usage:
    """Running totals of one routed module; feed it with `update`, read it with the properties.

    Attributes:
        counts: `(E',)` slots that chose each column, before dropping.
        units: Real units seen.
        filled: Slots that were really computed.
        entropy_sum: Sum over units of the router's entropy, in nats.
        margin_sum: Sum over units of the gap between the best and the second best probability.
        num_experts: E.
        pairs: `(E', E')` units that chose both columns; on the diagonal, units that chose the column.
    """

    counts: Tensor
    units: float
    filled: float
    entropy_sum: float
    margin_sum: float
    num_experts: int
    pairs: Tensor

    @classmethod
    def empty(cls) -> "Usage":
        """Totals of nothing."""
        return cls(torch.zeros(0), 0.0, 0.0, 0.0, 0.0, 0, torch.zeros(0))

    @torch.no_grad()
    def update(self, routing: RoutingOutput) -> None:
        """Add the units of one forward."""
        counts = routing.column_counts().cpu()
        probs = routing.router_probs.detach()
        units = float(routing.num_units())
        top = probs.topk(min(2, probs.shape[1]), dim=1).values
        chosen = membership(routing.selected_index, routing.num_columns)
        pairs = (chosen.T @ chosen).cpu()
        self.counts = self.counts + counts if self.counts.numel() else counts
        self.pairs = self.pairs + pairs if self.pairs.numel() else pairs
        self.units += units
        self.filled += float(routing.expert_counts().sum())
        self.entropy_sum += units * float(masked_mean(torch.special.entr(probs).sum(1), routing.mask))
        self.margin_sum += units * float(masked_mean(top[:, 0] - top[:, -1], routing.mask))
        self.num_experts = routing.num_experts

    @property
    def load(self) -> Tensor:
        """Share of the chosen slots that went to each column, `(E',)`, summing to 1."""
        return self.counts / self.counts.sum().clamp(min=1.0)

    @property
    def coactivation(self) -> Tensor:
        """Of the units that chose a column, the share that also chose another, `(E', E')`; 1 on the diagonal."""
        return self.pairs / self.pairs.diagonal().clamp(min=1.0)[:, None]

    @property
    def dead(self) -> list[int]:
        """Experts with less than a tenth of their fair share."""
        fair = 1 / max(self.counts.numel(), 1)
        return (self.load[: self.num_experts] < DEAD_BELOW * fair).nonzero().flatten().tolist()

    def summary(self) -> dict[str, float]:
        """The numbers to log: load over its fair share, dead experts, entropy (0..1), margin, slots and drops."""
        columns, units = max(self.counts.numel(), 1), max(self.units, 1.0)
        chosen = float(self.counts[: self.num_experts].sum())
        return {
            "max_load": float(self.load.max()) * columns if columns > 1 else 1.0,
            "dead_experts": float(len(self.dead)),
            "entropy": self.entropy_sum / units / math.log(columns) if columns > 1 else 0.0,
            "margin": self.margin_sum / units,
            "slots_per_unit": self.filled / units,
            "dropped": 1 - self.filled / chosen if chosen else 0.0,
        }

    def verdict(self, name: str = "layer") -> str:
        """One line that a person can act on."""
        if not self.units:
            return f"{name}: no unit was routed; run the model under the recorder"
        columns = self.counts.numel()
        numbers = self.summary()
        if self.dead:
            return (
                f"{name}: {len(self.dead)} of {self.num_experts} experts dead; "
                "raise the balance coefficient or use selection_bias"
            )
        # A column that every unit chooses has columns / slots times its fair share.
        if numbers["max_load"] > max(2.0, 0.75 * columns * self.units / float(self.counts.sum())):
            return f"{name}: one expert takes {self.load.max():.0%} of the slots; raise the balance coefficient"
        if numbers["dropped"] > 0.1:
            return f"{name}: {numbers['dropped']:.0%} of the slots dropped; raise the capacity"
        if numbers["entropy"] > 0.99 and columns > 1:
            return f"{name}: the router is undecided (entropy {numbers['entropy']:.2f}); train longer or raise its rate"
        return f"{name}: healthy, busiest expert at {numbers['max_load']:.1f}x its share"


@contextlib.contextmanager
def record_usage(model: nn.Module) -> Iterator[dict[str, Usage]]:
    """Record every routed module, and every Hugging Face MoE block, of a model while the block runs.

    Yields:
        Totals by module name, filled while the model runs.

    Raises:
        ValueError: The model has nothing that routes.
    """
    usages: dict[str, Usage] = {}
    handles = observe_model(model, lambda name: usages.setdefault(name, Usage.empty()).update)
    try:
        yield usages
    finally:
        handles.remove()
