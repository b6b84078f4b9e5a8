"""Average precision against arithmetic, and the real command line on generated pairs."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from command_line import sentence
from PIL import Image
from torch import Tensor

import zoo
from tasks.fusion import detection
from tasks.fusion.data import FusionDataModule, generate_pairs
from tasks.fusion.detection import (
    IMAGES,
    DetectionDataModule,
    DetectionTask,
    Detectors,
    Objects,
    mean_average_precision,
)
from tasks.fusion.model import MoEFusion
from zoo import hub
from zoo.cli import main
from zoo.errors import UnknownNameError

CONFIG = "configs/fusion/detection.yaml"
GENERATED = ["--data.sources=[generated]", "--data.test_source=generated", "--trainer.enable_progress_bar=false"]
FEW = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--data.crop=192"]


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network that fuses, untrained."""
    card = hub.Card(title="x", task="x", description="x", data="x", data_terms="x", weights_licence="x")
    return str(hub.save(MoEFusion(channels=4), tmp_path_factory.mktemp("fusion") / "checkpoint", card=card))


def objects(boxes: list[list[float]], labels: list[int], scores: list[float] | None = None) -> Objects:
    """The objects of an image."""
    found = {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.long)}
    return found if scores is None else {**found, "scores": torch.tensor(scores)}


def test_perfect_predictions_have_a_precision_of_1() -> None:
    pytest.importorskip("pycocotools")
    truth = [objects([[0.0, 0, 10, 20], [30, 30, 60, 50]], [1, 2]), objects([], []), objects([[5.0, 5, 25, 25]], [1])]
    found = [{**there, "scores": torch.ones(len(there["labels"]))} for there in truth]
    scores = mean_average_precision(found, truth, ["person", "car", "bus"])
    assert {name: value for name, value in scores.items() if "bus" not in name} == {
        **{"mAP50": 1, "mAP50/person": 1, "mAP50/car": 1},
        **{"mAP": 1, "mAP/person": 1, "mAP/car": 1},
    }
    assert math.isnan(scores["mAP50/bus"]) and math.isnan(scores["mAP/bus"])


def test_precision_of_a_case_worked_out_by_hand() -> None:
    pytest.importorskip("pycocotools")
    truth = [objects([[0.0, 0, 10, 10], [100, 100, 110, 110]], [1, 1]), objects([[0.0, 0, 10, 10]], [2])]
    # A hit, a false alarm, and a hit of IoU 0.62; the second class is missed.
    found = [objects([[0.0, 0, 10, 10], [50, 50, 60, 60], [100, 100, 110, 106.2]], [1, 1, 1], [0.9, 0.8, 0.7])]
    found.append(objects([[20.0, 20, 30, 30]], [2], [0.9]))
    scores = mean_average_precision(found, truth, ["person", "car"])
    # Of 101 recalls, 51 (0 to 0.5) have a precision of 1, and the others 2 of 3, as long as the IoU threshold allows.
    loose, strict = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert scores["mAP50/person"] == pytest.approx(loose, abs=1e-4)
    assert scores["mAP/person"] == pytest.approx((3 * loose + 7 * strict) / 10, abs=1e-4)
    assert scores["mAP50/car"] == scores["mAP/car"] == 0
    assert scores["mAP50"] == pytest.approx(loose / 2, abs=1e-4)


def test_nothing_found_is_a_precision_of_0() -> None:
    pytest.importorskip("pycocotools")
    nothing = mean_average_precision([objects([], [], [])], [objects([[0.0, 0, 9, 9]], [1])], ["person"])
    assert nothing == {"mAP50": 0, "mAP50/person": 0, "mAP": 0, "mAP/person": 0}


def test_without_pycocotools_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'moe-zoo\[detection\]'"):
        DetectionTask(images=["visible"], classes=["hot"]).setup("fit")


