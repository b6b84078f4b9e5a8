"""Faster R-CNN on MobileNetV3, and the attention that two of them give to a fusion network.

torchvision's detectors are imported where they are used.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tasks.fusion.attention import box_attention
from zoo.errors import UnknownNameError

if TYPE_CHECKING:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.image_list import ImageList

BANDS = ("infrared", "visible")
# The last blocks of MobileNetV3-Large at strides 4, 8, 16 and 32, and their channels.
BLOCKS = {"3": "0", "6": "1", "12": "2", "15": "3"}
BLOCK_CHANNELS = [24, 40, 112, 160]
FINEST = "0"
FINEST_STRIDE = 4
COARSEST_STRIDE = 64
# The paper has ResNet-50, 256 channels and 1024 in the head: about 40 M parameters for each band; here it is 4 M.
CHANNELS = 64
HEAD_CHANNELS = 256
# Sides of the anchors at the five levels: four strides of each.
ANCHORS = ((16,), (32,), (64,), (128,), (256,))
RATIOS = ((0.5, 1.0, 2.0),) * len(ANCHORS)
# Proposals per image that are kept and learnt from; torchvision's 2000 and 512 are for COCO's crowded images.
PROPOSALS = {
    "rpn_pre_nms_top_n_train": 500,
    "rpn_post_nms_top_n_train": 300,
    "rpn_pre_nms_top_n_test": 500,
    "rpn_post_nms_top_n_test": 300,
    "box_batch_size_per_image": 128,
}


class DetectorAttention(nn.Module):
    """Attention of two detectors, infrared and visible, that look at each other's features (Sun et al. 2023).

    At every level of the two feature pyramids `P_m`, with convolutions that all levels share,

        c     = relu(conv([P_infrared; P_visible]))
        F_m   = P_m + c
        att_m = sigmoid(norm(conv(relu(norm(conv(F_m))))))
        F_m  <- F_m + F_m * att_m

    and each band goes on as a Faster R-CNN. The attention is the larger of both bands' `att_m` at the finest level. It
    is detached: what fusion wants never reaches the detectors, which learn from boxes alone (`learn`). Unlike the
    paper's it also learns to be 1 inside boxes and 0 outside, since detection alone is as content with the reverse.

    The streams see the images pixel for pixel. Were they resized to one size, training windows would be magnified and
    whole images shrunk; so boxes need no rescaling either, which the reference code forgets. A new detector is
    untrained throughout, its backbone too (`start_backbones`).
    """

    def __init__(self, classes: Sequence[str]) -> None:
        """Build both streams, untrained.

        Args:
            classes: Names of what they look for.
        """
        super().__init__()
        self.classes = list(classes)
        self.streams = nn.ModuleList(faster_rcnn(classes) for _ in BANDS)
        self.common = nn.Sequential(nn.Conv2d(len(BANDS) * CHANNELS, CHANNELS, 1), nn.ReLU())
        self.attention = nn.ModuleList(attention_map() for _ in BANDS)

    def forward(self, infrared: Tensor, visible: Tensor) -> Tensor:
        """Map two bands `(B, 1, H, W)`, 0..1, to attention of the same shape, 0..1, without gradient."""
        return self.attend(self.images(infrared, visible))[0].detach()

    def learn(
        self, infrared: Tensor, visible: Tensor, boxes: Sequence[Tensor], labels: Sequence[Sequence[str]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The attention, and what both detectors have to learn, in training mode.

        Args:
            infrared: `(B, 1, H, W)`, 0..1.
            visible: The same.
            boxes: For each image `(N, 4)`, xyxy in its pixels; N is 0 where there is nothing to find.
            labels: For each image the N names.

        Returns:
            Attention as of `forward`, and losses: `loss_attention`, and `<band>_<name>` as torchvision names them.

        Raises:
            UnknownNameError: A label is not among the classes.
        """
        targets = as_targets(boxes, labels, self.classes)
        images = self.images(infrared, visible)
        attention, features = self.attend(images)
        inside = box_attention(boxes, (infrared.shape[-2], infrared.shape[-1])).to(attention)
        losses = {"loss_attention": dice_loss(attention, inside)}
        for band, stream, seen, own in zip(BANDS, self.streams, images, features, strict=True):
            proposals, of_proposals = stream.rpn(seen, own, targets)
            _, of_heads = stream.roi_heads(own, proposals, seen.image_sizes, targets)
            losses |= {f"{band}_{name}": value for name, value in {**of_proposals, **of_heads}.items()}
        return attention.detach(), losses

    def images(self, infrared: Tensor, visible: Tensor) -> "list[ImageList]":
        """What each stream sees: three normalised channels, padded so that every level's stride divides the sides."""
        from torchvision.models.detection.image_list import ImageList

        sizes = [(infrared.shape[-2], infrared.shape[-1])] * len(infrared)
        seen = []
        for stream, band in zip(self.streams, (infrared, visible), strict=True):
            normalised = list(stream.transform.normalize(band.expand(-1, 3, -1, -1)))
            seen.append(ImageList(stream.transform.batch_images(normalised, COARSEST_STRIDE), sizes))
        return seen

    def attend(self, images: "Sequence[ImageList]") -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Attention `(B, 1, H, W)` without the padding, and each band's attended features by level."""
        features = [stream.backbone(seen.tensors) for stream, seen in zip(self.streams, images, strict=True)]
        finest = []
        for level in features[0]:
            common = self.common(torch.cat([own[level] for own in features], 1))
            for own, head in zip(features, self.attention, strict=True):
                shared = own[level] + common
                where = head(shared)
                own[level] = shared + shared * where
                if level == FINEST:
                    finest.append(where)
        height, width = images[0].image_sizes[0]
        attention = nn.functional.interpolate(
            torch.maximum(*finest), scale_factor=FINEST_STRIDE, mode="bilinear", align_corners=False
        )
        return attention[..., :height, :width], features


