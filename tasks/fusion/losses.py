"""What a fused image should be, as losses on luminance 0..1; each is 0 or small for a good image."""

import torch
from torch import Tensor, nn

SIGMA = 1.5
WINDOW = 11
# SSIM's constants for a range of 1 (Wang et al. 2004).
C1, C2 = 0.01**2, 0.03**2


def gradient_loss(fused: Tensor, infrared: Tensor, visible: Tensor, gain: float = 1.0) -> Tensor:
    """Mean distance of the fused image's Sobel derivatives to those of the source that has the steeper edge there.

    MoE-Fusion compares sums of absolute derivatives, which an inverted edge satisfies as well; signs count here.

    Args:
        fused: `(B, 1, H, W)`.
        infrared: The same shape.
        visible: The same shape.
        gain: Factor on the sources' derivatives; above 1 the fused image is sharper than they are.
    """
    drawn, warm, bright = (sobel(image) for image in (fused, infrared, visible))
    steeper = warm.square().sum(1, keepdim=True) > bright.square().sum(1, keepdim=True)
    return (drawn - gain * torch.where(steeper, warm, bright)).abs().mean()


def edge_loss(fused: Tensor, infrared: Tensor, visible: Tensor) -> Tensor:
    """One minus Qabf (Xydeas and Petrovic 2000): the share of the sources' edges, by strength and direction, not kept.

    The angle is compared by its cosine, so that it has a gradient everywhere.
    """
    drawn = sobel(fused)
    strength = drawn.norm(dim=1) + 1e-4
    kept, total = torch.zeros(()), torch.zeros(())
    for source in (infrared, visible):
        edges = sobel(source)
        weight = edges.norm(dim=1)
        ratio = torch.minimum(strength, weight) / torch.maximum(strength, weight)
        parallel = (drawn * edges).sum(1) / (strength * (weight + 1e-4))
        quality = torch.sigmoid(15 * (ratio - 0.5)) * torch.sigmoid(10 * (parallel - 0.8))
        kept, total = kept + (weight * quality).sum(), total + weight.sum()
    return 1 - kept / total.clamp(min=1e-6)


def pixel_loss(fused: Tensor, infrared: Tensor, visible: Tensor, attention: Tensor) -> Tensor:
    """Foreground like the brighter source, background like the mean of both (MoE-Fusion, its detection-crop loss).

    Args:
        fused: `(B, 1, H, W)`.
        infrared: The same shape.
        visible: The same shape.
        attention: The same shape, 1 is foreground; without gradient.
    """
    target = torch.lerp((infrared + visible) / 2, torch.maximum(infrared, visible), attention.detach())
    return (fused - target).abs().mean()


def similarity_loss(fused: Tensor, infrared: Tensor, visible: Tensor) -> Tensor:
    """One minus the mean structural similarity to both sources (Wang et al. 2004; Gaussian window, sigma 1.5)."""
    return 1 - (similarity(fused, infrared) + similarity(fused, visible)) / 2


def difference_loss(fused: Tensor, infrared: Tensor, visible: Tensor) -> Tensor:
    """Two minus the sum of correlations of differences (Aslantas and Bendes 2015), averaged over images.

    What the fused image has beyond one source should be what the other source shows.
    """
    correlations = correlation(fused - visible, infrared) + correlation(fused - infrared, visible)
    return 2 - correlations.mean()


def range_loss(fused: Tensor) -> Tensor:
    """Mean square of what an 8-bit image cannot hold: below 0 and above 1."""
    return (fused - fused.detach().clamp(0, 1)).square().mean()


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of `(B, 1, H, W)` over pixels: `(B,)`."""
    first, second = (image.flatten(1) - image.flatten(1).mean(1, keepdim=True) for image in (first, second))
    norms = first.square().sum(1) * second.square().sum(1)
    return (first * second).sum(1) / (norms + 1e-12).sqrt()


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Mean structural similarity of `(B, 1, H, W)`, where the whole window lies inside."""
    products = torch.cat([first, second, first * first, second * second, first * second])
    mean1, mean2, square1, square2, product = smooth(products).chunk(5)
    luminance = (2 * mean1 * mean2 + C1) / (mean1**2 + mean2**2 + C1)
    contrast = (2 * (product - mean1 * mean2) + C2) / (square1 - mean1**2 + square2 - mean2**2 + C2)
    return (luminance * contrast).mean()


def smooth(images: Tensor) -> Tensor:
    """Gaussian means of `(B, 1, H, W)`, only where the whole window lies inside."""
    offsets = torch.arange(WINDOW, device=images.device, dtype=images.dtype) - WINDOW // 2
    kernel = torch.softmax(-offsets.square() / (2 * SIGMA**2), 0)
    rows = nn.functional.conv2d(images, kernel.view(1, 1, 1, -1))
    return nn.functional.conv2d(rows, kernel.view(1, 1, -1, 1))


def sobel(images: Tensor) -> Tensor:
    """Horizontal and vertical derivatives per pixel: `(B, 1, H, W)` to `(B, 2, H - 2, W - 2)`."""
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=images.device) / 8
    return nn.functional.conv2d(images, torch.stack([across, across.T])[:, None])