def test_detectors_are_alike_at_the_start_and_learn_apart() -> None:
    model = Detectors(["hot"], ["visible", "infrared"], min_size=64)
    first, second = (dict(model.by_image[image].named_parameters()) for image in model.images)
    assert len(first) > 100 and all(torch.equal(first[name], second[name]) for name in first)
    images: dict[str, Tensor] = {"visible": torch.rand(1, 3, 64, 64), "infrared": torch.rand(1, 3, 64, 64)}
    losses = model(images, [objects([[10.0, 10, 30, 50]], [1])])
    torch.stack(list(losses["visible"].values())).sum().backward()
    assert all(parameter.grad is not None for parameter in first.values())
    assert all(parameter.grad is None for parameter in second.values())


def test_what_the_detectors_look_at(fusion: str) -> None:
    data = FusionDataModule(test_source="generated")
    data.setup("test")
    batch = data.test_set[0]
    pictures = DetectionTask(fusion, ["hot"], min_size=96).pictures(batch)
    assert list(pictures) == ["visible", "infrared", "fused"]
    assert all(picture.shape == (1, 3, 192, 256) for picture in pictures.values())
    assert all(picture.min() >= 0 and picture.max() <= 1 for picture in pictures.values())
    assert torch.equal(pictures["infrared"][:, 1:2], batch.infrared)
    assert not torch.equal(pictures["visible"][:, 0], pictures["visible"][:, 2])
    luminance = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    mean = (batch.infrared + batch.visible) / 2
    # Untrained, it averages, but for colours that no screen can show.
    assert ((pictures["fused"] * luminance).sum(1, keepdim=True) - mean).abs().median() < 0.05


def test_fit_and_test_on_generated_pairs(fusion: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pycocotools")
    common = [*GENERATED, "--model.fusion", fusion, "--out", str(tmp_path)]
    main(["fit", "-c", CONFIG, *common, *FEW, "--model.classes=[hot]", "--model.min_size=96"])
    assert "backbones are untrained" in capsys.readouterr().out
    assert zoo.load(tmp_path / "checkpoint").classes == ["hot"]
    metrics = main(["test", str(tmp_path / "checkpoint"), *common, "--trainer.limit_test_batches=3"])
    said = capsys.readouterr().out
    assert "3 labelled images are too few to claim anything" in said and "untrained" not in said
    names = ("mAP50", "mAP", "mAP50/hot", "mAP/hot")
    assert set(metrics) == {f"{image}/{name}" for image in IMAGES for name in names}
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    assert len(rows) == 3 * len(IMAGES) and set(rows["image"]) == set(IMAGES)
    # The file is enough to score again.
    own = rows[rows["image"] == "infrared"]
    found = [objects([list(b) for b in r.boxes], [1] * len(r.labels), list(r.scores)) for r in own.itertuples()]
    truth = [objects([list(b) for b in r.true_boxes], [1] * len(r.true_labels)) for r in own.itertuples()]
    assert sum(len(there["labels"]) for there in truth) > 0
    assert mean_average_precision(found, truth, ["hot"])["mAP"] == pytest.approx(metrics["infrared/mAP"])


def test_one_of_several_processes_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocotools")
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    fit = ["fit", "-c", CONFIG, "--model.classes=[hot]", "--model.min_size=96", *FEW, *GENERATED]
    main([*fit, "--model.fusion=null", "--model.images=[visible]", "--out", str(tmp_path)])
    assert not (tmp_path / "checkpoint").exists()


def test_detectors_are_tested_on_what_they_learned_from(fusion: str, tmp_path: Path, capsys) -> None:
    pytest.importorskip("pycocotools")
    fit = ["fit", "-c", CONFIG, "--model.classes=[hot]", "--model.min_size=96", *FEW, GENERATED[-1]]
    main([*fit, *GENERATED, "--model.fusion", fusion, "--out", str(tmp_path / "run")])
    few = [GENERATED[-1], "--trainer.limit_test_batches=1", "--out", str(tmp_path / "out")]
    assert "fused/mAP" in main(["test", str(tmp_path / "run/checkpoint"), *few])
    assert pd.read_parquet(tmp_path / "out/predictions.parquet")["id"].str.startswith("synthetic").all()
    boxes = {}
    for place, pair in enumerate(generate_pairs(0)[:6]):
        for band, pixels in zip(("ir", "vi"), pair.read(), strict=True):
            (tmp_path / band).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / band / f"{place}.png")
        boxes[str(place)] = [{"label": "hot", "xyxy": xyxy} for xyxy in pair.boxes.tolist()]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    own = [f"--data.folder={tmp_path}"]
    main([*fit, *own, "--model.fusion=null", "--model.images=[visible]", "--out", str(tmp_path / "own")])
    assert "--data.folder DIR" in sentence(capsys, "test", str(tmp_path / "own/checkpoint"), *few)
    assert "visible/mAP" in main(["test", str(tmp_path / "own/checkpoint"), *few, *own])


