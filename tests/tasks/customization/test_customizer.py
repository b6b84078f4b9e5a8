"""What is learned, what must never change, and when the gate must stay closed."""

import copy

import pytest
import torch
from torch import Tensor

from tasks.customization.customizer import (
    Recipe,
    augment,
    choose_threshold,
    customize,
    deal_folds,
    expected_gain,
    gain,
    unseen,
)
from tasks.customization.model import CustomizedLeNet
from zoo import hub

QUICK = Recipe(expert_steps=60, gate_steps=60, copies=1)
Writer = tuple[Tensor, Tensor]


def test_the_global_expert_and_the_model_given_stay_byte_identical(model: CustomizedLeNet, writer: Writer) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    customised = customize(model, *writer, recipe=QUICK)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in customised.global_expert.state_dict().items():
        assert torch.equal(value, before[f"global_expert.{name}"]), name
    assert customised.local_expert.up.abs().sum() > 0


def test_same_seed_same_weights_and_other_seed_others(model: CustomizedLeNet, writer: Writer) -> None:
    first, again, other = (customize(model, *writer, seed=seed, recipe=QUICK) for seed in (1, 1, 2))
    assert torch.equal(first.local_expert.down, again.local_expert.down)
    assert torch.equal(first.gate.linear.weight, again.gate.linear.weight)
    assert not torch.equal(first.local_expert.down, other.local_expert.down)


def test_the_shipped_expert_learns_a_synthetic_writer(writer: Writer) -> None:
    model = hub.load("customization/lenet5-emnist")
    images, labels = writer
    held_out = torch.arange(len(labels)) % 4 == 0
    customised = customize(model, images[~held_out], labels[~held_out], recipe=Recipe(expert_steps=300, gate_steps=200))
    right = [(m(images[held_out]).argmax(1) == labels[held_out]).float().mean().item() for m in (model, customised)]
    assert right[1] > right[0] + 0.1
    assert 0 < customised.threshold < 1


def test_a_local_expert_that_does_not_help_leaves_the_gate_closed(writer: Writer) -> None:
    model = hub.load("customization/lenet5-emnist")
    images, _ = writer
    answers = model(images).argmax(1)
    customised = customize(model, images, answers, recipe=QUICK)
    assert customised.threshold == 1
    assert torch.equal(customised(images), model(images)), "never worse: exactly the global expert"


def test_an_interruption_loses_nothing(model: CustomizedLeNet, writer: Writer) -> None:
    before = copy.deepcopy(model.state_dict())

    def interrupt(phase: str, step: int, steps: int) -> None:
        if phase == "gate" and step == 5:
            raise KeyboardInterrupt

    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        customize(model, *writer, recipe=QUICK, progress=interrupt)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.get_num_threads() == threads


def test_progress_covers_both_phases(model: CustomizedLeNet, writer: Writer) -> None:
    seen: list[tuple[str, int, int]] = []
    customize(model, *writer, recipe=QUICK, progress=lambda *step: seen.append(step))
    assert seen[0] == ("local expert", 1, 60) and seen[-1] == ("gate", 60, 60) and len(seen) == 120


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.rand(3, 1, 28, 28), torch.tensor([0, 1, 2]), "There are 3 samples; customization needs at least 4"),
        (torch.rand(8, 1, 32, 32), torch.zeros(8, dtype=torch.long), r"shape \(8, 1, 32, 32\); expected"),
        (torch.zeros(8, 1, 28, 28), torch.zeros(8, dtype=torch.long), r"\[0, 1, 2, 3, 4\] hold no ink \(8 in all"),
        (torch.rand(8, 1, 28, 28), torch.full((8,), 61), r"Labels \[61\] are no classes.*0..46"),
    ],
)
def test_samples_that_nothing_can_be_learned_from(
    model: CustomizedLeNet, images: Tensor, labels: Tensor, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        customize(model, images, labels)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("folds", 1, "must be a whole number, at least 2"),
        ("copies", -1, "must be a whole number, at least 0"),
        ("expert_steps", 60.0, "must be a whole number, at least 1"),
        ("gate_steps", 0, "must be a whole number, at least 1"),
        ("expert_batch", 0, "must be a whole number, at least 1"),
        ("gate_batch", 0.5, "must be a whole number, at least 1"),
        ("expert_rate", 0.0, "must be positive"),
        ("gate_rate", float("nan"), "must be positive"),
        ("weight_decay", -1e-3, "must not be negative"),
        ("replay_weight", -1.0, "must not be negative"),
        ("max_drop", -1, "must not be negative"),
        ("confidence", -0.5, "must not be negative"),
        ("max_route", 5, "must be between 0 and 1"),
    ],
)
def test_a_recipe_that_nothing_can_be_learned_with(field: str, value: float, rule: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}={value!r}: {rule}"):
        Recipe(**{field: value})


