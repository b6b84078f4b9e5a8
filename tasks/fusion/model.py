"""MoE-Fusion: encoders of two bands, mixtures of local experts before and behind the attention, global experts after.

Plain torch. All features have half the resolution of the images: `PixelUnshuffle` in, `PixelShuffle` out.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tasks.fusion.attention import SaliencyAttention
from tasks.fusion.detector import DetectorAttention
from zoo.errors import UnknownNameError
from zoo.moe import ModuleExperts, MoELayer, NoisyTopKRouter, RoutingOutput

STRIDE = 2
PIXELS = STRIDE**2
# Pixels of repeated border around an image, so that the zeros that convolutions see outside leave no frame.
MARGIN = 8
# The gates look at every fourth feature, as in the paper.
GRID = 4
# Infrared and visible, in this order wherever both bands come together.
BANDS = 2
ATTENTION = ("saliency", "boxes", "detector")


@dataclass(slots=True)
class Fusion:
    """What the model gives.

    Attributes:
        fused: `(B, 1, H, W)` luminance; values may leave 0..1 a little.
        attention: `(B, 1, H, W)`, 1 is foreground.
        routing: Decisions of the mixtures by name (`foreground`, `background`, `whole`); none of a twin.
    """

    fused: Tensor
    attention: Tensor
    routing: dict[str, RoutingOutput]


class Encoder(nn.Module):
    """Four densely connected 3 x 3 convolutions over one band, each with a ReLU."""

    def __init__(self, channels: int) -> None:
        """Build them.

        Args:
            channels: C of each.
        """
        super().__init__()
        self.first = conv(PIXELS, channels)
        self.dense = nn.ModuleList(conv(depth * channels, channels) for depth in (1, 2, 3))

    def forward(self, band: Tensor) -> list[Tensor]:
        """Map `(B, 4, h, w)` to four features `(B, C, h, w)`."""
        features = [torch.relu(self.first(band))]
        for layer in self.dense:
            features.append(torch.relu(layer(torch.cat(features, 1))))
        return features


class MoEFusion(nn.Module):
    """MoE-Fusion (Sun et al. 2023, ICCV) at half resolution, with pooled gates.

    Each band has a dense encoder. Attention splits their last features into foreground and background; each part goes
    to a mixture of local experts (MoLE), half of which read the infrared features and half the visible ones. All
    features together go to a mixture of global experts (MoGE), each of which draws a whole image. Noisy top-k gates see
    pooled features of both bands and choose once per image; experts are combined by logsumexp. The experts draw what
    is added to the mean of both bands, so that an untrained network averages.

    Called with two bands it returns the fused luminance alone; `fuse` tells more.
    """

    def __init__(
        self,
        channels: int = 16,
        num_experts: int = 4,
        top_k: int = 2,
        local_dim: int = 8,
        global_dim: int = 32,
        one_per_band: bool = True,
        attention: Literal["saliency", "boxes", "detector"] = "saliency",
        classes: list[str] | None = None,
        balance: float = 0.01,
        mixture: bool = True,
    ) -> None:
        """Build the network.

        Args:
            channels: C of every feature.
            num_experts: E of each mixture, half for each band in the local ones.
            top_k: K, experts chosen for an image.
            local_dim: Channels inside a local expert.
            global_dim: Channels of a global expert's first convolution; its second has half as many.
            one_per_band: Whether the local gates always choose at least one expert of each band.
            attention: `saliency` is computed from both bands; `boxes` must be given with every pair; `detector` is what
                two detectors look at that learn from boxes in training and need none afterwards.
            classes: Names of what the detectors look for.
            balance: Coefficient of each mixture's importance and load losses.
            mixture: False builds the twin: one expert of equal active size in place of each mixture.

        Raises:
            ValueError: The local experts cannot be halved, too few are chosen for one of each band, there is no such
                attention, or classes without a detector or the reverse.
        """
        if attention not in ATTENTION:
            raise UnknownNameError("attention", attention, ATTENTION)
        if bool(classes) != (attention == "detector"):
            raise ValueError(f"attention={attention!r}, classes={classes}: a detector needs classes, others have none.")
        super().__init__()
        if num_experts % BANDS or (one_per_band and top_k < BANDS):
            raise ValueError(
                f"num_experts={num_experts}, top_k={top_k}: local experts need an even number, and one_per_band "
                f"needs top_k of at least {BANDS}."
            )
        self.channels = channels
        self.num_experts = num_experts
        self.top_k = top_k
        self.local_dim = local_dim
        self.global_dim = global_dim
        self.one_per_band = one_per_band
        self.attention = attention
        self.classes = classes
        self.balance = balance
        self.mixture = mixture
        self.saliency = SaliencyAttention()
        self.encoders = nn.ModuleList(Encoder(channels) for _ in range(BANDS))
        self.foreground = self.local_mixture()
        self.background = self.local_mixture()
        self.whole = self.global_mixture()
        # Images differ little in what they pool to: without this all of them choose the same experts.
        dims = {"foreground": BANDS * channels, "background": BANDS * channels, "whole": self.whole_dim}
        norms = {name: nn.BatchNorm1d(2 * dim, affine=False) for name, dim in dims.items() if mixture}
        self.gate_norms = nn.ModuleDict(norms)
        self.detector = DetectorAttention(classes) if classes else None

    @property
    def whole_dim(self) -> int:
        """Channels that the global experts read."""
        return (4 * BANDS + 2) * self.channels + PIXELS

    def local_mixture(self) -> nn.Module:
        """Experts that read one band each, or the twin's one expert that reads both."""
        channels, hidden = self.channels, self.local_dim
        if not self.mixture:
            active = self.top_k * hidden * 2 * channels
            return LocalExpert(BANDS * channels, round(active / ((BANDS + 1) * channels)), channels)
        dim = 2 * BANDS * channels
        router = NoisyTopKRouter(
            dim,
            self.num_experts,
            self.top_k,
            num_groups=BANDS,
            min_per_group=int(self.one_per_band),
            init_std=dim**-0.5,
        )
        experts = [LocalExpert(channels, hidden, channels) for _ in range(self.num_experts)]
        stream = [band for band in range(BANDS) for _ in range(self.num_experts // BANDS)]
        return self.layer(router, ModuleExperts(experts, stream, unit_ndims=(3, 3)))

    def global_mixture(self) -> nn.Module:
        """Experts that read all features."""
        dim, width = self.whole_dim, self.global_dim
        if not self.mixture:
            return GlobalExpert(dim, equal_width(dim, width, self.top_k))
        router = NoisyTopKRouter(2 * dim, self.num_experts, self.top_k, init_std=(2 * dim) ** -0.5)
        return self.layer(
            router, ModuleExperts([GlobalExpert(dim, width) for _ in range(self.num_experts)], None, (3,))
        )

    def layer(self, router: NoisyTopKRouter, experts: ModuleExperts) -> MoELayer:
        """A mixture combined by logsumexp, with the balance losses of Shazeer et al. 2017."""
        losses = {"importance": self.balance, "load": self.balance}
        return MoELayer(router, experts, combine="logsumexp", aux_losses=losses)

    def forward(self, infrared: Tensor, visible: Tensor, attention: Tensor | None = None) -> Tensor:
        """Fuse two bands `(B, 1, H, W)`, 0..1, to luminance of the same shape, 0..1; arguments as those of `fuse`."""
        return self.fuse(infrared, visible, attention).fused.clamp(0, 1)

    def fuse(self, infrared: Tensor, visible: Tensor, attention: Tensor | None = None) -> Fusion:
        """Fuse two bands, and say how.

        Args:
            infrared: `(B, 1, H, W)`, 0..1; any size.
            visible: The same of the visible band's luminance.
            attention: `(B, 1, H, W)` to use in place of the model's own, e.g. `box_attention`.

        Raises:
            ValueError: The bands differ in shape, or a model of `boxes` is given no attention.
        """
        if infrared.shape != visible.shape or infrared.ndim != 4 or infrared.shape[1] != 1:
            raise ValueError(
                f"infrared has shape {tuple(infrared.shape)} and visible {tuple(visible.shape)}: "
                "both must be (B, 1, H, W) and alike."
            )
        height, width = infrared.shape[-2:]
        if attention is None:
            attention = self.attend(infrared, visible)
        bands, padded = pad(torch.cat([infrared, visible, attention], 1)).split([BANDS, 1], 1)
        drawn, routing = self.draw(bands, nn.functional.avg_pool2d(padded, STRIDE))
        fused = (infrared + visible) / 2 + drawn[..., MARGIN : MARGIN + height, MARGIN : MARGIN + width]
        return Fusion(fused, attention, routing)

    def attend(self, infrared: Tensor, visible: Tensor) -> Tensor:
        """The model's own attention.

        Raises:
            ValueError: It has none.
        """
        if self.attention == "boxes":
            raise ValueError("attention='boxes': pass attention=box_attention(boxes, size), or load a saliency model.")
        attention: Tensor = (self.detector or self.saliency)(infrared, visible)
        return attention

    def draw(self, bands: Tensor, attention: Tensor) -> tuple[Tensor, dict[str, RoutingOutput]]:
        """What is added to the mean of both bands.

        Args:
            bands: `(B, 2, H, W)`, sides divisible by the stride.
            attention: `(B, 1, H / 2, W / 2)`.
        """
        routing: dict[str, RoutingOutput] = {}
        # The layout in which CPU convolutions need no reordering.
        small = (
            nn.functional.pixel_unshuffle(bands, STRIDE).contiguous(memory_format=torch.channels_last).split(PIXELS, 1)
        )
        features = [encoder(band) for encoder, band in zip(self.encoders, small, strict=True)]
        last = [own[-1] for own in features]
        parts = []
        for name, share in (("foreground", attention), ("background", 1 - attention)):
            parts.append(self.mix(name, [band * share for band in last], routing))
        everything = torch.cat([*features[0], *features[1], *parts, (small[0] - small[1]) / 2], 1)
        return self.mix("whole", [everything], routing), routing

    def mix(self, name: str, streams: list[Tensor], routing: dict[str, RoutingOutput]) -> Tensor:
        """Run a mixture, or the twin's expert, and note what the gate decided."""
        mixture = getattr(self, name)
        if not self.mixture:
            out: Tensor = mixture(torch.cat(streams, 1))
            return out
        seen = self.gate_norms[name](torch.cat([pool(stream) for stream in streams], 1))
        out, routing[name] = mixture(
            streams if len(streams) > 1 else streams[0], router_input=seen, return_routing=True
        )
        return out


class LocalExpert(nn.Sequential):
    """Two convolutions."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        """Build them."""
        super().__init__(conv(inputs, hidden), nn.ReLU(), conv(hidden, outputs))


class GlobalExpert(nn.Module):
    """Three convolutions that draw an image of twice the resolution: a share of the bands' difference, and a rest.

    The share lets details of either band through as they are; both are near zero at first.
    """

    def __init__(self, inputs: int, width: int) -> None:
        """Build them.

        Args:
            inputs: Channels of all features.
            width: Channels of the first; the second has half as many.
        """
        super().__init__()
        last = conv(width // 2, 2 * PIXELS)
        nn.init.normal_(last.weight, std=1e-3)
        self.layers = nn.Sequential(
            conv(inputs, width),
            nn.ReLU(),
            conv(width, width // 2),
            nn.ReLU(),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map features, the difference of the bands last, `(B, C + 4, h, w)` to `(B, 1, 2 h, 2 w)`."""
        share, rest = self.layers(x).chunk(2, 1)
        drawn: Tensor = nn.functional.pixel_shuffle(share * x[:, -PIXELS:] + rest, STRIDE)
        return drawn


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def pool(features: Tensor) -> Tensor:
    """Mean and standard deviation over a coarse grid of the pixels: `(B, C, h, w)` to `(B, 2 C)`."""
    variance, mean = torch.var_mean(features[..., ::GRID, ::GRID], (2, 3), correction=0)
    return torch.cat([mean, (variance + 1e-6).sqrt()], 1)


def pad(images: Tensor) -> Tensor:
    """Repeat the border for a margin, and further until the sides are divisible by the stride."""
    height, width = images.shape[-2:]
    sides = (MARGIN, MARGIN - width % -STRIDE, MARGIN, MARGIN - height % -STRIDE)
    padded: Tensor = nn.functional.pad(images, sides, mode="replicate")
    return padded


def equal_width(dim: int, width: int, top_k: int) -> int:
    """Width of one global expert with as many weights as `top_k` of this width."""
    wanted = top_k * (dim * width + width * width / 2 + width / 2 * 2 * PIXELS)
    linear = dim + PIXELS
    return round(math.sqrt(linear**2 + 2 * wanted) - linear)