def test_scoring_counts_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocotools")
    data = DetectionDataModule(sources=["generated"], test_source="generated")
    data.setup("test")
    task = DetectionTask(images=["visible", "infrared"], classes=["hot"], min_size=96).eval()
    task.begin()
    for pair in (data.test_set[i] for i in range(2)):
        right = {**task.targets(pair)[0], "scores": torch.ones(len(pair.boxes[0]))}
        wrong = {**right, "boxes": right["boxes"] + 100}
        monkeypatch.setattr(task.model, "forward", lambda images, a=right, b=wrong: {"visible": [b], "infrared": [a]})
        task.test_step(pair, 0)
    scores = task.scores()
    assert scores["infrared"]["mAP"] == 1 and scores["visible"]["mAP50"] < 0.5


def test_only_annotated_pairs_are_used(tmp_path: Path) -> None:
    for band in ("ir", "vi"):
        (tmp_path / band).mkdir()
        for name in ("a", "b", "c"):
            Image.fromarray(np.zeros((40, 50), np.uint8)).save(tmp_path / band / f"{name}.png")
    with pytest.raises(ValueError, match="3 pairs is annotated"):
        DetectionDataModule(folder=str(tmp_path)).setup("test")
    (tmp_path / "boxes.json").write_text(json.dumps({"b": [{"label": "person", "xyxy": [1, 2, 30, 20]}], "c": []}))
    data = DetectionDataModule(folder=str(tmp_path))
    data.setup("test")
    assert [pair.name for pair in data.test_set.pairs] == ["b", "c"]
    whole = FusionDataModule(folder=str(tmp_path))
    whole.setup("test")
    with pytest.raises(ValueError, match=r"a: not all are annotated.*DetectionDataModule"):
        DetectionTask(images=["visible"], classes=["person"]).targets(whole.test_set[0])


def test_wrong_words(fusion: str) -> None:
    with pytest.raises(UnknownNameError, match="visible"):
        DetectionTask(images=["visibel"], classes=["hot"])
    with pytest.raises(ValueError, match=r"classes=\[\]"):
        DetectionTask(images=["visible"])
    with pytest.raises(ValueError, match=r"--model\.fusion NAME"):
        DetectionTask(classes=["hot"])
    with pytest.raises(ValueError, match="needed is a Detectors"):
        DetectionTask(pretrained=fusion)


@pytest.mark.skipif(not os.environ.get("MOE_ZOO_DATA"), reason="MOE_ZOO_DATA names no data")
def test_the_labelled_pairs_of_llvip_mini() -> None:
    data = DetectionDataModule(sources=["llvip_mini"], test_source="llvip_mini", crop=1024)
    data.setup()
    parts = data.pairs_by_part()
    assert sum(map(len, parts.values())) == 11 and len(parts["test"]) == 2
    assert sum(len(pair.boxes) for part in parts.values() for pair in part) == 48
    assert {label for part in parts.values() for pair in part for label in pair.labels} == {"person"}
