"""The three hooks, the metrics of each split, and auxiliary losses once per step."""

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from routed_toy import RoutedToy, RoutedToyData

from zoo.moe import collect_aux_losses
from zoo.task import MoETask, warmup_cosine


def trainer(tmp_path: Path) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


def test_fit_logs_every_split_and_auxiliary_losses(tmp_path: Path) -> None:
    run, task = trainer(tmp_path), RoutedToy()
    run.fit(task, RoutedToyData())
    assert {"train_loss", "val_loss", "train_mse", "val_mse", "train_importance_loss"} <= set(run.callback_metrics)
    assert not collect_aux_losses(task).values, "collected once per step"


def test_auxiliary_losses_are_part_of_the_training_loss() -> None:
    task = RoutedToy()
    task.log = task.log_dict = lambda *args, **options: None
    batch = [torch.randn(8, 4), torch.randn(8, 1)]
    torch.manual_seed(0)
    with_aux = task.training_step(batch, 0)
    torch.manual_seed(0)
    task_loss = task.step(batch).loss
    torch.testing.assert_close(with_aux, task_loss + collect_aux_losses(task).total)


def test_report_returns_and_writes_the_test_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, task = trainer(tmp_path), RoutedToy()
    run.test(task, RoutedToyData(), verbose=False)
    task.prediction_rows = [{"id": 1, "target": 2.0}]
    metrics = task.report(tmp_path)
    assert set(metrics) == {"loss", "mse"} and metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert "mse" in capsys.readouterr().out and (tmp_path / "predictions.parquet").is_file()


def test_learning_rate_rises_then_falls_to_zero_for_any_number_of_steps() -> None:
    factors = [warmup_cosine(step, 100, 0.25) for step in range(101)]
    assert factors[24] == max(factors) == 1 and factors == sorted(factors[:25]) + sorted(factors[25:], reverse=True)
    assert factors[100] == pytest.approx(0)
    for steps in range(1, 6):
        assert all(0 <= warmup_cosine(step, steps, 0.25) <= 1 for step in range(steps + 1))


def test_a_task_without_model_or_step_says_so() -> None:
    with pytest.raises(TypeError, match="configure_models"):
        MoETask()
    with pytest.raises(TypeError, match="must define step"):
        MoETask.step(RoutedToy(), None)
