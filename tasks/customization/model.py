"""Networks of customization, plain torch: the global expert, and the mixture that a user's device completes."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.errors import UnknownNameError
from zoo.moe import ModuleExperts, MoELayer, ThresholdRouter

# Mean and standard deviation of EMNIST ByClass's pixels in 0..1.
PIXEL_MEAN, PIXEL_STD = 0.1736, 0.3317

# Uneven on purpose: drawn and scanned ink differ near black and near white.
GREY_LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.995)

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
        """All that is worth reading on the way to the logits.

        Args:
            images: `(N, 1, 28, 28)` in 0..1.

        Returns:
            The pooled map of each convolution `(N, C, h, w)`, each hidden layer before its ReLU `(N, width)`, logits.
        """
        pooled1 = nn.functional.max_pool2d(torch.relu(self.conv1((images - PIXEL_MEAN) / PIXEL_STD)), 2)
        pooled2 = nn.functional.max_pool2d(torch.relu(self.conv2(pooled1)), 2)
        out = [pooled1, pooled2]
        hidden = pooled2.flatten(1)
        for linear in self.linears:
            out.append(linear(hidden))
            hidden = torch.relu(out[-1])
        return out

    def classify_hidden(self, hidden: Tensor) -> Tensor:
        """Logits from the last hidden layer before its ReLU, `(N, width)`."""
        logits: Tensor = self.linears[-1](torch.relu(hidden))
        return logits


class LocalExpert(nn.Module):
    """The global expert's logits plus a low-rank correction that reads its hidden layers.

    Starts as no correction at all. A correction needs far fewer parameters than a classifier of its own, and what the
    user never wrote stays as the global expert has it.
    """

    def __init__(self, width: int, rank: int, num_classes: int) -> None:
        """Build the correction.

        Args:
            width: Width of the hidden layers read, joined.
            rank: Rank of the correction.
            num_classes: Width of the output.
        """
        super().__init__()
        self.down = nn.Parameter(torch.zeros(width, rank))
        self.up = nn.Parameter(torch.zeros(rank, num_classes))
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def forward(self, streams: tuple[Tensor, Tensor]) -> Tensor:
        """Correct `(logits (N, C), hidden (N, width))` to logits `(N, C)`."""
        logits, hidden = streams
        return logits + hidden @ self.down @ self.up + self.bias


class ConfidenceGate(nn.Module):
    """One logit, linear in pooled early features and in what both experts think of their own and each other's answer.

    Early features tell whose hand it is; the confidences tell who is right about it.
    """

    NUM_CONFIDENCES = 13

    def __init__(self, num_early: int) -> None:
        """Build the gate, undecided, on `num_early` features."""
        super().__init__()
        self.linear = nn.Linear(num_early + self.NUM_CONFIDENCES, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, early: Tensor, expert_output: Tensor) -> Tensor:
        """Map early features `(N, num_early)` and both experts' logits `(N, 2, C)` to `(N, 1)`."""
        logit: Tensor = self.linear(gate_input(early, expert_output[:, 0], expert_output[:, 1]))
        return logit


def gate_input(early: Tensor, global_logits: Tensor, local_logits: Tensor) -> Tensor:
    """What the gate reads: early features and the experts' confidences `(N, num_early + 13)`."""
    return torch.cat([early, confidences(global_logits, local_logits)], dim=1)


def confidences(global_logits: Tensor, local_logits: Tensor) -> Tensor:
    """Thirteen numbers on a common scale, clamped to +-5.

    The log-probability of each expert's answer and their difference in probability, both entropies, both margins,
    whether they agree, what each thinks of the other's answer, the divergence between them and how strongly each
    responds at all.

    Args:
        global_logits: `(N, C)`.
        local_logits: `(N, C)`.

    Returns:
        `(N, 13)`.
    """
    first, second = global_logits.log_softmax(1), local_logits.log_softmax(1)
    first_top, second_top = first.topk(2, dim=1), second.topk(2, dim=1)
    first_best, second_best = first_top.values[:, :1], second_top.values[:, :1]
    first_answer, second_answer = first_top.indices[:, :1], second_top.indices[:, :1]
    numbers = [
        first_best,
        second_best,
        second_best.exp() - first_best.exp(),
        -(first.exp() * first).sum(1, keepdim=True),
        -(second.exp() * second).sum(1, keepdim=True),
        (first_best - first_top.values[:, 1:]) / 4,
        (second_best - second_top.values[:, 1:]) / 4,
        (first_answer == second_answer).to(first.dtype),
        first.gather(1, second_answer) / 3,
        second.gather(1, first_answer) / 3,
        (first.exp() * (first - second)).sum(1, keepdim=True),
        (global_logits.logsumexp(1, keepdim=True) - 10) / 5,
        (local_logits.logsumexp(1, keepdim=True) - 10) / 5,
    ]
    return torch.cat(numbers, dim=1).clamp(-5, 5)


