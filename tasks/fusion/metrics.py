"""Metrics of image fusion, on 8-bit luminance.

Every image is a tensor `(H, W)` of whole numbers 0 to 255 as `quantize` makes it, one size for a fused image and its
two sources. Computed in double precision. Where a quotient has no value because an image is constant (a correlation, a
visual information fidelity, Qabf of black sources), it is 0: nothing was there to be kept.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

# The nine of `mean_rank`; in each, more is better.
NINE_METRICS = ("EN", "SD", "SF", "AG", "MI", "SCD", "VIF", "Qabf", "SSIM")
METRICS = (
    *NINE_METRICS,
    *("CC", "MS_SSIM", "PSNR"),
    *(f"{name}_{source}" for name in ("MI", "VIF", "Qabf") for source in ("ir", "vi")),
)

# The smallest side that survives the four windows of the visual information fidelity.
MIN_SIDE = 41
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Wang, Simoncelli, Bovik 2003, from fine to coarse.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
VIF_NOISE = 2.0
# Below this a local variance is the rounding error of a flat patch.
FLAT = 1e-8


def quantize(image: Tensor) -> Tensor:
    """Round an image in 0 to 1 to whole numbers 0 to 255; what lies outside is clamped.

    Args:
        image: Any shape.
    """
    return (image.double().clamp(0, 1) * 255).round()


def entropy(image: Tensor) -> Tensor:
    """EN: Shannon entropy of the grey levels, in bits.

    Args:
        image: `(H, W)`.
    """
    return _entropy(torch.bincount(image.flatten().long(), minlength=256))


def standard_deviation(image: Tensor) -> Tensor:
    """SD: the population's standard deviation of the grey levels.

    Args:
        image: `(H, W)`.
    """
    return image.std(correction=0)


def spatial_frequency(image: Tensor) -> Tensor:
    """SF: `sqrt(RF² + CF²)`, the root mean squares of the differences along rows and along columns.

    Args:
        image: `(H, W)`.
    """
    return (image.diff(dim=1).square().mean() + image.diff(dim=0).square().mean()).sqrt()


def average_gradient(image: Tensor) -> Tensor:
    """AG: mean of `sqrt((Gx² + Gy²) / 2)`, central differences inside and one-sided ones at the borders.

    Args:
        image: `(H, W)`.
    """
    vertical, horizontal = torch.gradient(image)
    return ((vertical.square() + horizontal.square()) / 2).sqrt().mean()


def mutual_information(fused: Tensor, source: Tensor) -> Tensor:
    """I(F, A) of the grey levels, in bits: `H(F) + H(A) - H(F, A)`. MI is the sum over both sources.

    Args:
        fused: `(H, W)`.
        source: `(H, W)`.
    """
    joint = torch.bincount((256 * fused + source).flatten().long(), minlength=256**2).view(256, 256)
    return _entropy(joint.sum(0)) + _entropy(joint.sum(1)) - _entropy(joint)


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of two images, 0 if one of them is constant. CC is the mean over both sources.

    Args:
        first: `(H, W)`.
        second: `(H, W)`.
    """
    first, second = first - first.mean(), second - second.mean()
    return _quotient((first * second).sum(), (first.square().sum() * second.square().sum()).sqrt())


def scd(fused: Tensor, infrared: Tensor, visible: Tensor) -> Tensor:
    """SCD: sum of the correlations of differences, `corr(A, F - B) + corr(B, F - A)` (Aslantas, Bendes 2015).

    Args:
        fused: `(H, W)`.
        infrared: `(H, W)`.
        visible: `(H, W)`.
    """
    return correlation(infrared, fused - visible) + correlation(visible, fused - infrared)


def qabf(fused: Tensor, *sources: Tensor) -> Tensor:
    """Qabf: share of the sources' edges that the fused image keeps (Xydeas, Petrovic 2000).

    `sum(Q_AF g_A + Q_BF g_B) / sum(g_A + g_B)`, where g is the strength of a source's Sobel gradient, and Q the
    preservation of its strength and orientation. With one source: how well the edges of that source are kept. As in the
    usual evaluators, the outside of the image counts as black, so the frame is an edge that every fusion keeps; without
    it, values are lower by some hundredths.

    Args:
        fused: `(H, W)`.
        sources: Each `(H, W)`.
    """
    fused_strength, fused_angle = _sobel(fused)
    kept = total = fused.new_zeros(())
    for source in sources:
        strength, angle = _sobel(source)
        # 0 / 0 where both are flat; the weight is 0 there.
        ratio = (torch.minimum(strength, fused_strength) / torch.maximum(strength, fused_strength)).nan_to_num(1.0)
        parallel = 1 - (angle - fused_angle).abs() / (math.pi / 2)
        quality = 0.9994 * torch.sigmoid(15 * (ratio - 0.5)) * 0.9879 * torch.sigmoid(22 * (parallel - 0.8))
        kept = kept + (quality * strength).sum()
        total = total + strength.sum()
    return _quotient(kept, total)


