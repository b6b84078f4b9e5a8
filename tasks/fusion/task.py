"""Lightning task of image fusion."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.fusion.attention import box_attention
from tasks.fusion.baselines import BASELINES
from tasks.fusion.data import FusionDataModule, Pairs
from tasks.fusion.detector import DetectorAttention, start_backbones
from tasks.fusion.evaluate import (
    OURS,
    RANDOM,
    TWIN,
    Example,
    Row,
    gate_correlations,
    means,
    paired_differences,
    plot_contact_sheet,
    plot_gates,
    ranks,
    score_pair,
    with_random_gates,
)
from tasks.fusion.images import recolour, write_image
from tasks.fusion.losses import (
    difference_loss,
    edge_loss,
    gradient_loss,
    pixel_loss,
    range_loss,
    similarity_loss,
)
from tasks.fusion.metrics import NINE_METRICS
from tasks.fusion.model import Fusion, MoEFusion
from zoo import hub
from zoo.errors import UnknownNameError
from zoo.report import print_table, write_metrics, write_predictions
from zoo.task import MoETask, StepOutput, check_network

# Chosen on the validation part of RoadScene's training pairs.
WEIGHTS = {"gradient": 60.0, "edge": 1.5, "similarity": 3.0, "difference": 0.1, "pixel": 0.0, "range": 10.0}
SHOWN = 8


class FusionTask(MoETask):
    """Train MoE-Fusion, score it beside its baselines and its twin, or fuse a user's own pairs."""

    model: MoEFusion
    monitor = "val_loss"
    monitor_mode = "min"

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        pretrained: str | None = None,
        twin: str | None = None,
        losses: dict[str, float] | None = None,
        sharpness: float = 1.15,
        weights_backbone: str | None = None,
        lr: float = 3e-3,
        weight_decay: float = 1e-4,
        warmup: float = 0.05,
    ) -> None:
        """Build the network and its losses.

        Args:
            network: Arguments of `tasks.fusion.model.MoEFusion` that differ from its defaults.
            pretrained: Name of a zoo checkpoint, or a folder written by `zoo.save`, in place of a new network.
            twin: The same of the network without mixtures that `test` compares with; None compares with none.
            losses: Weights of the losses that differ from `WEIGHTS`.
            sharpness: How much steeper than the sources' edges those of the fused image should be.
            weights_backbone: What the detectors of a new network with `attention: detector` start from: `IMAGENET1K_V1`
                or `IMAGENET1K_V2` of torchvision's MobileNetV3-Large, or a file with such a state dict; None leaves
                them untrained.
            lr: Peak learning rate of AdamW.
            weight_decay: Its weight decay.
            warmup: Share of all steps in which the rate rises.

        Raises:
            UnknownNameError: There is no such loss or argument of the network.
            ValueError: Both a new network and a checkpoint are asked for, or weights of a backbone without detectors.
        """
        check_network(MoEFusion, network, pretrained)
        for name in losses or {}:
            if name not in WEIGHTS:
                raise UnknownNameError("loss", name, WEIGHTS)
        self.network = network or {}
        self.pretrained = pretrained
        self.weights_backbone = weights_backbone
        self.weights = {**WEIGHTS, **(losses or {})}
        self.sharpness = sharpness
        self.scores: list[dict[str, dict[str, float]]] = []
        self.facts: list[Row] = []
        self.examples: list[Example] = []
        self.twin = twin
        # Of a test: a plain mapping, so that Lightning does not save them.
        self.rivals: dict[str, MoEFusion] = {}
        super().__init__(lr, weight_decay, warmup)

    def configure_models(self) -> None:
        """Load the checkpoint, or build a new network."""
        if self.pretrained:
            self.model = hub.load_as(self.pretrained, MoEFusion).train()
        else:
            self.model = MoEFusion(**self.network)
        new = self.model.detector if not self.pretrained else None
        if new is not None:
            start_backbones(new.streams, self.weights_backbone)
        elif self.weights_backbone:
            raise ValueError(f"weights_backbone={self.weights_backbone} is for new networks with attention='detector'.")

    def setup(self, stage: str) -> None:
        """Compare the network with the data.

        Raises:
            ValueError: A mixture is to learn from batches of one.
        """
        data: FusionDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and self.model.mixture and data.batch_size == 1:
            raise ValueError(
                "--data.batch_size 1: gates are standardised over the windows of a batch. Choose 2 or more, or train "
                "the twin with --model.network.mixture false."
            )

    def fuse(self, batch: Pairs) -> Fusion:
        """Fuse a batch, with attention on its boxes if the network was built for boxes.

        Raises:
            ValueError: It was, and the batch has none.
        """
        if self.model.attention != "boxes":
            return self.model.fuse(batch.infrared, batch.visible)
        if batch.boxes is None:
            raise ValueError(f"attention='boxes', but {', '.join(batch.names)} has none: use attention='saliency'.")
        height, width = batch.visible.shape[-2:]
        attention = box_attention(batch.boxes, (height, width)).to(batch.visible)
        return self.model.fuse(batch.infrared, batch.visible, attention)

    def learn(self, detector: DetectorAttention, batch: Pairs) -> tuple[Fusion, dict[str, Tensor]]:
        """Fuse a batch, and what the detectors lose on its boxes.

        Raises:
            ValueError: A pair of the batch is not annotated. A window in which there is nothing to find is.
        """
        if batch.boxes is None or batch.labels is None:
            raise ValueError(
                f"attention='detector' learns from boxes, but the batch of {', '.join(batch.names)} is not annotated "
                "throughout: train on annotated sets alone, or use attention='saliency'."
            )
        attention, losses = detector.learn(batch.infrared, batch.visible, batch.boxes, batch.labels)
        return self.model.fuse(batch.infrared, batch.visible, attention), losses

    def step(self, batch: Pairs) -> StepOutput:
        """Fuse a batch and compare with both bands; in training the detectors, if any, learn from its boxes."""
        detector = self.model.detector if self.training else None
        fusion, of_detectors = self.learn(detector, batch) if detector else (self.fuse(batch), {})
        bands = (batch.infrared, batch.visible)
        values = {
            "gradient": gradient_loss(fusion.fused, *bands, self.sharpness),
            "edge": edge_loss(fusion.fused, *bands),
            "similarity": similarity_loss(fusion.fused, *bands),
            "difference": difference_loss(fusion.fused, *bands),
            "pixel": pixel_loss(fusion.fused, *bands, fusion.attention),
            "range": range_loss(fusion.fused),
        }
        prefix = "train" if self.training else "val"
        logged = {**values, **of_detectors}
        self.log_dict({f"{prefix}_{name}": value.detach() for name, value in logged.items()}, batch_size=len(bands[0]))
        weighted = [self.weights[name] * value for name, value in values.items()]
        loss = sum([*weighted, *of_detectors.values()], torch.zeros(()))
        return StepOutput(loss, fusion.fused, torch.cat(bands, 1))

    def on_fit_end(self) -> None:
        """Save the network as a checkpoint in the run folder; of several processes, the first does."""
        if not self.trainer.is_global_zero:
            return
        folder = Path(self.trainer.default_root_dir) / "checkpoint"
        data: FusionDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        card = fusion_card(self.model, data, self.trainer.global_step)
        self.model.cpu().eval()
        # Infrared, visible and attention: a checkpoint is given away; an image of the data may not be ours to give.
        golden = list(torch.rand(3, 1, 1, 96, 128, generator=torch.Generator().manual_seed(0)))
        config = self.data_config(
            data, FusionDataModule, "runs/fusion/test", {"twin": self.twin} if self.twin else None
        )
        config["data"]["init_args"] |= data.instead_of_sets()
        hub.save(self.model, folder, card=card, golden_input=golden, config=config)
        print(f"Checkpoint: {folder}")

    def on_test_start(self) -> None:
        """Begin new results."""
        self.scores, self.facts, self.examples, self.prediction_rows = [], [], [], []
        self.rivals = {}
        if self.model.mixture:
            self.rivals[RANDOM] = with_random_gates(self.model)
            self.rivals |= {TWIN: hub.load_as(self.twin, MoEFusion)} if self.twin else {}
        for rival in self.rivals.values():
            rival.to(self.device)

    def test_step(self, batch: Pairs, batch_idx: int) -> None:
        """Score a pair: the network, its rivals, and the baselines."""
        fusion = self.fuse(batch)
        fused = {OURS: fusion.fused}
        for name, rival in self.rivals.items():
            fused[name] = rival.fuse(batch.infrared, batch.visible, fusion.attention).fused
        self.scores.append(score_pair(batch.infrared, batch.visible, fused))
        shares = shares_of(fusion)
        self.facts.append({"night": bool(batch.night[0]), "brightness": float(batch.visible.mean()), "shares": shares})
        row = {"id": batch.names[0], "night": bool(batch.night[0]), **self.scores[-1][OURS]}
        self.prediction_rows.append({**row, **{f"experts_{name}": weights for name, weights in shares.items()}})
        every = max(1, self.trainer.num_test_batches[0] // SHOWN)  # type: ignore[arg-type]
        if batch_idx % every == 0 and len(self.examples) < SHOWN:
            self.examples.append(example(batch, fusion))

    def report(self, folder: Path) -> dict[str, float]:
        """Print the tables; write `metrics.json`, `predictions.parquet`, `pairs.png` and `gates.png`."""
        night = np.array([fact["night"] for fact in self.facts])
        parts = {"all": slice(None), "day": ~night, "night": night}
        metrics: dict[str, float] = {}
        for part, chosen in parts.items():
            scores = [self.scores[place] for place in np.arange(len(night))[chosen]]
            if not scores:
                continue
            table = means(scores)
            places = ranks(table)
            lines = [{"method": name, **{key: row[key] for key in NINE_METRICS}} for name, row in table.items()]
            for line in lines:
                line["mean_rank"] = places[line["method"]]
            print_table(f"Fusion, {part}: {len(scores)} pairs (mean place among the five baselines, 1 is best)", lines)
            metrics |= flat_metrics(table, places, "" if part == "all" else f"{part}/")
        if TWIN in self.rivals and len(self.scores) > 1:
            differences = paired_differences(self.scores, OURS, TWIN)
            print_table("Ours minus the twin without mixtures, 95 % interval over pairs", differences)
            for row in differences:
                metrics |= {f"minus_twin/{row['metric']}{end}": row[key] for end, key in DIFFERENCE_KEYS.items()}
        metrics |= self.report_gates(folder, night)
        print(f"Pictures: {plot_contact_sheet(self.examples, folder / 'pairs.png')}")
        write_metrics(folder, metrics)
        write_predictions(folder, self.prediction_rows)
        return metrics

    def report_gates(self, folder: Path, night: Any) -> dict[str, float]:
        """Print and draw whether the gates follow the light; nothing for a twin."""
        if not self.model.mixture:
            return {}
        brightness = np.array([fact["brightness"] for fact in self.facts])
        shares = {name: np.array([fact["shares"][name] for fact in self.facts]) for name in self.facts[0]["shares"]}
        rows = gate_correlations(shares, brightness)
        print_table("Do the gates follow the light? Rank correlation with the visible image's brightness", rows)
        print(f"Gates: {plot_gates(shares, brightness, night, rows, folder / 'gates.png')}")
        return {f"gate_rho/{row['mixture']}": row["rho"] for row in rows}

    def on_predict_start(self) -> None:
        """Refuse to write among the sources.

        Raises:
            ValueError: The run folder is a folder of sources.
        """
        self.prediction_rows = []
        out = Path(self.trainer.default_root_dir).resolve()
        data: FusionDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        if out in [folder.resolve() for folder in data.source_folders()]:
            raise ValueError(f"--out {out} holds the sources: name another folder, so that none is overwritten.")

    def predict_step(self, batch: Pairs, batch_idx: int) -> list[Mapping[str, Any]]:
        """Fuse pairs, give them back their colours, and write each under its own name; what is there is kept."""
        done = len(self.prediction_rows)
        folder = Path(self.trainer.default_root_dir)
        for place, name in enumerate(batch.names):
            target = folder / f"{name}.png"
            shares: dict[str, list[float]] = {}
            new = not target.exists()
            if new:
                fusion = self.fuse(batch)
                coloured = bool(batch.chroma[place].any())
                luminance = fusion.fused[place].clamp(0, 1)
                write_image(recolour(luminance, batch.chroma[place]) if coloured else luminance, target)
                shares = shares_of(fusion, place)
            row = {"id": name, "file": str(target), "new": new}
            self.prediction_rows.append({**row, **{f"experts_{key}": value for key, value in shares.items()}})
        return self.prediction_rows[done:]


DIFFERENCE_KEYS = {"": "difference", "/low": "low", "/high": "high"}


def shares_of(fusion: Fusion, place: int = 0) -> dict[str, list[float]]:
    """Weight of each expert by mixture for one pair of a batch."""
    return {name: routing.dense_weight()[place].tolist() for name, routing in fusion.routing.items()}


def flat_metrics(table: Mapping[str, Mapping[str, float]], places: Mapping[str, float], part: str) -> dict[str, float]:
    """Metrics by `[part/][method/]name`; ours have no method in their names, and a part has the nine of models only."""
    metrics = {}
    for method, row in table.items():
        if part and method in BASELINES:
            continue
        start = part if method == OURS else f"{part}{method.replace(' ', '_')}/"
        metrics |= {f"{start}{name}": row[name] for name in (NINE_METRICS if part else row)}
        metrics[f"{start}mean_rank"] = places[method]
    return metrics


def example(batch: Pairs, fusion: Fusion) -> Example:
    """The first pair of a batch as a row of the contact sheet."""
    chroma = batch.chroma[0]
    images = {
        "infrared": batch.infrared[0, 0],
        "visible": recolour(batch.visible[0], chroma).permute(1, 2, 0),
        "attention": fusion.attention[0, 0],
        "fused": recolour(fusion.fused[0].clamp(0, 1), chroma).permute(1, 2, 0),
        "fused luminance": fusion.fused[0, 0].clamp(0, 1),
    }
    words = f"{batch.names[0]} ({'night' if batch.night[0] else 'day'})"
    return Example(words, {name: to_array(image) for name, image in images.items()}, shares_of(fusion))


def to_array(image: Tensor) -> Any:
    """A tensor as what matplotlib draws."""
    return image.detach().cpu().numpy()


def fusion_card(model: MoEFusion, data: FusionDataModule, steps: int) -> hub.Card:
    """What a trained network says about itself."""
    kind = "MoE-Fusion" if model.mixture else "The twin of MoE-Fusion, without mixtures,"
    return hub.Card(
        title=f"{kind} for infrared and visible images",
        task="infrared and visible image fusion",
        description=(
            "Fuses the luminance of a registered pair of any size; colours come back with tasks.fusion.images.recolour."
        ),
        data=f"{data.describe()}; {steps} steps of {data.batch_size} windows of {data.crop} x {data.crop}.",
        data_terms="its trainer's to say",
        weights_licence="its trainer's to say",
        preprocessing={"infrared": "1 x H x W, 0..1", "visible": "1 x H x W BT.601 luminance, 0..1"},
    )
