"""Fusion without parameters: what a trained model has to beat.

Each is a function of an infrared and a visible luminance image, `(B, 1, H, W)` in 0 to 1, of any size.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Burt and Adelson 1983, with a = 0.375.
TAPS = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


LEVELS = 4


def average(infrared: Tensor, visible: Tensor) -> Tensor:
    """Mean of both."""
    return (infrared + visible) / 2


def maximum(infrared: Tensor, visible: Tensor) -> Tensor:
    """The brighter pixel."""
    return torch.maximum(infrared, visible)


def laplacian(infrared: Tensor, visible: Tensor) -> Tensor:
    """Laplacian pyramid of four levels: at each place the detail of larger magnitude, and the mean of both bases.

    Burt, Adelson 1983, The Laplacian pyramid as a compact image code. Borders are mirrored; an image with a side below
    17 has fewer levels.
    """
    details = []
    for _ in range(LEVELS):
        if min(visible.shape[-2:]) <= len(TAPS) // 2:
            break  # nothing left to mirror
        coarse_infrared, coarse_visible = _reduce(infrared), _reduce(visible)
        hot, bright = infrared - _expand(coarse_infrared, infrared), visible - _expand(coarse_visible, visible)
        details.append(torch.where(hot.abs() > bright.abs(), hot, bright))
        infrared, visible = coarse_infrared, coarse_visible
    fused = average(infrared, visible)
    for detail in reversed(details):
        fused = detail + _expand(fused, detail)
    return fused.clamp(0, 1)


def visible(infrared: Tensor, visible: Tensor) -> Tensor:
    """The visible image alone."""
    return visible


def infrared(infrared: Tensor, visible: Tensor) -> Tensor:
    """The infrared image alone."""
    return infrared


BASELINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "average": average,
    "max": maximum,
    "laplacian": laplacian,
    "visible": visible,
    "infrared": infrared,
}


def _blur(image: Tensor) -> Tensor:
    taps = image.new_tensor(TAPS)
    padded = functional.pad(image, (len(TAPS) // 2,) * 4, mode="reflect")
    return functional.conv2d(padded, torch.outer(taps, taps)[None, None])


def _reduce(image: Tensor) -> Tensor:
    """Blur and keep every second pixel, `(B, 1, ceil(H / 2), ceil(W / 2))`."""
    return _blur(image)[..., ::2, ::2]


def _expand(coarse: Tensor, like: Tensor) -> Tensor:
    """Interpolate a reduced image to the size of the one that it was reduced from."""
    sparse = torch.zeros_like(like)
    sparse[..., ::2, ::2] = coarse
    return 4 * _blur(sparse)