def early_features(images: Tensor, pooled1: Tensor, pooled2: Tensor, grey_levels: bool) -> Tensor:
    """What of the image and of both pooled maps tells whose hand, or whose pen, it is.

    Per channel of the first map its mean, root mean square, maximum and a 3 x 3 grid of means; per channel of the
    second its mean and root mean square; the image's mean and mean square; with `grey_levels`, the shares of pixels
    brighter than each of `GREY_LEVELS`.

    Args:
        images: `(N, 1, 28, 28)`.
        pooled1: `(N, C1, h, w)`.
        pooled2: `(N, C2, h, w)`.
        grey_levels: Whether to add the shares of bright pixels.

    Returns:
        `(N, num_early_features)`.
    """
    parts = [
        pooled1.mean((2, 3)),
        pooled1.square().mean((2, 3)).sqrt(),
        pooled1.amax((2, 3)),
        nn.functional.adaptive_avg_pool2d(pooled1, 3).flatten(1),
        pooled2.mean((2, 3)),
        pooled2.square().mean((2, 3)).sqrt(),
        images.mean((2, 3)),
        images.square().mean((2, 3)),
    ]
    if grey_levels:
        parts += [(images > level).to(images.dtype).mean((2, 3)) for level in GREY_LEVELS]
    return torch.cat(parts, dim=1)


def num_early_features(variant: str, grey_levels: bool) -> int:
    """Width of `early_features` for a LeNet."""
    (first, second), _, _ = VARIANTS[variant]
    return 12 * first + 2 * second + 2 + (len(GREY_LEVELS) if grey_levels else 0)


@dataclass(slots=True)
class Features:
    """All that local expert and gate read of one pass of the global expert.

    Attributes:
        early: `(N, num_early_features)`.
        hidden: `(N, width)` the hidden layers before their ReLU, joined.
        logits: `(N, C)`.
    """

    early: Tensor
    hidden: Tensor
    logits: Tensor

    def __getitem__(self, index: Tensor) -> "Features":
        return Features(self.early[index], self.hidden[index], self.logits[index])


class CustomizedLeNet(nn.Module):
    """Global expert, local expert and gate, and the replay buffer that a device needs to learn the latter two.

    Fresh from a checkpoint its gate is closed (threshold 1) and it equals its global expert exactly.
    """

    replay_early: Tensor
    replay_hidden: Tensor
    replay_labels: Tensor

    def __init__(
        self,
        variant: Literal["lenet5", "lenet-large"] = "lenet5",
        num_classes: int = 47,
        rank: int = 5,
        replay_size: int = 1000,
        grey_levels: bool = True,
    ) -> None:
        """Build the model.

        Args:
            variant: Of the global expert.
            num_classes: Width of the output.
            rank: Rank of the local expert's correction.
            replay_size: Generic training images whose features travel with the model.
            grey_levels: Whether the gate sees the distribution of grey levels: it then knows the pen or the device
                at least as well as the hand.
        """
        super().__init__()
        self.variant = variant
        self.num_classes = num_classes
        self.rank = rank
        self.replay_size = replay_size
        self.grey_levels = grey_levels
        self.global_expert = LeNet(variant, num_classes).requires_grad_(False)
        _, hidden, _ = VARIANTS[variant]
        num_early = num_early_features(variant, grey_levels)
        self.mixture = MoELayer(
            ThresholdRouter(threshold=1.0, gate=ConfidenceGate(num_early)),
            ModuleExperts(
                [nn.Identity(), LocalExpert(sum(hidden), rank, num_classes)], stream=[0, -1], unit_ndims=(1, 1)
            ),
            combine="select",
            experts_first=True,
        )
        self.register_buffer("replay_early", torch.zeros(replay_size, num_early, dtype=torch.float16))
        self.register_buffer("replay_hidden", torch.zeros(replay_size, sum(hidden), dtype=torch.float16))
        self.register_buffer("replay_labels", torch.zeros(replay_size, dtype=torch.uint8))

    @property
    def local_expert(self) -> LocalExpert:
        """The local expert."""
        expert: LocalExpert = self.mixture.experts.experts[1]
        return expert

    @property
    def gate(self) -> ConfidenceGate:
        """The gate."""
        gate: ConfidenceGate = self.mixture.router.gate
        return gate

    @property
    def threshold(self) -> Tensor:
        """Probability above which the local expert answers; 1 is a closed gate."""
        return self.mixture.router.threshold

    def forward(self, images: Tensor, return_routing: bool = False) -> Any:
        """Classify images `(N, 1, 28, 28)` in 0..1.

        Args:
            images: White ink on black.
            return_routing: Whether to return the `RoutingOutput` too; expert 1 is the local one.

        Returns:
            Logits `(N, num_classes)`.
        """
        return self.classify(self.features(images), return_routing)

    def classify(self, features: Features, return_routing: bool = False) -> Any:
        """Logits `(N, num_classes)` from the global expert's features."""
        streams = (features.logits, features.hidden)
        return self.mixture(streams, router_input=features.early, return_routing=return_routing)

    def features(self, images: Tensor) -> Features:
        """Run the global expert and keep what the others read."""
        first, second, *hidden, logits = self.global_expert.stages(images)
        early = early_features(images, first, second, self.grey_levels)
        return Features(early, torch.cat(hidden, dim=1), logits)

    def replay(self) -> tuple[Features, Tensor]:
        """The replay buffer: features and labels `(n,)` of generic training images."""
        hidden = self.replay_hidden.float()
        last = hidden[:, -self.global_expert.linears[-1].in_features :]
        return Features(
            self.replay_early.float(), hidden, self.global_expert.classify_hidden(last)
        ), self.replay_labels.long()

    @torch.no_grad()
    def fill_replay(self, images: Tensor, labels: Tensor) -> None:
        """Fill the replay buffer with features of generic training images.

        Args:
            images: `(replay_size, 1, 28, 28)` in 0..1.
            labels: `(replay_size,)` merged labels.
        """
        features = self.features(images)
        self.replay_early.copy_(features.early)
        self.replay_hidden.copy_(features.hidden)
        self.replay_labels.copy_(labels)
