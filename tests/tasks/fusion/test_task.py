"""The real command line on generated pairs."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from command_line import sentence
from PIL import Image

import zoo
from tasks.fusion.metrics import METRICS, NINE_METRICS
from zoo import hub
from zoo.cli import main
from zoo.errors import UnknownNameError

GENERATED = ["--data.sources=[generated]", "--data.test_source=generated", "--trainer.enable_progress_bar=false"]
ONE_EPOCH = ["--data.crop=64", "--data.crops_per_image=1", "--trainer.max_epochs=1", "--data.batch_size=12"]
CONFIGS = sorted(path for path in Path("configs/fusion").glob("*.yaml") if path.stem != "detection")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    small = ["--data.crop=64", "--data.crops_per_image=1", "--trainer.max_epochs=2", "--data.batch_size=12"]
    main(["fit", "-c", "configs/fusion/roadscene.yaml", *GENERATED, *small, "--out", str(folder)])
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Two folders of three pairs of the user's own, in colour, of different sizes."""
    random = np.random.default_rng(0)
    for place, size in enumerate([(48, 50), (51, 64), (64, 49)]):
        for band, shape in (("ir", size), ("vi", (*size, 3))):
            (tmp_path / band).mkdir(exist_ok=True)
            pixels = random.integers(256, size=shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / band / f"scene {place}.png")
    return tmp_path


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_learns(config: Path, tmp_path: Path) -> None:
    main(["fit", "-c", str(config), *GENERATED, *ONE_EPOCH, "--out", str(tmp_path)])
    hub.verify(tmp_path / "checkpoint")


def test_fit_saves_the_network_as_it_is_at_the_end(trained: Path) -> None:
    state = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, value in zoo.load(trained / "checkpoint").state_dict().items():
        assert torch.equal(value, state[f"model.{name}"]), name


def test_test_scores_everything_on_the_same_pairs(trained: Path, tmp_path: Path) -> None:
    folder = str(trained / "checkpoint")
    arguments = ["-c", "configs/fusion/roadscene.yaml", "--model.pretrained", folder, "--model.twin", folder]
    metrics = main(["test", *arguments, *GENERATED, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
    for method in ("", "twin/", "random_gates/", "laplacian/", "infrared/"):
        assert {f"{method}{name}" for name in (*METRICS, "mean_rank")} <= set(metrics)
    for part in ("day/", "night/", "day/twin/"):
        assert {f"{part}{name}" for name in (*NINE_METRICS, "mean_rank")} <= set(metrics)
    assert 1 <= metrics["mean_rank"] <= 6 and metrics["mean_rank"] == metrics["twin/mean_rank"]
    assert metrics["minus_twin/EN"] == metrics["minus_twin/EN/low"] == 0
    assert {"gate_rho/foreground", "gate_rho/background", "gate_rho/whole"} <= set(metrics)
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    assert len(rows) == 8 and rows["EN"].mean() == pytest.approx(metrics["EN"])
    assert np.allclose(np.stack(rows["experts_whole"]).sum(1), 1)
    assert (tmp_path / "pairs.png").exists() and (tmp_path / "gates.png").exists()


def test_predict_writes_colour_images_under_their_own_names_and_goes_on(trained: Path, own: Path, capsys) -> None:
    out = own / "fused"
    arguments = ["predict", "-c", "configs/fusion/roadscene.yaml", "--model.pretrained", str(trained / "checkpoint")]
    arguments += ["--data.ir", str(own / "ir"), "--data.vi", str(own / "vi"), "--out", str(out), GENERATED[-1]]
    main(arguments)
    written = sorted(out.glob("*.png"))
    assert [path.name for path in written] == ["scene 0.png", "scene 1.png", "scene 2.png"]
    for path in written:
        with Image.open(path) as fused, Image.open(own / "vi" / path.name) as visible:
            assert fused.size == visible.size and fused.mode == "RGB"
    # What an interrupted run has left is kept, the rest is done.
    written[1].unlink()
    before = written[0].stat().st_mtime_ns
    main(arguments)
    assert written[1].exists() and written[0].stat().st_mtime_ns == before
    rows = pd.read_parquet(out / "predictions.parquet")
    assert rows["new"].tolist() == [False, True, False]


def test_predict_says_which_images_of_a_twin_are_new(own: Path, tmp_path: Path) -> None:
    arguments = ["predict", "fusion/twin-roadscene", "--data.ir", str(own / "ir"), "--data.vi", str(own / "vi")]
    arguments += ["--out", str(tmp_path / "fused"), GENERATED[-1]]
    main(arguments)
    (tmp_path / "fused/scene 2.png").unlink()
    main(arguments)
    assert pd.read_parquet(tmp_path / "fused/predictions.parquet")["new"].tolist() == [False, False, True]


def test_one_of_several_processes_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    fit = ["fit", "-c", "configs/fusion/twin.yaml", *GENERATED, *ONE_EPOCH, "--trainer.limit_train_batches=1"]
    main([*fit, "--out", str(tmp_path)])
    assert not (tmp_path / "checkpoint").exists()


def test_predict_never_writes_among_the_sources(trained: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in own.rglob("*.png")}
    words = sentence(
        capsys,
        *("predict", "-c", "configs/fusion/roadscene.yaml", "--model.pretrained", str(trained / "checkpoint")),
        *("--data.ir", str(own / "ir"), "--data.vi", str(own / "vi"), "--out", str(own / "vi"), GENERATED[-1]),
    )
    assert "holds the sources" in words
    assert {path: path.read_bytes() for path in own.rglob("*.png")} == before


def test_a_checkpoint_is_tested_on_what_it_learned_from(trained: Path, tmp_path: Path) -> None:
    checkpoint, few = str(trained / "checkpoint"), [GENERATED[-1], "--trainer.limit_test_batches=1"]
    metrics = main(["test", checkpoint, *few, "--out", str(tmp_path)])
    assert set(pd.read_parquet(tmp_path / "predictions.parquet")["id"].str.split("_").str[0]) == {"synthetic"}
    # The twin is that of the fit.
    assert "twin/EN" in metrics
    fit = ["fit", "-c", "configs/fusion/own.yaml", "--model.pretrained", checkpoint, *GENERATED, *ONE_EPOCH]
    main([*fit, "--out", str(tmp_path / "tuned")])
    assert "twin/EN" not in main(["test", str(tmp_path / "tuned/checkpoint"), *few, "--out", str(tmp_path)])


@pytest.mark.parametrize("named", [("--data.folder={}",), ("--data.ir={}/ir", "--data.vi={}/vi")])
def test_a_checkpoint_of_own_pairs_asks_for_them(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], named: tuple[str, ...]
) -> None:
    for band in ("ir", "vi"):
        for place in range(3, 6):
            shutil.copy(own / band / "scene 0.png", own / band / f"scene {place}.png")
    folders = [argument.format(own) for argument in named]
    assert "Name your own pairs with --data.ir DIR" in sentence(
        capsys, "fit", "-c", "configs/fusion/own.yaml", *ONE_EPOCH
    )
    run = ["fit", "-c", "configs/fusion/own.yaml", *folders, GENERATED[-1], *ONE_EPOCH, "--data.crop=48"]
    main([*run, "--out", str(tmp_path / "run")])
    checkpoint, out = str(tmp_path / "run/checkpoint"), ["--out", str(tmp_path / "out"), GENERATED[-1]]
    for command in ("test", "predict"):
        assert "set 'own'" in (words := sentence(capsys, command, checkpoint, *out)) and "--data.folder DIR" in words
    assert "names no set" in sentence(capsys, "validate", checkpoint, *out)
    main(["test", checkpoint, *folders, *out])
    assert pd.read_parquet(tmp_path / "out/predictions.parquet")["id"].tolist() == [f"scene {i}" for i in range(6)]
    main(["predict", checkpoint, *folders, *out])
    assert (tmp_path / "out/scene 5.png").is_file()


def test_no_batch_of_a_mixture_holds_a_single_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "-c", "configs/fusion/roadscene.yaml", *GENERATED, *ONE_EPOCH, "--out", str(tmp_path)]
    # Of 20 windows.
    main([*fit, "--data.batch_size=19"])
    assert (tmp_path / "checkpoint").is_dir()
    assert "Choose 2 or more" in sentence(capsys, *fit, "--data.batch_size=1")
    main([*fit, "--data.batch_size=1", "--model.network.mixture=false", "--trainer.limit_train_batches=2"])


