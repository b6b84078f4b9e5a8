"""Two experts and a threshold: the default one answers unless the gate is sure enough of the other."""

import torch
from torch import Tensor, nn

from zoo.moe.routers.base import Router, forbid, linear_fp32, require
from zoo.moe.routing import RouterInput, RoutingOutput


class ThresholdRouter(Router):
    """Hard binary routing (Zhang, Davoodi and Hu 2018): column 0 is fixed at logit 0, column 1 is the gate.

    Expert 1 is chosen where `sigmoid(gate) > threshold`. Threshold 1 therefore never chooses it, and a layer with
    `combine="select"` equals its expert 0 exactly; any other combiner weighs the expert by its probability. The
    threshold is a buffer, so that it can be chosen after training and is saved.
    """

    threshold: Tensor

    def __init__(self, input_dim: int = 1, threshold: float = 0.5, gate: nn.Module | None = None) -> None:
        """Build the router.

        Args:
            input_dim: D of the router input; read only where `gate` is None.
            threshold: Probability above which expert 1 is chosen.
            gate: Called as `gate(x, expert_output)`, returns `(T, 1)` logits. None is `Linear(input_dim, 1)` on x.

        Raises:
            ValueError: The threshold is no probability.
        """
        super().__init__(num_experts=2, top_k=1)
        require(0 <= threshold <= 1, "threshold", threshold, "must be a probability in [0, 1]")
        self.gate = gate if gate is not None else LinearGate(input_dim)
        self.register_buffer("threshold", torch.tensor(float(threshold)))

    def route(self, units: RouterInput) -> RoutingOutput:
        """Route T units by `x` `(T, D)` and, where the gate reads it, by `expert_output`."""
        gate = self.gate(units.x, units.expert_output).float()
        logits = forbid(torch.cat([torch.zeros_like(gate), gate], dim=1), units.expert_mask)
        probs = torch.softmax(logits, dim=1)
        index = (probs[:, 1:] > self.threshold).long()
        if units.expert_mask is not None:
            index = torch.where(logits.gather(1, index) == float("-inf"), 1 - index, index)
        return self.output(units, index, probs.gather(1, index), logits=logits, probs=probs)


class LinearGate(nn.Module):
    """One logit per unit from the router input alone."""

    def __init__(self, input_dim: int) -> None:
        """Build the gate on `input_dim` features."""
        super().__init__()
        self.linear = nn.Linear(input_dim, 1)

    def forward(self, x: Tensor, expert_output: Tensor | None) -> Tensor:
        """Map `x` `(T, D)` to `(T, 1)`."""
        return linear_fp32(x, self.linear.weight, self.linear.bias)