def dice_loss(attention: Tensor, inside: Tensor) -> Tensor:
    """One minus the overlap of two maps over a whole batch (Milletari et al. 2016), few as the pixels in boxes are.

    Args:
        attention: `(B, 1, H, W)`, 0..1.
        inside: The same, 0 or 1.
    """
    return 1 - (2 * (attention * inside).sum() + 1) / (attention.sum() + inside.sum() + 1)


def attention_map() -> nn.Sequential:
    """What maps a band's features to its attention."""
    half = CHANNELS // 2
    return nn.Sequential(
        nn.Conv2d(CHANNELS, half, 1),
        nn.BatchNorm2d(half),
        nn.ReLU(),
        nn.Conv2d(half, 1, 1),
        nn.BatchNorm2d(1),
        nn.Sigmoid(),
    )


def faster_rcnn(classes: Sequence[str], **options: Any) -> "FasterRCNN":
    """A light, untrained Faster R-CNN: MobileNetV3-Large, a feature pyramid of strides 4 to 64, a head of two layers.

    Args:
        classes: Names of what it looks for; its label 0 is background, label 1 the first of them.
        options: Further arguments of torchvision's `FasterRCNN`, such as `min_size`.
    """
    from torchvision.models import mobilenet_v3_large
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    # As torchvision does for detectors; the momentum of its classifiers is too slow for short training.
    features = mobilenet_v3_large(norm_layer=nn.BatchNorm2d).features
    return FasterRCNN(
        BackboneWithFPN(features, BLOCKS, BLOCK_CHANNELS, CHANNELS),
        rpn_anchor_generator=AnchorGenerator(ANCHORS, RATIOS),
        box_head=TwoMLPHead(CHANNELS * 7 * 7, HEAD_CHANNELS),
        box_predictor=FastRCNNPredictor(HEAD_CHANNELS, len(classes) + 1),
        **{**PROPOSALS, **options},
    )


def start_backbones(detectors: "Iterable[FasterRCNN]", weights: str | None) -> None:
    """Fill the backbones of new detectors with weights trained elsewhere; without any, say that they are untrained.

    Args:
        detectors: Of `faster_rcnn`.
        weights: Name of torchvision's weights of MobileNetV3-Large, e.g. `IMAGENET1K_V2`, which it downloads, or a file
            with such a state dict.

    Raises:
        UnknownNameError: There is neither such a name nor such a file.
        ValueError: The file holds something else.
    """
    if weights is None:
        print("The detectors' backbones are untrained: --model.weights_backbone names no weights to start from.")
        return
    state = read_backbone(weights)
    for detector in detectors:
        body = detector.backbone.body
        kept = {key: state[f"features.{key}"] for key in body.state_dict() if f"features.{key}" in state}
        try:
            body.load_state_dict(kept)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(f"{weights} does not hold torchvision's mobilenet_v3_large: {reason}") from None


def read_backbone(weights: str) -> dict[str, Tensor]:
    """The state dict that `start_backbones` is told to use."""
    from torchvision.models import MobileNet_V3_Large_Weights

    if Path(weights).is_file():
        state: dict[str, Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
        return state
    names = list(MobileNet_V3_Large_Weights.__members__)
    if weights not in names:
        raise UnknownNameError("weights_backbone", weights, names, "A file with a state dict works too.")
    downloaded: dict[str, Tensor] = MobileNet_V3_Large_Weights[weights].get_state_dict(check_hash=True)
    return downloaded


def as_targets(
    boxes: Sequence[Tensor], labels: Sequence[Sequence[str]], classes: Sequence[str]
) -> list[dict[str, Tensor]]:
    """What torchvision's detectors learn from; label 1 is the first class.

    Args:
        boxes: For each image `(N, 4)`, xyxy in its pixels.
        labels: For each image the N names.
        classes: All names.

    Raises:
        UnknownNameError: A label is not among the classes.
    """
    numbers = {name: number for number, name in enumerate(classes, 1)}
    for name in {name for names in labels for name in names}:
        if name not in numbers:
            raise UnknownNameError("label", name, classes, "Name every class of the data in `classes`.")
    return [
        {"boxes": own, "labels": torch.tensor([numbers[name] for name in names], dtype=torch.long, device=own.device)}
        for own, names in zip(boxes, labels, strict=True)
    ]
