"""Detection on visible, infrared and fused images: is there more to be found in a fused image?

A detector of its own for each kind of image, all alike at the start, learns from the same boxes; `test` compares them.
"""

import copy
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tasks.fusion.data import FilePair, FusionDataModule, Pair, Pairs
from tasks.fusion.detector import as_targets, faster_rcnn, start_backbones
from tasks.fusion.images import recolour
from tasks.fusion.model import MoEFusion
from zoo import hub
from zoo.errors import UnknownNameError
from zoo.report import print_table, write_metrics, write_predictions
from zoo.task import MoETask, StepOutput

IMAGES = ("visible", "infrared", "fused")
# IoU thresholds; None is COCO's 0.5, 0.55, ... 0.95.
PRECISIONS: Mapping[str, list[float] | None] = {"mAP50": [0.5], "mAP": None}
# Fewer labelled test images say nothing about which kind of image is the better one.
ENOUGH = 100

# Boxes `(N, 4)` and labels `(N,)` of an image; of predictions scores `(N,)` too.
Objects = dict[str, Tensor]


class Detectors(nn.Module):
    """A Faster R-CNN for each kind of image, all with the same weights at the start."""

    def __init__(self, classes: list[str], images: Sequence[str] = IMAGES, min_size: int = 320) -> None:
        """Build them, untrained (`start_backbones`).

        Args:
            classes: Names of what they look for.
            images: Kinds of images, among `IMAGES`.
            min_size: Pixels that the shorter side is resized to, boxes along with it; the longer gets at most twice as
                many.

        Raises:
            UnknownNameError: There is no such kind of image.
            ValueError: No class or no image is named.
        """
        for image in images:
            if image not in IMAGES:
                raise UnknownNameError("kind of image", image, IMAGES)
        if not (classes and images):
            raise ValueError(f"classes={classes}, images={images}: name at least one of each, e.g. classes=[person].")
        super().__init__()
        self.classes = classes
        self.images = list(images)
        self.min_size = min_size
        first = faster_rcnn(classes, min_size=min_size, max_size=2 * min_size)
        self.by_image = nn.ModuleDict({image: copy.deepcopy(first) for image in images})

    def forward(self, images: Mapping[str, Tensor], targets: Sequence[Objects] | None = None) -> dict[str, Any]:
        """Run the detectors.

        Args:
            images: `(B, 3, H, W)`, 0..1, by kind.
            targets: For each image, needed in training.

        Returns:
            By kind: torchvision's losses in training, otherwise a list of what was found in each image.
        """
        return {image: detector(list(images[image]), targets) for image, detector in self.by_image.items()}


class DetectionDataModule(FusionDataModule):
    """The annotated pairs among those of `FusionDataModule`, and nothing else.

    A `crop` of the images' shorter side makes training windows as large as the whole images of the test.
    """

    def read_set(self, source: str) -> Sequence[Pair]:
        """As in `FusionDataModule`, without what is not annotated."""
        return annotated(super().read_set(source), source)

    def read_own(self) -> list[FilePair]:
        """As in `FusionDataModule`, without what is not annotated."""
        own = super().read_own()
        return annotated(own, "your own data") if own else []


