"""Networks of customization, plain torch: the global expert, and the mixture that a user's device completes."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.errors import UnknownNameError

# Mean and standard deviation of EMNIST ByClass's pixels in 0..1.
PIXEL_MEAN, PIXEL_STD = 0.1736, 0.3317

# Channels of the two convolutions, widths of the hidden layers, padding of the first convolution.
VARIANTS: dict[str, tuple[tuple[int, int], tuple[int, ...], int]] = {
    "lenet5": ((6, 16), (120, 84), 2),
    "lenet-large": ((20, 50), (500,), 0),
}


class LeNet(nn.Module):
    """The global expert: LeNet-5 (LeCun et al. 1998) with ReLU and max pooling, or the larger 20-50-500 LeNet.

    64,851 parameters and 419,628 multiply-accumulates for `lenet5`, 449,617 and 2,311,500 for `lenet-large` (47
    classes).
    """

    def __init__(self, variant: Literal["lenet5", "lenet-large"] = "lenet5", num_classes: int = 47) -> None:
        """Build the network.

        Args:
            variant: `lenet5` (6-16-120-84) or `lenet-large` (20-50-500).
            num_classes: Width of the output.

        Raises:
            UnknownNameError: No variant of that name.
        """
        super().__init__()
        if variant not in VARIANTS:
            raise UnknownNameError("LeNet variant", variant, VARIANTS)
        (first, second), hidden, padding = VARIANTS[variant]
        self.variant = variant
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(1, first, 5, padding=padding)
        self.conv2 = nn.Conv2d(first, second, 5)
        side = 5 if padding else 4
        widths = [second * side * side, *hidden, num_classes]
        self.linears = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths))

    def forward(self, images: Tensor) -> Tensor:
        """Classify images `(N, 1, 28, 28)` in 0..1: logits `(N, num_classes)`."""
        return self.stages(images)[-1]

    def stages(self, images: Tensor) -> list[Tensor]:
        """All that is worth reading on the way: both pooled maps, every hidden layer, the logits.

        Args:
            images: `(N, 1, 28, 28)` in 0..1.

        Returns:
            Maps `(N, C1, h, w)`, `(N, C2, h, w)`, hidden layers `(N, width)` after ReLU, logits.
        """
        pooled1 = nn.functional.max_pool2d(torch.relu(self.conv1((images - PIXEL_MEAN) / PIXEL_STD)), 2)
        pooled2 = nn.functional.max_pool2d(torch.relu(self.conv2(pooled1)), 2)
        out = [pooled1, pooled2]
        hidden = pooled2.flatten(1)
        for linear in self.linears[:-1]:
            hidden = torch.relu(linear(hidden))
            out.append(hidden)
        return [*out, self.linears[-1](hidden)]