def visual_information_fidelity(fused: Tensor, source: Tensor) -> Tensor:
    """VIFp: information on the source that the fused image holds, over four scales (Sheikh, Bovik 2006; pixel domain).

    Gaussian windows of `N = 2^(5 - s) + 1` pixels and `sigma = N / 5` at scale s = 1 to 4, visual noise of variance 2;
    more than 1 if contrast was raised. VIF is the sum over both sources.

    Args:
        fused: `(H, W)`, at least 41 on each side.
        source: `(H, W)`.
    """
    kept = total = fused.new_zeros(())
    images = torch.stack([source, fused])
    for scale in range(1, 5):
        window = 2 ** (5 - scale) + 1
        if scale > 1:
            images = _blur(images, window, window / 5)[:, ::2, ::2]
        _, (variance, fused_variance), covariance = _moments(images, window, window / 5)
        variance = variance.where(variance > FLAT, 0)
        gain = (covariance / variance.clamp(min=FLAT)).clamp(min=0)
        noise = (fused_variance - gain * covariance).clamp(min=0) + VIF_NOISE
        kept = kept + torch.log1p(gain.square() * variance / noise).sum()
        total = total + torch.log1p(variance / VIF_NOISE).sum()
    return _quotient(kept, total)


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity, Gaussian window of 11 pixels and sigma 1.5, population covariance (Wang et al. 2004).

    The mean over all places where the window lies inside the image. SSIM is the mean over both sources.

    Args:
        first: `(H, W)`, at least 11 on each side.
        second: `(H, W)`.
    """
    return _ssim_terms(torch.stack([first, second]))[0]


def ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    """Multi-scale structural similarity (Wang, Simoncelli, Bovik 2003). MS-SSIM is the mean over both sources.

    Five scales, halved by means of 2 x 2 pixels; an image with a side below 176 has as many as hold the window, their
    weights scaled to the sum 1. A negative mean at any scale counts as 0.

    Args:
        first: `(H, W)`, at least 11 on each side.
        second: `(H, W)`.
    """
    scales = min(len(MS_SSIM_WEIGHTS), int(math.log2(min(first.shape) / SSIM_WINDOW)) + 1)
    weights = MS_SSIM_WEIGHTS[:scales]
    images = torch.stack([first, second])
    product = first.new_ones(())
    for scale, weight in enumerate(weights):
        if scale:
            images = functional.avg_pool2d(images[None], 2)[0]
        similarity, contrast = _ssim_terms(images)
        term = similarity if scale == scales - 1 else contrast
        product = product * term.clamp(min=0) ** (weight / sum(weights))
    return product


def psnr(fused: Tensor, *sources: Tensor) -> Tensor:
    """PSNR: `10 log10(255² / MSE)` in decibel, MSE the mean over the sources; infinite if it equals them all.

    Args:
        fused: `(H, W)`.
        sources: Each `(H, W)`.
    """
    return 10 * torch.log10(255**2 / (fused - torch.stack(sources)).square().mean())


def score(fused: Tensor, infrared: Tensor, visible: Tensor) -> dict[str, float]:
    """All metrics of one fused image.

    Args:
        fused: `(H, W)`, whole numbers 0 to 255, at least 41 on each side.
        infrared: `(H, W)`, likewise.
        visible: `(H, W)`, likewise.

    Returns:
        A number for each of `METRICS`. MI and VIF are sums over both sources, CC, SSIM and MS_SSIM means, Qabf and
        PSNR are defined over both; `MI_ir` and the like compare with one source alone.

    Raises:
        ValueError: Sizes differ or are too small, or values are not whole numbers 0 to 255.
    """
    images = {"fused": fused, "infrared": infrared, "visible": visible}
    _check(images)
    fused, infrared, visible = (image.double() for image in images.values())
    shared = {
        f"{name}_{key}": metric(fused, source)
        for name, metric in (("MI", mutual_information), ("VIF", visual_information_fidelity), ("Qabf", qabf))
        for key, source in (("ir", infrared), ("vi", visible))
    }
    values = shared | {
        "EN": entropy(fused),
        "SD": standard_deviation(fused),
        "SF": spatial_frequency(fused),
        "AG": average_gradient(fused),
        "MI": shared["MI_ir"] + shared["MI_vi"],
        "CC": (correlation(fused, infrared) + correlation(fused, visible)) / 2,
        "SCD": scd(fused, infrared, visible),
        "VIF": shared["VIF_ir"] + shared["VIF_vi"],
        "Qabf": qabf(fused, infrared, visible),
        "SSIM": (ssim(fused, infrared) + ssim(fused, visible)) / 2,
        "MS_SSIM": (ms_ssim(fused, infrared) + ms_ssim(fused, visible)) / 2,
        "PSNR": psnr(fused, infrared, visible),
    }
    return {name: values[name].item() for name in METRICS}


def mean_rank(table: Mapping[str, Mapping[str, float]], metrics: Sequence[str] = NINE_METRICS) -> dict[str, float]:
    """Mean place of each method over metrics in which more is better; 1 is best, ties share the mean of their places.

    Args:
        table: Metrics of each method.
        metrics: Names of the metrics that count.

    Raises:
        ValueError: A method lacks one of the metrics, or it is not a number.
    """
    for method, row in table.items():
        lacking = [metric for metric in metrics if math.isnan(row.get(metric, math.nan))]
        if lacking:
            raise ValueError(f"Cannot rank {method!r}: it has no {', '.join(lacking)}. Needed: {', '.join(metrics)}.")
    places: dict[str, list[float]] = {method: [] for method in table}
    for metric in metrics:
        column = [row[metric] for row in table.values()]
        for method, row in table.items():
            better = sum(value > row[metric] for value in column)
            places[method].append(better + (column.count(row[metric]) + 1) / 2)
    return {method: sum(own) / len(own) for method, own in places.items()}


def _check(images: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(image.shape) for name, image in images.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 2 or min(shape) < MIN_SIDE for shape in shapes.values()):
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"Images must be (H, W), of one size, at least {MIN_SIDE} on each side; found {found}.")
    for name, image in images.items():
        low, high = image.min().item(), image.max().item()
        if not (low >= 0 and high <= 255 and torch.equal(image, image.round())):
            raise ValueError(
                f"Images must hold whole numbers 0 to 255; the {name} image holds {low:g} to {high:g}, not all of them "
                f"such numbers. Pass an image in 0 to 1 through `quantize` first."
            )


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """`numerator / denominator`, 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator, 0)


