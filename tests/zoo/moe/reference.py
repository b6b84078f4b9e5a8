"""The slow and obvious Mixture of Experts that everything is compared with."""

import torch
from torch import Tensor

from zoo.moe import GroupedExperts, RoutingOutput
from zoo.moe.activations import ACTIVATIONS


def expert_output(experts: GroupedExperts, expert: int, unit: Tensor) -> Tensor:
    """One expert on one unit, with matrix-vector products only."""
    hidden = experts.up_proj[expert] @ unit
    if experts.up_bias is not None:
        hidden = hidden + experts.up_bias[expert]
    act = ACTIVATIONS[experts.activation]
    if experts.gated:
        hidden = act(hidden[: experts.hidden_dim]) * hidden[experts.hidden_dim :]
    else:
        hidden = act(hidden)
    out = experts.down_proj[expert] @ hidden
    return out if experts.down_bias is None else out + experts.down_bias[expert]


def double_loop(experts: GroupedExperts, x: Tensor, routing: RoutingOutput) -> Tensor:
    """Weighted sum over slots, unit by unit and slot by slot; x is `(T, D)`."""
    rows = []
    for unit, index, weight in zip(x, routing.expert_index.tolist(), routing.expert_weight, strict=True):
        total = torch.zeros(experts.out_dim, dtype=x.dtype)
        for slot, expert in enumerate(index):
            if expert < experts.num_experts:
                total = total + weight[slot].to(x.dtype) * expert_output(experts, expert, unit)
        rows.append(total)
    return torch.stack(rows) if rows else x.new_zeros(0, experts.out_dim)
