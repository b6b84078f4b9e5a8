"""Scores, overhead and figures against hand computation."""

from pathlib import Path

import pytest
import torch
from sklearn.metrics import accuracy_score

from tasks.customization.evaluate import accuracy, overhead, plot_repairs, plot_users, score_user, summarize
from tasks.customization.model import CustomizedLeNet


def test_overhead_by_hand(model: CustomizedLeNet) -> None:
    cost = overhead(model)
    assert cost["global"] == {
        "parameters": 64_851,
        "macs": 419_628,
        "additions": 0,
        "picojoule": pytest.approx(419_628 * 4.6 + 64_851 * 5),
    }
    hidden, early = 120 + 84, 12 * 6 + 2 * 16 + 2 + 8
    expert, gate = hidden * 5 + 5 * 47 + 47, early + 13 + 1
    assert cost["added"]["parameters"] == expert + gate == 1_430
    pooled = 6 * 14 * 14
    products = hidden * 5 + 5 * 47 + early + 13
    assert cost["added"]["macs"] == products + pooled + 16 * 25 + 784 + 47 * 23
    assert cost["added"]["additions"] == 3 * pooled + 16 * 25 + 17 * 784 + 6 * 47
    for quantity in ("parameters", "macs", "picojoule"):
        assert cost["added"][quantity] <= 0.025 * cost["global"][quantity], quantity


def test_scores_against_scikit_learn(model: CustomizedLeNet) -> None:
    torch.manual_seed(0)
    torch.nn.init.normal_(model.local_expert.bias)
    torch.nn.init.normal_(model.gate.linear.weight)
    model.threshold.fill_(0.5)
    images, labels = torch.rand(60, 1, 28, 28), torch.randint(47, (60,))
    labels[:30] = model(images).argmax(1)[:30]
    features = model.features(images)
    row = score_user(model, (features, labels), (features, labels))
    mixed, routing = model(images, return_routing=True)
    first, second = features.logits.argmax(1), model.local_expert((features.logits, features.hidden)).argmax(1)
    assert row["moe"] == pytest.approx(100 * accuracy_score(labels, mixed.argmax(1)), abs=1e-4)
    assert row["ge"] == pytest.approx(100 * accuracy_score(labels, first), abs=1e-4)
    assert row["le"] == pytest.approx(100 * accuracy_score(labels, second), abs=1e-4)
    either = sum(y in pair for y, *pair in zip(labels.tolist(), first.tolist(), second.tolist(), strict=True))
    assert row["oracle"] == pytest.approx(100 * either / 60, abs=1e-4)
    assert row["route"] == pytest.approx(100 * (routing.expert_index == 1).sum().item() / 60, abs=1e-4)
    assert 0 < row["route"] < 100 and row["oracle"] >= row["moe"]
    share = row["route"] / 100
    assert row["random"] == pytest.approx((1 - share) * row["ge"] + share * row["le"])
    assert row["generic_moe"] == row["moe"]


def test_summary(model: CustomizedLeNet) -> None:
    base = {key: 0.0 for key in ("le", "random", "generic_le", "generic_oracle", "route", "generic_route")}
    rows = [
        {**base, "ge": 70.0, "moe": 90.0, "oracle": 95, "generic_ge": 89, "generic_moe": 88.5, "seconds": 1.0},
        {**base, "ge": 80.0, "moe": 90.0, "oracle": 95, "generic_ge": 89, "generic_moe": 89, "seconds": 3.0},
    ]
    metrics = summarize(rows, model)
    assert metrics["custom_acc_ge"] == 75 and metrics["custom_acc_moe"] == 90
    assert (metrics["custom_gain"], metrics["custom_gain_worst"], metrics["custom_gain_std"]) == (15, 10, 5)
    assert metrics["oracle_share"] == pytest.approx(100 * 30 / 40)
    assert (metrics["generic_drop"], metrics["generic_drop_worst"]) == (0.25, 0.5)
    assert metrics["seconds_per_user"] == 2
    assert metrics["replay_bytes"] == sum(
        value.numel() * value.element_size() for name, value in model.state_dict().items() if name.startswith("replay_")
    )


def test_accuracy() -> None:
    assert accuracy(torch.eye(4), torch.tensor([0, 1, 0, 0])) == 50


def test_figures_are_written(tmp_path: Path) -> None:
    images = torch.zeros(3, 28, 28, dtype=torch.uint8)
    labels, before, after = torch.tensor([1, 2, 3]), torch.tensor([0, 2, 0]), torch.tensor([1, 2, 0])
    assert plot_repairs(images, labels, before, after, "title", tmp_path / "some.png").stat().st_size > 1000
    assert plot_repairs(images, labels, labels, labels, "nothing", tmp_path / "none.png").is_file()
    rows = [{"user": user, "ge": 70.0, "moe": 90.0, "oracle": 95.0} for user in "abc"]
    assert plot_users(rows, tmp_path / "users.png").stat().st_size > 1000