def _entropy(counts: Tensor) -> Tensor:
    """Shannon entropy in bits of a histogram of any shape."""
    shares = counts[counts > 0].double() / counts.sum()
    return (shares * shares.reciprocal().log2()).sum()


def _sobel(image: Tensor) -> tuple[Tensor, Tensor]:
    """Strength and orientation in -pi/2 to pi/2 of the Sobel gradient, zeros outside the image."""
    padded = functional.pad(image, (1, 1, 1, 1))
    across = padded[:, 2:] - padded[:, :-2]
    horizontal = across[:-2] + 2 * across[1:-1] + across[2:]
    down = padded[2:] - padded[:-2]
    vertical = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    angle = torch.where(horizontal == 0, math.pi / 2, torch.atan(vertical / horizontal))
    return torch.hypot(horizontal, vertical), angle


def _blur(images: Tensor, window: int, sigma: float) -> Tensor:
    """Gaussian means `(N, H - window + 1, W - window + 1)` of all places where the window lies inside."""
    taps = torch.exp(-(torch.arange(window) - window // 2).double().square() / (2 * sigma**2))
    weights = (taps / taps.sum()).tolist()
    for axis in (1, 2):
        length = images.shape[axis] - window + 1
        # Few taps along one axis: sums of shifted images are several times faster than a double-precision convolution.
        blurred = weights[0] * images.narrow(axis, 0, length)
        for start, weight in enumerate(weights[1:], 1):
            blurred.add_(images.narrow(axis, start, length), alpha=weight)
        images = blurred
    return images


def _moments(images: Tensor, window: int, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian local means and variances, each `(2, h, w)`, and the covariance `(h, w)` of two images."""
    moments = _blur(torch.cat([images, images.square(), images[:1] * images[1:]]), window, sigma)
    means = moments[:2]
    return means, (moments[2:4] - means.square()).clamp(min=0), moments[4] - means[0] * means[1]


def _ssim_terms(images: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the structural similarity and of its contrast-structure term."""
    means, variances, covariance = _moments(images, SSIM_WINDOW, SSIM_SIGMA)
    contrast = (2 * covariance + SSIM_C2) / (variances.sum(0) + SSIM_C2)
    luminance = (2 * means[0] * means[1] + SSIM_C1) / (means.square().sum(0) + SSIM_C1)
    return (luminance * contrast).mean(), contrast.mean()