class DetectionTask(MoETask):
    """Train one detector for each kind of image on the same boxes, and compare them by mean average precision."""

    model: Detectors
    monitor = "val_mAP50"

    def __init__(
        self,
        fusion: str | None = None,
        classes: list[str] | None = None,
        images: list[str] | None = None,
        min_size: int = 320,
        pretrained: str | None = None,
        weights_backbone: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup: float = 0.1,
    ) -> None:
        """Build or load the detectors, and load the fusion network.

        Args:
            fusion: Name of the zoo checkpoint, or a folder written by `zoo.save`, that fuses the images.
            classes: Names of what new detectors look for; like the next two, a checkpoint brings its own.
            images: Kinds of images among visible, infrared and fused; all of them by default.
            min_size: Pixels of the shorter side that detectors see.
            pretrained: Detectors written by `zoo.save`, e.g. the folder `checkpoint` of a run, in place of new ones.
            weights_backbone: What new detectors start from: `IMAGENET1K_V1` or `IMAGENET1K_V2` of torchvision's
                MobileNetV3-Large, or a file with such a state dict; None leaves them untrained.
            lr: Peak learning rate of AdamW.
            weight_decay: Its weight decay.
            warmup: Share of all steps in which the rate rises.

        Raises:
            UnknownNameError: There is no such kind of image.
            ValueError: Fused images are asked for without a network that fuses, there are no classes, or a checkpoint
                holds something else.
        """
        self.classes = classes
        self.images = images or list(IMAGES)
        self.min_size = min_size
        self.pretrained = pretrained
        self.fusion_name = fusion
        self.weights_backbone = weights_backbone
        self.truth: list[Objects] = []
        self.found: dict[str, list[Objects]] = {}
        super().__init__(lr, weight_decay, warmup)
        if "fused" in self.model.images and not fusion:
            raise ValueError(
                "Nothing fuses images: name a network by --model.fusion NAME, or --model.images=[visible]."
            )
        # A tuple hides it from Lightning: it is not trained and not saved.
        self.fusion = (hub.load_as(fusion, MoEFusion),) if fusion else ()

    def configure_models(self) -> None:
        """Load the detectors, or build new ones."""
        if not self.pretrained:
            self.model = Detectors(self.classes or [], self.images, self.min_size)
            start_backbones(self.model.by_image.values(), self.weights_backbone)
            return
        if self.weights_backbone:
            raise ValueError(f"weights_backbone={self.weights_backbone}: {self.pretrained} brings its own.")
        self.model = hub.load_as(self.pretrained, Detectors).train()

    def setup(self, stage: str) -> None:
        """Ask for what scoring needs before anything is trained."""
        require_pycocotools()

    def pictures(self, batch: Pairs) -> dict[str, Tensor]:
        """What the detectors look at, `(B, 3, H, W)` by kind; a fused image has the visible image's colours."""
        made = {
            "visible": recolour(batch.visible, batch.chroma),
            "infrared": batch.infrared.expand(-1, 3, -1, -1),
        }
        for network in self.fusion:
            with torch.no_grad():
                fused = network.to(batch.visible.device)(batch.infrared, batch.visible)
            made["fused"] = recolour(fused, batch.chroma)
        return made

    def targets(self, batch: Pairs) -> list[Objects]:
        """What is to be found.

        Raises:
            ValueError: A pair of the batch is not annotated.
        """
        if batch.boxes is None or batch.labels is None:
            raise ValueError(
                f"{', '.join(batch.names)}: not all are annotated. Use tasks.fusion.detection.DetectionDataModule."
            )
        return as_targets(batch.boxes, batch.labels, self.model.classes)

    def step(self, batch: Pairs) -> StepOutput:
        """What all detectors lose on a batch."""
        losses = self.model(self.pictures(batch), self.targets(batch))
        totals = {image: torch.stack(list(own.values())).sum() for image, own in losses.items()}
        self.log_dict({f"train_{image}_loss": total.detach() for image, total in totals.items()})
        nothing = torch.empty(0)
        return StepOutput(torch.stack(list(totals.values())).sum(), nothing, nothing)

    def begin(self) -> None:
        """Forget what was found."""
        self.truth, self.prediction_rows = [], []
        self.found = {image: [] for image in self.model.images}

    on_validation_epoch_start = begin
    on_test_epoch_start = begin

    def validation_step(self, batch: Pairs, batch_idx: int) -> None:
        """Note what is there and what is found."""
        truth = [to_cpu(objects) for objects in self.targets(batch)]
        self.truth += truth
        for image, found in self.model(self.pictures(batch)).items():
            self.found[image] += (own := [to_cpu(objects) for objects in found])
            for name, there, seen in zip(batch.names, truth, own, strict=True):
                row = {"id": name, "image": image, **as_row(seen, self.model.classes)}
                row |= {f"true_{key}": value for key, value in as_row(there, self.model.classes).items()}
                self.prediction_rows.append(row)

    test_step = validation_step

    def predict_step(self, batch: Pairs, batch_idx: int) -> None:
        """Refuse: this task is there to compare.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "Detectors are compared with moe-zoo test, which writes predictions.parquet; nothing predicts."
        )

    def scores(self) -> dict[str, dict[str, float]]:
        """Average precisions by kind of image."""
        return {
            image: mean_average_precision(found, self.truth, self.model.classes) for image, found in self.found.items()
        }

    def on_validation_epoch_end(self) -> None:
        """Log the precisions, and their mean over the kinds of images."""
        scores = self.scores()
        for name in PRECISIONS:
            self.log_dict({f"val_{image}_{name}": row[name] for image, row in scores.items()})
            self.log(f"val_{name}", sum(row[name] for row in scores.values()) / len(scores), prog_bar=True)

    def on_fit_end(self) -> None:
        """Save the detectors as a checkpoint in the run folder; of several processes, the first does."""
        if not self.trainer.is_global_zero:
            return
        folder = Path(self.trainer.default_root_dir) / "checkpoint"
        data: FusionDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        arguments = {"fusion": self.fusion_name} if self.fusion_name else None
        config = self.data_config(data, DetectionDataModule, "runs/fusion/test", arguments)
        config["data"]["init_args"] |= data.instead_of_sets()
        hub.save(self.model.cpu().eval(), folder, card=detection_card(self.model, data), config=config)
        print(f"Checkpoint: {folder}")

    def report(self, folder: Path) -> dict[str, float]:
        """Print the table; write `metrics.json` and `predictions.parquet`."""
        scores = self.scores()
        labels = torch.cat([objects["labels"] for objects in self.truth])
        print_table(
            f"Detection: {len(labels)} objects on {len(self.truth)} labelled pairs",
            [{"image": image, **row} for image, row in scores.items()],
        )
        if len(self.truth) < ENOUGH:
            print(
                f"{len(self.truth)} labelled images are too few to claim anything: which kind of image is the better "
                f"one, say only with {ENOUGH} or more."
            )
        metrics = {f"{image}/{name}": value for image, row in scores.items() for name, value in row.items()}
        write_metrics(folder, metrics)
        write_predictions(folder, self.prediction_rows)
        return metrics


def mean_average_precision(
    predictions: Sequence[Objects], targets: Sequence[Objects], classes: Sequence[str]
) -> dict[str, float]:
    """COCO's average precision (Lin et al. 2014; 101 recalls, at most 100 predictions of an image), by pycocotools.

    Args:
        predictions: For each image `boxes`, `labels` and `scores`.
        targets: For each image `boxes` and `labels`.
        classes: Names of the labels from 1 on.

    Returns:
        `mAP50` at IoU 0.5 and `mAP` over IoU 0.5, 0.55, ... 0.95, means over the classes that occur in the targets, and
        each class's own as `mAP50/<class>` and `mAP/<class>`; NaN where there is no target.
    """
    from torchmetrics.detection import MeanAveragePrecision

    require_pycocotools()
    precisions: dict[str, float] = {}
    for name, thresholds in PRECISIONS.items():
        metric = MeanAveragePrecision(iou_thresholds=thresholds, class_metrics=True)
        metric.warn_on_many_detections = False
        result = metric(list(predictions), list(targets))
        numbers, values = (result[key].reshape(-1).tolist() for key in ("classes", "map_per_class"))
        own = dict(zip(numbers, values, strict=True))
        rows = {name: float(result["map"])}
        rows |= {f"{name}/{label}": own.get(number, -1.0) for number, label in enumerate(classes, 1)}
        # torchmetrics says -1 where there is nothing to find.
        precisions |= {key: value if value >= 0 else float("nan") for key, value in rows.items()}
    return precisions


def require_pycocotools() -> None:
    """Refuse to go on without pycocotools, which torchmetrics computes the precision with.

    Raises:
        ValueError: It is not installed.
    """
    if find_spec("pycocotools") is None:
        raise ValueError("Scoring detections needs pycocotools: pip install 'moe-zoo[detection]'.")


def annotated(pairs: Sequence[Any], source: str) -> list[Any]:
    """The pairs whose objects somebody has marked.

    Raises:
        ValueError: There is none.
    """
    kept = [pair for pair in pairs if pair.boxes is not None or getattr(pair, "annotation", None) is not None]
    if not kept:
        raise ValueError(
            f"None of {source}'s {len(pairs)} pairs is annotated: detection needs boxes.json, or VOC or YOLO files."
        )
    return kept


def to_cpu(objects: Objects) -> Objects:
    """The same on the CPU."""
    return {key: value.detach().cpu() for key, value in objects.items()}


def as_row(objects: Objects, classes: Sequence[str]) -> dict[str, list[Any]]:
    """The same as plain lists, labels by name."""
    row = {key: value.tolist() for key, value in objects.items()}
    return {**row, "labels": [classes[number - 1] for number in row["labels"]]}


def detection_card(model: Detectors, data: FusionDataModule) -> hub.Card:
    """What trained detectors say about themselves."""
    return hub.Card(
        title=f"Faster R-CNN for {', '.join(model.images)} images",
        task="detection on infrared, visible and fused images",
        description="One detector for each kind of image, trained alike, to compare what can be found in them.",
        data=f"{data.describe()}.",
        data_terms="its trainer's to say",
        weights_licence="its trainer's to say",
        preprocessing={"images": "3 x H x W, 0..1", "min_size": model.min_size},
        classes=model.classes,
    )
