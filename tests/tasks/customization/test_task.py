"""The real command line over every shipped config, on data made at run time or, where there is some, on real data."""

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
from handwriting import write_class_folders, write_emnist
from pytorch_lightning.accelerators import CUDAAccelerator

import zoo
from tasks.customization.characters import CHARACTERS, MERGED_CHARACTERS, label_of_folder
from tasks.customization.data import CharacterDataModule, Samples, read_image, to_float, write_all_classes
from tasks.customization.demo import main as demo
from tasks.customization.task import GlobalExpertTask, expert_card
from zoo import hub
from zoo.cli import main
from zoo.errors import DataNotFoundError

CHECKPOINTS = ("customization/lenet5-emnist", "customization/lenet-large-emnist")
QUICK = "--model.recipe={expert_steps: 60, gate_steps: 60, copies: 1}"
NO_BAR = "--trainer.enable_progress_bar=false"
real_data = pytest.mark.skipif(not os.environ.get("MOE_ZOO_DATA"), reason="MOE_ZOO_DATA names no data")


def synthetic(user: str) -> list[str]:
    return ["--data.source=synthetic", f"--data.user={user}", "--data.generic=generated"]


@pytest.mark.parametrize("variant", ["lenet5", "lenet-large"])
def test_train_a_global_expert_then_customise_it(variant: str, tmp_path: Path) -> None:
    small = ["--data.source=generated", "--data.writers=10", "--data.samples_per_class=1", "--trainer.max_epochs=1"]
    config = f"configs/customization/{variant}-emnist.yaml"
    main(["fit", "-c", config, *small, NO_BAR, "--out", str(tmp_path / "expert")])
    metrics = main(["test", "-c", config, *small, NO_BAR, "--out", str(tmp_path / "expert"), "--ckpt_path", "last"])
    assert set(metrics) == {"loss", "accuracy"}
    folder = tmp_path / "expert/checkpoint"
    hub.verify(folder)
    trained = torch.load(tmp_path / "expert/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, value in zoo.load(folder).global_expert.state_dict().items():
        assert torch.equal(value, trained[f"model.{name}"])
    user = ["fit", "-c", "configs/customization/user.yaml", "--model.pretrained", str(folder), QUICK]
    main([*user, *synthetic("synthetic-5"), "--out", str(tmp_path / "user")])
    customised = zoo.load(tmp_path / "user/customized/synthetic-5")
    assert torch.equal(customised.global_expert.conv1.weight, trained["model.conv1.weight"])


def test_one_of_several_processes_saves_the_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    small = ["--data.source=generated", "--data.writers=3", "--data.samples_per_class=1", "--trainer.max_epochs=1"]
    main(["fit", "-c", "configs/customization/lenet5-emnist.yaml", *small, NO_BAR, "--out", str(tmp_path)])
    assert not (tmp_path / "checkpoint").exists()


def test_customization_is_for_one_process_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [QUICK, *synthetic("synthetic-0"), NO_BAR, "--out", str(tmp_path)]
    commands = (["fit", "-c", "configs/customization/user.yaml"], ["test", CHECKPOINTS[0]], ["predict", CHECKPOINTS[0]])
    with monkeypatch.context() as patch:
        patch.setattr(pl.Trainer, "accelerator", CUDAAccelerator())
        for command in commands:
            line = sentence(capsys, *command, *words)
            assert "The trainer runs on CUDA; customization is for the CPU" in line
            assert line.endswith("Set --trainer.accelerator=cpu.")
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    assert "has 2 processes. One user is customised for at a time." in sentence(capsys, *commands[0], *words)


def test_fit_a_user_saves_a_model_and_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["fit", "-c", "configs/customization/user.yaml"]
    main([*config, *synthetic("synthetic-1"), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "synthetic-1 (synthetic)" in printed and printed.splitlines()[-1] == str(tmp_path)
    assert (tmp_path / "repairs-synthetic-1.png").is_file()
    customised, base = zoo.load(tmp_path / "customized/synthetic-1"), zoo.load(CHECKPOINTS[0])
    assert all(map(torch.equal, customised.global_expert.parameters(), base.global_expert.parameters()))
    own = write_all_classes(10_001, 3)
    answers = [model(to_float(own.images)).argmax(1) for model in (base, customised)]
    assert not torch.equal(*answers)

    main(["predict", str(tmp_path / "customized/synthetic-1"), NO_BAR, "--out", str(tmp_path)])
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    assert list(rows.id) == [f"synthetic-1/{number}" for number in range(744)]
    assert (rows.expert == "local").mean() > 0.5
    assert (rows.prediction == rows.target).mean() > (rows.global_prediction == rows.target).mean()


def test_a_second_user_does_not_overwrite_the_first(tmp_path: Path) -> None:
    for user in ("synthetic-0", "synthetic-1"):
        main(["fit", "-c", "configs/customization/user.yaml", QUICK, *synthetic(user), "--out", str(tmp_path)])
    assert {path.name for path in (tmp_path / "customized").iterdir()} == {"synthetic-0", "synthetic-1"}


def test_a_users_own_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = write_all_classes(3, 2)
    write_class_folders(tmp_path / "data/me", samples)
    source = ["--data.source=folder", f"--data.folder={tmp_path / 'data'}", "--data.generic=none"]
    main(["fit", "-c", "configs/customization/user.yaml", QUICK, *source, "--out", str(tmp_path / "run")])
    mine = tmp_path / "run/customized/me"
    assert zoo.info(mine).card.data == "99 samples of me"
    for command in ("predict", "test"):
        line = sentence(capsys, command, str(mine), "--data.generic=generated", "--out", str(tmp_path / "run"))
        assert "Could not find the users' folder" in line and line.endswith("Name it with --data.folder DIR.")
    main(["predict", str(mine), source[1], NO_BAR, "--out", str(tmp_path / "run")])
    assert len(pd.read_parquet(tmp_path / "run/predictions.parquet")) == len(samples)
    words = [source[1], "--data.generic=generated", QUICK, NO_BAR]
    assert main(["test", str(mine), *words, "--out", str(tmp_path / "run")])["custom_acc_moe"] > 0


def test_prediction_of_a_folder_names_its_files(tmp_path: Path) -> None:
    samples = write_all_classes(3, 3)
    for user, chosen in (("me", samples.labels == 0), ("you", samples.labels % 13 == 0)):
        write_class_folders(tmp_path / "data" / user, samples[chosen])
    source = ["--data.source=folder", f"--data.folder={tmp_path / 'data'}", "--data.seeds=[1, 0]", NO_BAR]
    main(["predict", CHECKPOINTS[0], *source, "--out", str(tmp_path / "run")])
    rows = pd.read_parquet(tmp_path / "run/predictions.parquet")
    files = sorted(path.relative_to(tmp_path / "data").as_posix() for path in tmp_path.glob("data/*/*/*.png"))
    assert len(rows) == 18 and sorted(rows.id) == files, "three samples of one class, and another user's"
    assert (rows.id.str.split("/").str[1].map(label_of_folder).map(CHARACTERS.__getitem__) == rows.character).all()
    images = torch.from_numpy(np.stack([read_image(tmp_path / "data" / name) for name in rows.id]))
    answers = zoo.load(CHECKPOINTS[0])(to_float(images)).argmax(1)
    assert [MERGED_CHARACTERS[answer] for answer in answers] == rows.global_prediction.to_list()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shipped_checkpoints_verify_and_score(name: str, tmp_path: Path) -> None:
    hub.verify(name)
    words = [*synthetic("synthetic-2"), "--data.seeds=[0]", QUICK, NO_BAR]
    metrics = main(["test", name, *words, "--out", str(tmp_path)])
    wanted = "custom_acc_ge custom_acc_moe generic_acc_ge generic_acc_moe oracle_share overhead_params overhead_energy"
    assert set(wanted.split()) | {"replay_bytes", "seconds_per_user"} <= set(metrics)
    assert metrics["overhead_params"] <= 2.5 and metrics["overhead_energy"] <= 2.5
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    predictions = pd.read_parquet(tmp_path / "predictions.parquet")
    assert list(predictions) == ["id", "character", "target", "global_prediction", "prediction", "expert"]
    right = 100 * (predictions.prediction == predictions.target).mean()
    assert right == pytest.approx(metrics["custom_acc_moe"], abs=1e-3), "anyone can re-score the predictions"
    assert (tmp_path / "users.png").is_file()


def test_every_shipped_config_is_driven_here() -> None:
    shipped = {path.name for path in (hub.assets() / "configs/customization").glob("*.yaml")}
    assert shipped == {"lenet5-emnist.yaml", "lenet-large-emnist.yaml", "user.yaml", "users.yaml"}


def test_users_config_scores_every_user(tmp_path: Path) -> None:
    words = ["--data.source=synthetic", "--data.generic=generated", "--data.seeds=[0]", QUICK, NO_BAR]
    main(["test", "-c", "configs/customization/users.yaml", *words, "--out", str(tmp_path)])
    users = pd.read_parquet(tmp_path / "predictions.parquet").id.str.split("/").str[0].unique()
    assert list(users) == ["synthetic-0", "synthetic-1"]


@real_data
def test_a_real_writer_gains_and_others_lose_little(tmp_path: Path) -> None:
    metrics = main(["test", CHECKPOINTS[0], "--data.user=art-01", "--data.seeds=[0]", NO_BAR, "--out", str(tmp_path)])
    assert metrics["custom_gain"] > 15 and metrics["generic_drop"] < 1 and metrics["generic_acc_ge"] > 89


def test_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    user = ("fit", "-c", "configs/customization/user.yaml", "--out", str(tmp_path))
    assert "Did you mean 'synthetic-1'" in sentence(capsys, *user, "--data.source=synthetic", "--data.user=synthetc-1")
    assert "Did you mean 'max_drop'" in sentence(
        capsys, *user, *synthetic("synthetic-0"), "--model.recipe={max_drp: 1}"
    )
    for field, rule in (("folds: 1", "whole number, at least 2"), ("expert_steps: 60.0", "whole number, at least 1")):
        assert rule in sentence(capsys, *user, *synthetic("synthetic-0"), f"--model.recipe={{{field}}}")
    assert "Did you mean 'customization/lenet5-emnist'" in sentence(
        capsys, *user, *synthetic("synthetic-0"), "--model.pretrained=customization/lenet5-mnist"
    )
    assert "one user at a time, found synthetic-0 (seed 0), synthetic-1 (seed 0)" in sentence(
        capsys, *user, "--data.source=synthetic", "--data.generic=none"
    )
    words = ("--data.source=synthetic", "--data.user=synthetic-0", "--data.generic=none", QUICK)
    assert "no generic test images" in sentence(capsys, "test", CHECKPOINTS[0], *words, NO_BAR, "--out", str(tmp_path))


@pytest.mark.parametrize("config", ["lenet5-emnist", "user"])
def test_a_folder_that_would_not_be_read_is_refused(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "-c", f"configs/customization/{config}.yaml", f"--data.folder={tmp_path}", "--out", str(tmp_path)]
    line = sentence(capsys, *words)
    assert f"folder='{tmp_path}' has no effect on source=" in line and "it is for source='folder'" in line


def test_a_user_of_too_few_samples_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = write_all_classes(3, 1)
    write_class_folders(tmp_path / "data/me", Samples(few.images[:3], few.labels[:3]))
    words = ["--data.source=folder", f"--data.folder={tmp_path / 'data'}", "--data.generic=none"]
    line = sentence(capsys, "fit", "-c", "configs/customization/user.yaml", *words, "--out", str(tmp_path / "run"))
    assert "has 3 samples; at least 5" in line


def test_a_damaged_checkpoint_and_options_in_the_wrong_place_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(zoo.info(CHECKPOINTS[0]).path, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    line = sentence(capsys, "test", str(folder), *synthetic("synthetic-0"), "--out", str(tmp_path / "run"))
    assert line.startswith(f"moe-zoo: {folder / 'model.safetensors'} is damaged")
    assert "put -c CONFIG first" in sentence(capsys, "fit", "--data.user=me", "-c", "configs/customization/user.yaml")
    assert "give -c CONFIG" in sentence(capsys, "fit")


def test_the_card_says_what_the_expert_was_trained_on() -> None:
    card = expert_card("lenet5", 47, CharacterDataModule(source="generated"), 3)
    assert "synthetic" in card.title and "3 epochs" in card.data and "torchvision" not in card.description
    assert "47 merged classes" in card.task and len(card.classes) == 47
    assert "EMNIST" in expert_card("lenet5", 47, CharacterDataModule(), 12).title
    digits = expert_card("lenet5", 10, CharacterDataModule(source="torchvision", split="digits"), 1)
    assert digits.data == "nine tenths of the official training part of EMNIST's split digits, 1 epochs."
    assert "the first 10 of 47 merged classes" in digits.task and digits.classes == list("0123456789")
    with pytest.raises(ValueError, match="num_classes=62: must be between 1 and 47"):
        GlobalExpertTask(num_classes=62)


def test_an_expert_of_an_official_split_says_so(tmp_path: Path) -> None:
    ink = np.random.default_rng(0).integers(0, 256, (40, 28, 28)).astype(np.uint8)
    write_emnist(tmp_path, "digits", ink, (np.arange(40) % 10).astype(np.uint8))
    words = ["--data.source=torchvision", "--data.split=digits", f"--data.root={tmp_path}", "--model.num_classes=10"]
    config = ["fit", "-c", "configs/customization/lenet5-emnist.yaml"]
    main([*config, *words, "--trainer.max_epochs=1", NO_BAR, "--out", str(tmp_path / "run")])
    card = zoo.info(tmp_path / "run/checkpoint").card
    assert "nine tenths" in card.data and "split digits" in card.data and "first 10 of 47" in card.task


def test_demo_of_a_writer_needs_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_ZOO_DATA", raising=False)
    with pytest.raises(DataNotFoundError, match="apa-00"):
        demo(["--user", "apa-00"])


def test_demo_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("MOE_ZOO_DATA", raising=False)
    demo(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "(synthetic)" in printed and "Try next:" in printed and "MOE_ZOO_DATA=DIR" in printed
    assert (tmp_path / "synthetic-4.png").is_file()