def test_attention_of_boxes_needs_boxes(tmp_path: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = ["--model.network={attention: boxes}", *GENERATED, "--trainer.max_epochs=1", "--data.crop=64"]
    main(["fit", "-c", "configs/fusion/roadscene.yaml", *boxes, "--data.crops_per_image=1", "--out", str(tmp_path)])
    folders = ["--data.ir", str(own / "ir"), "--data.vi", str(own / "vi"), "--out", str(tmp_path / "out")]
    model = ["--model.pretrained", str(tmp_path / "checkpoint")]
    words = sentence(capsys, "predict", "-c", "configs/fusion/roadscene.yaml", *model, *folders, GENERATED[-1])
    assert "scene 0" in words and "attention='saliency'" in words


def test_wrong_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from tasks.fusion.task import FusionTask

    with pytest.raises(UnknownNameError, match="gradient"):
        FusionTask(losses={"gradiant": 1.0})
    with pytest.raises(UnknownNameError, match="channels"):
        FusionTask(network={"chanels": 8})
    with pytest.raises(ValueError, match="brings its own"):
        FusionTask(network={"channels": 8}, pretrained="fusion/x")
    with pytest.raises(ValueError, match="MoEFusion"):
        FusionTask(pretrained="customization/lenet5-emnist")


@pytest.mark.skipif(not os.environ.get("MOE_ZOO_DATA"), reason="MOE_ZOO_DATA names no data")
def test_real_pairs_are_read_and_scored(trained: Path, tmp_path: Path) -> None:
    arguments = ["--model.pretrained", str(trained / "checkpoint"), "--trainer.limit_test_batches=2", GENERATED[-1]]
    metrics = main(["test", "-c", "configs/fusion/roadscene.yaml", *arguments, "--out", str(tmp_path)])
    assert metrics["infrared/MI_ir"] > metrics["visible/MI_ir"] > 0
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", ["fusion/moe-fusion-roadscene", "fusion/twin-roadscene"])
def test_shipped_checkpoints_verify(name: str) -> None:
    hub.verify(name)
