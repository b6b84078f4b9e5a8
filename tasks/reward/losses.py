"""Losses of preference pairs; a positive difference says that the chosen answer is the better one."""

import torch
from torch import Tensor, nn


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The mean of `-log sigmoid(chosen - rejected)` (Bradley and Terry 1952; Ouyang et al. 2022).

    Args:
        chosen: Rewards of the better answers, any shape.
        rejected: Of the others, the same shape.

    Raises:
        ValueError: There is no pair.
    """
    if not chosen.numel():
        raise ValueError("There is no pair to compute a loss of.")
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def capability_loss(chosen: Tensor, rejected: Tensor, preferences: Tensor) -> Tensor:
    """The Bradley-Terry loss of each capability over the pairs that it is clear on, summed over capabilities.

    Summed, since experts share nothing that is trained: each then learns as if it were alone.

    Args:
        chosen: `(B, T)` scores of the chosen answers.
        rejected: `(B, T)` of the rejected ones.
        preferences: `(B, T)`: 1 where the chosen answer is better in the capability, -1 the rejected, 0 unclear.
    """
    clear = preferences != 0
    losses = -nn.functional.logsigmoid((chosen - rejected) * preferences)
    total = torch.where(clear, losses, 0.0).sum(0)
    return (total / clear.sum(0).clamp(min=1)).sum()
