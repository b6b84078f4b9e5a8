"""By how much scores usually differ: what combines several has to find them alike."""

import torch
from torch import Tensor, nn

# How fast the mean square of a score's differences follows them, once it is the plain mean of as many batches.
MOMENTUM = 0.02
# The least unit that scores are divided by.
LEAST_UNIT = 1e-4


class Units(nn.Module):
    """Of each of T scores the root mean square of its differences between two answers.

    Attributes:
        square: `(T,)`, the running mean of the squared differences.
        batches: Of how many batches.
        value: `(T,)`, the units: ones until `settle`.
    """

    square: Tensor
    batches: Tensor
    value: Tensor

    def __init__(self, count: int) -> None:
        """Begin.

        Args:
            count: T.
        """
        super().__init__()
        self.register_buffer("square", torch.ones(count))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.register_buffer("value", torch.ones(count))

    def forward(self, scores: Tensor) -> Tensor:
        """Scores `(..., T)` in their units."""
        return scores / self.value

    @torch.no_grad()
    def follow(self, differences: Tensor) -> None:
        """Remember by how much scores differ.

        Args:
            differences: `(P, T)` of the scores of the two answers of P pairs.
        """
        self.batches += 1
        self.square.lerp_(differences.square().mean(0), max(MOMENTUM, 1 / self.batches.item()))

    def settle(self) -> None:
        """Divide by what was found from now on."""
        self.value.copy_(self.square.sqrt().clamp(min=LEAST_UNIT))
