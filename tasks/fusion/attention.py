"""Where the foreground is: attention maps that split features in two, from nothing but the images, or from boxes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Standard deviations, as shares of the shorter side, of the blurs that saliency takes an image's local mean from.
SURROUNDINGS = (1 / 8, 1 / 16)


class SaliencyAttention(nn.Module):
    """How much a pixel stands out from its surroundings, in either band; needs neither boxes nor training.

    After frequency-tuned saliency (Achanta et al. 2009), with a local mean in place of the image's: a person is warmer
    than the street around, whatever the sky does. Brighter counts fully in the infrared band, where targets are hot;
    in the visible band only what is bright in the dark (lamps) stands out.
    """

    def forward(self, infrared: Tensor, visible: Tensor) -> Tensor:
        """Map two bands `(B, 1, H, W)`, 0..1, to attention of the same shape, 0..1."""
        maps = [self.contrast(band) for band in (infrared, visible)]
        return torch.maximum(*maps)

    def contrast(self, band: Tensor) -> Tensor:
        """What is brighter than its surroundings, over three standard deviations of that difference."""
        side = min(band.shape[-2:])
        above = sum(((band - blur(band, share * side)).clamp(min=0) for share in SURROUNDINGS), torch.zeros_like(band))
        spread = above.square().mean((1, 2, 3), keepdim=True).sqrt()
        return (above / (3 * spread + 0.02)).clamp(max=1)


def blur(image: Tensor, radius: float) -> Tensor:
    """Local means of `(B, 1, H, W)` over squares of about `2 * radius`; the border counts only what is inside.

    Computed on a grid as coarse as the radius allows, as a large kernel would cost more than the network.
    """
    cell = max(1, int(radius / 4))
    coarse = nn.functional.avg_pool2d(image, cell, ceil_mode=True, count_include_pad=False)
    reach = [min(max(1, round(radius / cell)), (side - 1) // 2) for side in coarse.shape[-2:]]
    kernel = [2 * side + 1 for side in reach]
    means = nn.functional.avg_pool2d(coarse, kernel, 1, reach, count_include_pad=False)
    smooth: Tensor = nn.functional.interpolate(means, image.shape[-2:], mode="bilinear", align_corners=False)
    return smooth


def box_attention(boxes: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Ones inside boxes, each pixel that a box touches.

    Args:
        boxes: For each image `(N, 4)`, x1 y1 x2 y2 in its pixels.
        size: H and W.

    Returns:
        `(B, 1, H, W)`.

    Raises:
        ValueError: A box ends before it begins.
    """
    height, width = size
    attention = torch.zeros(len(boxes), 1, height, width)
    for place, own in enumerate(boxes):
        if not (own[:, :2] < own[:, 2:]).all():
            raise ValueError(f"Boxes {own.tolist()} of image {place}: x1 < x2 and y1 < y2 must hold.")
        corners = torch.cat([own[:, :2].floor(), own[:, 2:].ceil()], 1).clamp(min=0).long().tolist()
        for left, top, right, bottom in corners:
            attention[place, 0, top:bottom, left:right] = 1
    return attention
