"""A mixture of low-rank experts: what one adapter adds to one linear layer."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.moe import DenseRouter, RoutedModule, Router, RouterInput, TopKRouter


class LoraMixture(RoutedModule):
    """Low-rank experts, weighted by a router: `scaling * B (gates * A x)` with each gate repeated over its expert.

    A mixture of LoRA experts is one LoRA whose ranks are weighted in blocks (SMoRA, Zhao et al. 2025, arXiv
    2501.15103), so all experts are two matrix products, whichever of them a unit uses; nothing is gathered. With
    blocks of one rank each, every rank is an expert.

    Attributes:
        rank: Ranks of each expert.
        lora_A: `(E * rank, D)`; `(rank, D)` where all experts share it.
        lora_B: `(D_out, E * rank)`.
    """

    router: Router

    def __init__(
        self,
        router: Router,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        shared_a: bool = False,
        aux_losses: Mapping[str, float] | None = None,
        init_weights: bool = True,
    ) -> None:
        """Build the experts that a router chooses from.

        Args:
            router: Has one column for each of the E experts.
            in_features: D.
            out_features: D_out.
            rank: Ranks of each expert.
            scaling: Factor on what the experts add.
            dropout: Probability with which what the experts read is dropped; the router reads all of it.
            shared_a: Whether one A serves all experts (HydraLoRA, Tian et al. 2024, arXiv 2404.19245).
            aux_losses: Coefficients, see `RoutedModule`.
            init_weights: Whether B starts at zero, so that nothing is added before training; otherwise it is random.
        """
        super().__init__(aux_losses)
        self.router = router
        self.rank = rank
        self.scaling = scaling
        self.dropout = dropout
        ranks = router.num_experts * rank
        self.lora_A = nn.Parameter(torch.empty(rank if shared_a else ranks, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, ranks))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if not init_weights:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    @property
    def is_constant(self) -> bool:
        """Whether every gate is 1 whatever the input: a plain LoRA, which can be merged."""
        return isinstance(self.router, DenseRouter) and self.router.score == "none"

    def delta_weight(self) -> Tensor:
        """What a constant mixture adds to the weight, `(D_out, D)`."""
        return self.lora_B @ self.lora_A * self.scaling

    def forward(self, result: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Add to the output of the linear layer.

        Args:
            result: `(*lead, D_out)`.
            x: `(*lead, D)`, what the linear layer read.
            mask: `(T,)` bool, true for real units; T is the product of `lead`. Routed experts add nothing to padding.

        Returns:
            `(*lead, D_out)` of the dtype that adding gives.
        """
        units = RouterInput(x.flatten(0, -2).to(self.lora_A.dtype), mask, sample_index(x))
        added = self.weighted_ranks(units).to(self.lora_B.dtype)
        if result.dtype == added.dtype and not torch.is_autocast_enabled(x.device.type):
            return torch.addmm(result.flatten(0, -2), added, self.lora_B.t()).view_as(result)
        return result + functional.linear(added, self.lora_B).view_as(result)

    def weighted_ranks(self, units: RouterInput) -> Tensor:
        """The products with A, weighted: `(T, E * rank)`."""
        hidden: Tensor
        x, router = functional.dropout(units.x, self.dropout, self.training), self.router
        # A subclass may score or choose in another way.
        if type(router) is TopKRouter and self.fuses(units.x, router):
            both = functional.linear(x, torch.cat([self.lora_A, router.weight]))
            hidden, logits = both.split([self.lora_A.shape[0], router.num_experts], dim=1)
            routing = router.choose(units, logits)
        else:
            hidden = functional.linear(x, self.lora_A)
            routing = router.route(units)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.lora_B.requires_grad):
            self.record(routing)
        if self.is_constant:
            return hidden * self.scaling
        gates = routing.dense_weight() * self.scaling
        if self.rank == 1:
            return hidden * gates
        ranks: Tensor = hidden.unflatten(1, (-1, self.rank))
        return (ranks * gates[:, :, None]).flatten(1)

    def fuses(self, x: Tensor, router: TopKRouter) -> bool:
        """Whether one matrix product can give the logits too: in float32, as routers score, and of the same input."""
        return (
            x.dtype == router.weight.dtype == torch.float32
            and not (self.training and (self.dropout or router.jitter))
            and not torch.is_autocast_enabled(x.device.type)
        )


def sample_index(x: Tensor) -> Tensor:
    """The sample of each unit of `(*lead, D)`, `(T,)`: its index along the first leading dimension."""
    lead = x.shape[:-1]
    first = torch.arange(lead[0], device=x.device)
    return first.view(-1, *[1] * (len(lead) - 1)).expand(lead).reshape(-1)
