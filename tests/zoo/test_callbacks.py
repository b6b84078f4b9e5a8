"""Exact resuming, balancing and health inside a Lightning loop."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from routed_toy import RoutedToy, RoutedToyData

from zoo.callbacks import BiasBalancing, FreezeRouting, GateTemperature, GlobalBatchBalancing, UsageHealth
from zoo.cli import main
from zoo.moe import DenseToSparseRouter, GroupedExperts, MoELayer, StableMoERouter, TopKRouter

CONFIG = {
    "model": {"class_path": "routed_toy.RoutedToy"},
    "data": {"class_path": "routed_toy.RoutedToyData"},
    "trainer": {
        "max_epochs": 4,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}


def last(folder: Path) -> dict[str, object]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_killed_run_resumes_with_the_result_of_an_uninterrupted_one(tmp_path: Path, num_workers: int) -> None:
    config = {**CONFIG, "data": {**CONFIG["data"], "init_args": {"num_workers": num_workers}}}
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(config))
    die = {"class_path": "routed_toy.Die", "init_args": {"step": 13}}
    config["trainer"] = {**CONFIG["trainer"], "callbacks": [die]}
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(config))

    root, helpers = Path(__file__).parents[2], Path(__file__).parents[1] / "helpers"
    killed = subprocess.run(
        [sys.executable, "-m", "zoo", "fit", "-c", str(tmp_path / "killed.yaml"), "--out", str(tmp_path / "resumed")],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{helpers}"},
        cwd=tmp_path,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert last(tmp_path / "resumed")["epoch"] == 1, "two epochs of five steps were finished"

    whole = str(tmp_path / "whole.yaml")
    main(["fit", "-c", whole, "--out", str(tmp_path / "resumed"), "--ckpt_path", "last"])
    main(["fit", "-c", whole, "--out", str(tmp_path / "whole")])
    resumed, uninterrupted = last(tmp_path / "resumed"), last(tmp_path / "whole")
    assert resumed["global_step"] == uninterrupted["global_step"] == 20
    for name, weight in uninterrupted["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], weight), name


def test_the_last_epoch_is_kept_where_the_best_is_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    main(["fit", "-c", str(tmp_path / "toy.yaml"), "--model.lr", "0", "--out", str(tmp_path)])
    assert last(tmp_path)["epoch"] == 3
    assert torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)["epoch"] == 0


def fit(task: pl.LightningModule, *callbacks: pl.Callback, tmp_path: Path, **options: object) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(task, RoutedToyData())
    return trainer


def test_bias_moves_once_per_optimiser_step(tmp_path: Path) -> None:
    task = RoutedToy()
    task.model[2] = MoELayer(TopKRouter(4, 4, 1, score="sigmoid", selection_bias=True), GroupedExperts(4, 4, 8))
    seen = []
    update = task.model[2].router.update_bias
    task.model[2].router.update_bias = lambda counts, rate: (seen.append(int(counts.sum())), update(counts, rate))
    fit(task, BiasBalancing(0.01), tmp_path=tmp_path, accumulate_grad_batches=2)
    assert seen == [16, 16, 8]
    assert task.model[2].router.expert_bias.abs().max() > 0


def test_health_is_logged_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = RoutedToy()
    trainer = fit(task, UsageHealth(), tmp_path=tmp_path)
    assert {"health/model.2/max_load", "health/model.2/dead_experts"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["health/model.2/slots_per_unit"] == 2
    assert capsys.readouterr().out.startswith("model.2: ")
    assert not task.model[2]._observers


def test_health_is_that_of_training_alone(tmp_path: Path) -> None:
    health = UsageHealth()
    fit(RoutedToy(), health, tmp_path=tmp_path, val_check_interval=0.4)
    assert health.usages["model.2"].units == 40, "validation has as many rows, twice"
    assert health.usages["model.2"].counts.sum() == 80


def test_windows_cover_an_optimiser_step(tmp_path: Path) -> None:
    task, seen = RoutedToy(), []
    layer = MoELayer(TopKRouter(4, 4, 1), GroupedExperts(4, 4, 8), aux_losses={"load_balancing": 0.1})
    task.model[2] = layer

    class Watch(pl.Callback):
        def on_train_batch_end(self, *args: object) -> None:
            total = layer.count_window.total
            seen.append(0 if total is None else int(total.sum()))

    fit(task, GlobalBatchBalancing(), Watch(), tmp_path=tmp_path, accumulate_grad_batches=2)
    assert seen == [8, 0, 8, 0, 0], "steps end at batches 2, 4 and 5"
    assert layer.count_window is None
    with pytest.raises(ValueError, match="load_balancing"):
        fit(RoutedToy(), GlobalBatchBalancing(), tmp_path=tmp_path)


def test_gate_temperature_falls_with_the_step(tmp_path: Path) -> None:
    task, seen = RoutedToy(), []
    router = DenseToSparseRouter(4, 4)
    task.model[2] = MoELayer(router, GroupedExperts(4, 4, 8))
    task.model[2].observe_routing(lambda routing: seen.append(float(router.temperature)))
    fit(task, GateTemperature(2.0, 1.0, steps=2, sparse_after=4), tmp_path=tmp_path, num_sanity_val_steps=0)
    assert seen[:5] == [2.0, 1.5, 1.0, 1.0, 0.0]
    for options in ({"end": 3.0}, {"end": 0.0}, {"steps": 7000}):
        with pytest.raises(ValueError, match="must"):
            GateTemperature(**options)
    with pytest.raises(ValueError, match="no DenseToSparseRouter"):
        fit(RoutedToy(), GateTemperature(), tmp_path=tmp_path)


def test_routing_is_frozen_at_its_step(tmp_path: Path) -> None:
    task, seen = RoutedToy(), []
    router = StableMoERouter(4, 4, vocab_size=2)
    layer = MoELayer(router, GroupedExperts(4, 4, 8))
    layer.forward = lambda x, forward=layer.forward: forward(x, token_ids=(x[:, 0] > 0).long())
    task.model[2] = layer
    layer.observe_routing(lambda routing: seen.append(bool(router.frozen)))
    fit(task, FreezeRouting(3), tmp_path=tmp_path, num_sanity_val_steps=0)
    assert seen[:5] == [False, False, False, True, True]
