"""Routers that give each unit as many experts as it needs."""

from typing import Literal

import torch
from torch import Tensor

from zoo.moe.routers.base import LinearRouter, require
from zoo.moe.routing import RouterInput, RoutingOutput

NULL_KINDS = ("zero", "identity")


class TopPRouter(LinearRouter):
    """Dynamic routing (Huang et al. 2024, arXiv 2403.07652): the best experts until their probabilities reach p.

    The expert that crosses p is included, so that each unit has at least one. The weights are the probabilities as they
    are. Train it with the losses `load_balancing` and `entropy`: without the second the router flattens and uses all.
    """

    def __init__(self, input_dim: int, num_experts: int, p: float = 0.4, max_k: int | None = None) -> None:
        """Build the router.

        Args:
            input_dim: D of the router input.
            num_experts: E.
            p: Probability that the chosen experts of a unit must reach.
            max_k: At most this many experts per unit; E if left out.

        Raises:
            ValueError: An argument is not allowed; the message names it.
        """
        require(0 < p <= 1, "p", p, "must be in (0, 1]")
        max_k = num_experts if max_k is None else max_k
        require(1 <= max_k <= num_experts, "max_k", max_k, f"must be in 1..num_experts={num_experts}")
        super().__init__(input_dim, num_experts, max_k)
        self.p = p

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by `x` `(T, D)`."""
        logits = self.logits(units)
        probs = torch.softmax(logits, dim=1)
        weight, index = probs.topk(self.top_k, dim=1)
        needed = (weight.cumsum(1) - weight <= self.p) & (weight > 0)
        return self.output(units, index.masked_fill(~needed, self.num_experts), weight, logits=logits, probs=probs)


class NullExpertRouter(LinearRouter):
    """AdaMoE (Zeng et al. 2024, arXiv 2406.13233): top-k over true experts and null experts that cost nothing.

    A `zero` null expert adds nothing, and the weights of the true ones sum to 1; an `identity` null expert adds the
    unit itself (LongCat), and all weights sum to 1. `load_balancing_loss` balances the null experts' total only.
    """

    needs_expert = False

    def __init__(
        self,
        input_dim: int,
        num_experts: int,
        top_k: int,
        num_null: int,
        null_kind: Literal["zero", "identity"] = "zero",
    ) -> None:
        """Build the router.

        Args:
            input_dim: D of the router input.
            num_experts: E, the true experts.
            top_k: K over true and null experts together.
            num_null: Null experts; E' = E + `num_null`.
            null_kind: What a null expert gives.

        Raises:
            ValueError: An argument is not allowed; the message names it.
        """
        require(num_null >= 1, "num_null", num_null, "must be at least 1")
        require(null_kind in NULL_KINDS, "null_kind", null_kind, f"must be one of {', '.join(NULL_KINDS)}")
        super().__init__(input_dim, num_experts, top_k, num_columns=num_experts + num_null)
        self.num_null = num_null
        self.null_kind = null_kind

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by `x` `(T, D)`."""
        logits = self.logits(units)
        probs = torch.softmax(logits, dim=1)
        chosen, column = probs.topk(self.top_k, dim=1)
        forbidden, null = chosen == 0, column >= self.num_experts
        identity = None
        if self.null_kind == "identity":
            weight = chosen / chosen.sum(1, keepdim=True)
            identity = (weight * null).sum(1)
        else:
            weight = chosen.masked_fill(null, 0.0)
            weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-20)
        return self.output(
            units,
            column.masked_fill(null | forbidden, self.num_experts),
            weight,
            logits=logits,
            probs=probs,
            selected=column.masked_fill(forbidden, probs.shape[1]),
            identity_weight=identity,
        )


class DenseToSparseRouter(LinearRouter):
    """EvoMoE's dense-to-sparse gate (Nie et al. 2021, arXiv 2112.14397): from all experts to one during training.

    In training the weights are a Gumbel softmax at a temperature, and experts below `threshold` are left out; at
    temperature 0, and in eval mode, the best expert alone is used, weighted by its probability. Lower the temperature
    with `zoo.callbacks.GateTemperature`.
    """

    temperature: Tensor

    def __init__(
        self,
        input_dim: int,
        num_experts: int,
        temperature: float = 2.0,
        threshold: float = 0.02,
        dense_eval: bool = False,
    ) -> None:
        """Build the router.

        Args:
            input_dim: D of the router input.
            num_experts: E.
            temperature: At the start of training; 0 is one expert per unit.
            threshold: Experts with less weight are left out.
            dense_eval: Whether eval mode weighs all experts as training does, without noise.

        Raises:
            ValueError: An argument is not allowed; the message names it.
        """
        super().__init__(input_dim, num_experts, top_k=num_experts)
        require(0 <= threshold < 1 / num_experts, "threshold", threshold, f"must be in [0, 1/{num_experts})")
        self.threshold = threshold
        self.dense_eval = dense_eval
        self.register_buffer("temperature", torch.zeros(()))
        self.set_temperature(temperature)

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature; 0 is one expert per unit.

        Raises:
            ValueError: It is negative.
        """
        require(temperature >= 0, "temperature", temperature, "must be 0 or larger")
        self.temperature.fill_(temperature)

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by `x` `(T, D)`."""
        logits = self.logits(units)
        probs = torch.softmax(logits, dim=1)
        best, index = probs.max(dim=1, keepdim=True)
        dense = self.temperature > 0 if self.training else self.dense_eval
        if not dense:
            return self.output(units, index.masked_fill(best == 0, self.num_experts), best, logits=logits, probs=probs)
        noisy = logits - torch.empty_like(logits).exponential_().log() if self.training else None
        # What eval mode asks of a buffer it asks by tensors, so that it exports.
        sparse = self.temperature == 0
        weight = torch.softmax((logits if noisy is None else noisy) / self.temperature.masked_fill(sparse, 1.0), dim=1)
        weight = torch.where(sparse, torch.zeros_like(probs).scatter(1, index, best), weight)
        return self.output_all(units, weight > self.threshold, weight, logits=logits, probs=probs, noisy_logits=noisy)