def test_the_least_recipe_is_allowed(model: CustomizedLeNet, writer: Writer) -> None:
    least = Recipe(folds=2, copies=0, expert_steps=1, gate_steps=1, expert_batch=1, gate_batch=1, max_route=1.0)
    assert 0 <= customize(model, *writer, recipe=least).threshold <= 1


def test_a_rate_that_diverges_is_lowered(model: CustomizedLeNet, writer: Writer) -> None:
    rates = Recipe(expert_steps=60, gate_steps=60, copies=1, expert_rate=30.0)
    customised = customize(model, *writer, recipe=rates)
    assert all(torch.isfinite(value).all() for value in customised.state_dict().values())
    assert customised.local_expert.up.abs().max() < 100
    with pytest.raises(ValueError, match="local expert diverged even at"):
        customize(model, *writer, recipe=Recipe(expert_steps=60, gate_steps=60, copies=1, expert_rate=1e9))


def test_gains() -> None:
    base, local = torch.eye(3)[[0, 1, 2, 0]], torch.eye(3)[[0, 2, 1, 1]]
    labels = torch.tensor([0, 2, 2, 2])
    assert gain(local, base, labels).tolist() == [0, 1, -1, 0]
    difference = torch.softmax(local, 1) - torch.softmax(base, 1)
    expected = torch.stack([difference[unit, label] for unit, label in enumerate(labels)])
    torch.testing.assert_close(expected_gain(local, base, labels), expected)


def test_threshold_respects_the_allowed_drop_and_the_allowed_route() -> None:
    user, replay = torch.linspace(0, 4, 50), torch.linspace(-3, 3, 100)
    helps, harmless, harmful = torch.ones(50), torch.zeros(100), torch.full((100,), -0.1)
    recipe = Recipe(max_drop=0.3, max_route=0.05)

    def let_through(threshold: float) -> int:
        return int((torch.sigmoid(replay) > threshold).sum())

    assert let_through(choose_threshold(user, helps, replay, harmless, recipe)) == 5, "5 % of the replay buffer"
    assert let_through(choose_threshold(user, helps, replay, harmful, recipe)) == 3, "three cost 0.1 points each"
    assert choose_threshold(user, -helps, replay, harmless, recipe) == 1
    assert choose_threshold(user, 0 * helps, replay, harmless, recipe) == 1


def test_folds_are_even_and_deal_out_classes() -> None:
    labels = torch.tensor([0] * 8 + [1] * 8 + [2])
    fold = deal_folds(labels, 4, torch.Generator().manual_seed(0))
    assert torch.bincount(fold).tolist() in ([5, 4, 4, 4], [4, 5, 4, 4], [4, 4, 5, 4], [4, 4, 4, 5])
    assert torch.bincount(fold[:8]).tolist() == torch.bincount(fold[8:16]).tolist() == [2, 2, 2, 2]


def test_unseen_picks_the_model_that_left_the_sample_out() -> None:
    stacked = torch.arange(3)[:, None, None].expand(3, 4, 2)
    assert unseen(stacked, torch.tensor([1, 0, 1, 0]))[:, 0].tolist() == [1, 0, 1, 0]


def test_augmentation_moves_ink_a_little() -> None:
    images = torch.zeros(20, 1, 28, 28)
    images[:, :, 8:20, 12:16] = 1
    moved = augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and moved.min() >= 0 and moved.max() <= 1.001
    assert not torch.equal(moved[0], moved[1])
    torch.testing.assert_close(moved.sum((1, 2, 3)), images.sum((1, 2, 3)), rtol=0.3, atol=0)
