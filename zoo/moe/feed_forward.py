"""The dense feed-forward network, and mixtures made from one."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.errors import UnknownNameError
from zoo.moe.activations import ACTIVATIONS
from zoo.moe.experts import GroupedExperts
from zoo.moe.routers.base import require


class FeedForward(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))`: what one expert of `GroupedExperts` computes."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        out_dim: int | None = None,
        activation: Literal["silu", "gelu", "relu", "tanh", "identity"] = "silu",
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        """Build the network; the arguments are those of `GroupedExperts`.

        Args:
            dim: D.
            hidden_dim: H.
            out_dim: Width of the output; D if left out.
            activation: Name of the nonlinearity.
            gated: Whether a gate multiplies the hidden units.
            bias: Whether the projections have biases.

        Raises:
            UnknownNameError: No activation of that name.
        """
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UnknownNameError("activation", activation, ACTIVATIONS)
        self.activation: Literal["silu", "gelu", "relu", "tanh", "identity"] = activation
        self.gate_proj = nn.Linear(dim, hidden_dim, bias) if gated else None
        self.up_proj = nn.Linear(dim, hidden_dim, bias)
        self.down_proj = nn.Linear(hidden_dim, out_dim or dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(*lead, D)` to `(*lead, out)`."""
        act = ACTIVATIONS[self.activation]
        hidden = act(self.up_proj(x)) if self.gate_proj is None else act(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.down_proj(hidden)
        return out

    @classmethod
    def from_linears(
        cls, up: nn.Linear, down: nn.Linear, gate: nn.Linear | None = None, activation: str = "silu"
    ) -> "FeedForward":
        """View the linear layers of another network (timm, transformers) as a `FeedForward`; weights are shared.

        Raises:
            ValueError: Some of the layers have a bias and others have not.
        """
        layers = [layer for layer in (up, down, gate) if layer is not None]
        biased = [layer.bias is not None for layer in layers]
        require(len(set(biased)) == 1, "bias", biased, "must be the same for all layers")
        dense = cls(
            up.in_features,
            up.out_features,
            out_dim=down.out_features,
            activation=activation,  # type: ignore[arg-type]
            gated=gate is not None,
            bias=biased[0],
        )
        dense.gate_proj, dense.up_proj, dense.down_proj = gate, up, down
        return dense

    def experts(self, num_experts: int, hidden_dim: int) -> GroupedExperts:
        """Experts of this kind, with other sizes and weights of their own."""
        return GroupedExperts(
            num_experts,
            self.up_proj.in_features,
            hidden_dim,
            out_dim=self.down_proj.out_features,
            activation=self.activation,
            gated=self.gate_proj is not None,
            bias=self.up_proj.bias is not None,
        ).to(self.up_proj.weight)


@torch.no_grad()
def split_dense_mlp(dense: FeedForward, num_experts: int) -> GroupedExperts:
    """Cut a dense network into experts whose sum is that network (UoE, Yang et al. 2025, arXiv 2503.02495).

    Each expert gets an equal part of the hidden units and of the output bias. `DenseRouter(num_experts)` gives the
    network itself; a router that leaves experts out gives a part of it.

    Args:
        dense: The network; it is copied.
        num_experts: E, a divisor of H.

    Raises:
        ValueError: H is not divisible.
    """
    hidden_dim = dense.up_proj.out_features
    require(
        num_experts >= 1 and hidden_dim % num_experts == 0, "num_experts", num_experts, f"must divide H={hidden_dim}"
    )
    experts = dense.experts(num_experts, hidden_dim // num_experts)
    up = [layer for layer in (dense.gate_proj, dense.up_proj) if layer is not None]
    experts.up_proj.copy_(torch.cat([layer.weight.unflatten(0, (num_experts, -1)) for layer in up], dim=1))
    experts.down_proj.copy_(dense.down_proj.weight.unflatten(1, (num_experts, -1)).transpose(0, 1))
    if experts.up_bias is not None and experts.down_bias is not None:
        experts.up_bias.copy_(torch.cat([layer.bias.unflatten(0, (num_experts, -1)) for layer in up], dim=1))
        experts.down_bias.copy_((dense.down_proj.bias / num_experts).expand(num_experts, -1))
    return experts


@torch.no_grad()
def upcycle_dense_mlp(dense: FeedForward, num_experts: int) -> GroupedExperts:
    """Copy a dense network into every expert (Komatsuzaki et al. 2022, arXiv 2212.05055).

    A mixture of them with weights that sum to 1 starts as the dense network. Equal experts part only by what they are
    sent; `diversify_experts` helps.

    Args:
        dense: The network.
        num_experts: E.
    """
    experts = dense.experts(num_experts, dense.up_proj.out_features)
    whole = split_dense_mlp(dense, 1)
    for name, parameter in experts.named_parameters():
        parameter.copy_(whole.get_parameter(name).expand_as(parameter))
    return experts


@torch.no_grad()
def diversify_experts(experts: GroupedExperts, ratio: float, generator: torch.Generator | None = None) -> None:
    """Draw a random part of every expert's weights anew, another part in each (EvoMoE, Nie et al. 2021).

    Args:
        experts: Changed in place, biases excepted.
        ratio: Share of the weights that are drawn anew, in [0, 1].
        generator: Draws on the CPU; torch's own by default.

    Raises:
        ValueError: The ratio is no share.
    """
    require(0 <= ratio <= 1, "ratio", ratio, "must be in [0, 1]")
    for weight, fan_in in ((experts.up_proj, experts.dim), (experts.down_proj, experts.hidden_dim)):
        fresh = (2 * torch.rand(weight.shape, generator=generator) - 1) / math.sqrt(fan_in)
        chosen = torch.rand(weight.shape, generator=generator) < ratio
        weight.copy_(torch.where(chosen.to(weight.device), fresh.to(weight), weight))
