"""What a day's scores should be, as losses over its stocks."""

from collections.abc import Callable

import torch
from torch import Tensor

# A spread below this share of the values' size is rounding.
CONSTANT = 1e-6


def ic_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Minus the information coefficient: the Pearson correlation of scores and labels over the stocks of one day.

    It does not depend on the scores' scale, so days must not be mixed. A day that teaches nothing, since fewer than
    three stocks have labels or since scores or labels are all the same, gives 0 with a gradient of 0.

    Args:
        scores: `(N,)`.
        labels: `(N,)`; stocks whose label is not finite are left out.

    Returns:
        A scalar in -1..1.
    """
    known = torch.isfinite(labels)
    x, y = deviations(scores[known]), deviations(labels[known])
    power = x.square().sum() * y.square().sum()
    if len(x) < 3 or not bool(power > 0):
        return 0.0 * scores.sum()
    return -(x @ y) / power.sqrt()


def mse_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error over the stocks with a finite label, 0 with a gradient of 0 if there is none.

    Args:
        scores: `(N,)`.
        labels: `(N,)`.
    """
    known = torch.isfinite(labels)
    if not bool(known.any()):
        return 0.0 * scores.sum()
    return (scores[known] - labels[known]).square().mean()


def deviations(values: Tensor) -> Tensor:
    """Differences from the mean, zeros where they are rounding; `(N,)`."""
    centred = values - values.mean()
    constant = centred.norm() <= CONSTANT * values.norm()
    return torch.where(constant, torch.zeros_like(centred), centred)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ic": ic_loss, "mse": mse_loss}
