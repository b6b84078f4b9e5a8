"""Detectors that share their features, the attention they give, and what reaches them in training."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import mobilenet_v3_large

import zoo
from tasks.fusion.data import FusionDataModule
from tasks.fusion.detector import DetectorAttention, as_targets, dice_loss, faster_rcnn, start_backbones
from tasks.fusion.model import MoEFusion
from tasks.fusion.task import FusionTask
from zoo import hub
from zoo.cli import main
from zoo.errors import UnknownNameError

BOXES = [torch.tensor([[10.0, 12, 30, 52]]), torch.zeros(0, 4)]
LABELS = [["person"], []]
CARD = hub.Card(title="x", task="x", description="x", data="x", data_terms="x", weights_licence="x")


@pytest.fixture
def detector() -> DetectorAttention:
    """A new one, in training mode."""
    return DetectorAttention(["person", "car"])


def pair(batch: int = 2, height: int = 64, width: int = 80) -> tuple[Tensor, Tensor]:
    """Noise."""
    return torch.rand(batch, 1, height, width), torch.rand(batch, 1, height, width)


def gradients(module: nn.Module) -> dict[str, float | None]:
    """Largest gradient of every parameter, None where there is none."""
    return {
        name: None if parameter.grad is None else float(parameter.grad.abs().max())
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize("size", [(64, 64), (37, 70)])
def test_attention_is_a_map_between_0_and_1_without_gradient(
    detector: DetectorAttention, size: tuple[int, int]
) -> None:
    attention = detector(*pair(2, *size))
    assert attention.shape == (2, 1, *size) and not attention.requires_grad
    assert 0 <= attention.min() < attention.max() <= 1


def test_attention_is_what_the_paper_says(detector: DetectorAttention) -> None:
    detector.eval()
    for norm in (module for head in detector.attention for module in head if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.weight, 0.5, 2)
    bands = pair(1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        maps = []
        pyramids = []
        for band, stream in zip(bands, detector.streams, strict=True):
            image = (band.repeat(1, 3, 1, 1) - mean[:, None, None]) / std[:, None, None]
            pyramids.append(stream.backbone(functional.pad(image, (0, 48))))
        common = detector.common[0]
        weight = common.weight[:, :, 0, 0]
        both = torch.cat([own["0"] for own in pyramids], 1)
        shared = (torch.einsum("oc,bchw->bohw", weight, both) + common.bias[:, None, None]).relu()
        for own, head in zip(pyramids, detector.attention, strict=True):
            x = head[0](own["0"] + shared)
            x = (x - head[1].running_mean[:, None, None]) / (head[1].running_var[:, None, None] + 1e-5).sqrt()
            x = head[3]((x * head[1].weight[:, None, None] + head[1].bias[:, None, None]).relu())
            x = (x - head[4].running_mean) / (head[4].running_var + 1e-5).sqrt()
            maps.append((x * head[4].weight + head[4].bias).sigmoid())
        expected = functional.interpolate(torch.maximum(*maps), (64, 128), mode="bilinear")[..., :80]
        assert torch.allclose(detector(*bands), expected, atol=1e-5)
        _, features = detector.attend(detector.images(*bands))
    for own, pyramid, attention in zip(features, pyramids, maps, strict=True):
        assert torch.allclose(own["0"], (pyramid["0"] + shared) * (1 + attention), atol=1e-4)
        assert [level.shape[-1] for level in own.values()] == [32, 16, 8, 4, 2]


def test_what_fusion_wants_never_reaches_the_detectors() -> None:
    model = MoEFusion(attention="detector", classes=["person"])
    model.fuse(*pair()).fused.square().mean().backward()
    assert not any(gradients(model.detector).values())
    assert any(gradients(model.encoders).values())


def test_boxes_reach_all_of_the_detectors_and_nothing_else() -> None:
    model = MoEFusion(attention="detector", classes=["person"])
    attention, losses = model.detector.learn(*pair(), BOXES, LABELS)
    assert attention.shape == (2, 1, 64, 80) and not attention.requires_grad
    names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
    assert set(losses) == {f"{band}_{name}" for band in ("infrared", "visible") for name in names} | {"loss_attention"}
    sum(losses.values()).backward()
    assert None not in gradients(model.detector).values()
    for part in (
        "common.0.weight",
        "attention.0.0.weight",
        "attention.1.3.weight",
        "streams.0.backbone.body.0.0.weight",
    ):
        assert gradients(model.detector)[part] > 0, part
    assert not any(gradients(model.encoders).values())


def test_attention_loses_nothing_where_it_is_the_boxes() -> None:
    inside = torch.zeros(2, 1, 8, 8)
    inside[0, 0, 2:4, 2:6] = 1
    assert dice_loss(inside, inside) == 0 and dice_loss(1 - inside, inside) > 0.9
    # 8 pixels in boxes, all found, among 128 of which 16 are marked.
    twice = inside + inside.roll(4, -2)
    assert dice_loss(twice, inside) == pytest.approx(1 - (2 * 8 + 1) / (16 + 8 + 1))
    nothing = torch.zeros_like(inside)
    assert dice_loss(nothing, nothing) == 0 and dice_loss(1 + nothing, nothing) > 0.9


def test_each_band_learns_from_its_own_losses_and_from_the_other_through_what_they_share(
    detector: DetectorAttention,
) -> None:
    _, losses = detector.learn(*pair(), BOXES, LABELS)
    torch.stack([loss for name, loss in losses.items() if name.startswith("infrared")]).sum().backward()
    heads = [gradients(stream.roi_heads) for stream in detector.streams]
    assert all(value is not None for value in heads[0].values())
    assert not any(heads[1].values()) and not any(gradients(detector.attention[1]).values())
    assert any(gradients(detector.streams[1].backbone).values())


def test_the_streams_see_boxes_where_they_are_pixel_for_pixel(detector: DetectorAttention) -> None:
    infrared, visible = torch.zeros(1, 1, 70, 90), torch.zeros(1, 1, 70, 90)
    infrared[..., 12:52, 10:30] = 1
    seen, other = detector.images(infrared, visible)
    assert seen.tensors.shape == (1, 3, 128, 128) and seen.image_sizes == [(70, 90)]
    bright = (seen.tensors[0, 0] > 1).nonzero()
    assert [*bright.amin(0).tolist(), *(bright.amax(0) + 1).tolist()] == [12, 10, 52, 30]
    assert not (other.tensors > 1).any()


@pytest.mark.parametrize("scale", [0.5, 1, 3])
def test_a_box_at_another_scale_is_where_the_object_is(scale: float) -> None:
    model = faster_rcnn(["person"], min_size=96, max_size=192)
    height, width = (round(side * scale) for side in (100, 140))
    box = torch.tensor([20.0, 30, 60, 80]) * scale
    image = torch.zeros(3, height, width)
    left, top, right, bottom = box.int().tolist()
    image[:, top:bottom, left:right] = 1
    images, targets = model.transform([image], [{"boxes": box[None], "labels": torch.tensor([1])}])
    assert min(images.image_sizes[0]) == 96
    bright = (images.tensors[0, 0] > 0).nonzero()
    object_box = torch.cat([bright.amin(0).flip(0), bright.amax(0).flip(0) + 1])
    assert torch.allclose(targets[0]["boxes"][0], object_box.float(), atol=1.5)
    assert targets[0]["boxes"][0, 2] == pytest.approx(60 * scale * images.image_sizes[0][1] / width)


def test_targets_are_numbered_by_name() -> None:
    targets = as_targets(BOXES, [["car"], []], ["person", "car"])
    assert targets[0]["labels"].tolist() == [2] and targets[1]["labels"].tolist() == []
    with pytest.raises(UnknownNameError, match=r"'cat'.*car, person"):
        as_targets(BOXES, [["cat"], []], ["person", "car"])


def test_backbones_start_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, file = mobilenet_v3_large(), tmp_path / "mobilenet.pt"
    torch.save(whole.state_dict(), file)
    models = [faster_rcnn(["person"]) for _ in range(2)]
    start_backbones(models, str(file))
    for model in models:
        body = model.backbone.body.state_dict()
        assert len(body) > 100
        assert all(torch.equal(value, whole.state_dict()[f"features.{key}"]) for key, value in body.items())
    assert not capsys.readouterr().out
    start_backbones(models, None)
    assert "untrained" in capsys.readouterr().out
    torch.save({"features.0.0.weight": torch.zeros(16, 3, 3, 3)}, file)
    with pytest.raises(ValueError, match=r"mobilenet_v3_large: Missing key"):
        start_backbones(models, str(file))
    with pytest.raises(UnknownNameError, match="IMAGENET1K_V2"):
        start_backbones(models, "IMAGENET1K_V9")


def test_a_network_with_detectors_is_stored_whole(tmp_path: Path) -> None:
    model = MoEFusion(attention="detector", classes=["person", "car"]).eval()
    hub.save(model, tmp_path / "checkpoint", card=CARD, golden_input=pair(1))
    stored = zoo.load(tmp_path / "checkpoint")
    bands = pair(1, 33, 50)
    assert stored.classes == ["person", "car"] and torch.equal(stored(*bands), model(*bands))


def test_detectors_and_classes_go_together() -> None:
    for arguments in ({"attention": "detector"}, {"classes": ["person"]}):
        with pytest.raises(ValueError, match="a detector needs classes"):
            MoEFusion(**arguments)
    with pytest.raises(ValueError, match="new networks"):
        FusionTask(weights_backbone="IMAGENET1K_V1")


def test_boxes_are_needed_to_learn_and_not_afterwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--data.sources=[generated]", "--data.test_source=generated", "--trainer.enable_progress_bar=false"]
    small += ["--data.crop=64", "--data.batch_size=2", "--trainer.limit_train_batches=2", "--trainer.max_epochs=1"]
    small += ["--trainer.limit_val_batches=1", "--trainer.log_every_n_steps=1", "--out", str(tmp_path)]
    network = ["--model.network={attention: detector, classes: [hot]}"]
    main(["fit", "-c", "configs/fusion/roadscene.yaml", *network, *small])
    assert "backbones are untrained" in capsys.readouterr().out
    assert "train_infrared_loss_objectness" in next(tmp_path.rglob("logs/**/metrics.csv")).read_text()
    model = zoo.load(tmp_path / "checkpoint")
    data = FusionDataModule(sources=["generated"], crop=64, batch_size=2)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    batch.boxes = batch.labels = None
    assert model.fuse(batch.infrared, batch.visible).attention.shape == (2, 1, 64, 64)
    task = FusionTask(pretrained=str(tmp_path / "checkpoint"))
    with pytest.raises(ValueError, match=r"synthetic_.* is not annotated throughout"):
        task.learn(task.model.detector, batch)
