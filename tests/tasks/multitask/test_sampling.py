"""Probabilities and counts are exact; epochs are seeded, go on where the last one ended, and mix tasks."""

from collections import Counter

import numpy as np
import pytest

from tasks.multitask.sampling import TaskSampler, allot, task_probabilities
from zoo.errors import UnknownNameError

COUNTS = [400, 100, 25]


def test_probabilities():
    np.testing.assert_allclose(task_probabilities(COUNTS, "proportional"), np.array(COUNTS) / 525, rtol=1e-12)
    np.testing.assert_allclose(task_probabilities(COUNTS, "uniform"), np.full(3, 1 / 3), rtol=1e-12)
    np.testing.assert_allclose(task_probabilities(COUNTS, "temperature", 2), np.array([20, 10, 5]) / 35, rtol=1e-12)
    np.testing.assert_allclose(
        task_probabilities(COUNTS, "temperature", 1), task_probabilities(COUNTS, "proportional"), rtol=1e-12
    )
    of_rows = task_probabilities(COUNTS, "temperature", 2, [1, 4, 2])
    np.testing.assert_allclose(of_rows, np.array([20, 10 / 4, 5 / 2]) / 25, rtol=1e-12)
    # Rows are then shared as examples were.
    rows = of_rows * [1, 4, 2]
    np.testing.assert_allclose(rows / rows.sum(), task_probabilities(COUNTS, "temperature", 2), rtol=1e-12)
    with pytest.raises(UnknownNameError, match="Unknown sampling 'even'"):
        task_probabilities(COUNTS, "even")
    with pytest.raises(ValueError, match=r"temperature=0\.5"):
        task_probabilities(COUNTS, "temperature", 0.5)


def test_largest_remainders():
    assert allot(np.array([0.5, 0.3, 0.2]), 10).tolist() == [5, 3, 2]
    assert allot(np.array([1 / 3] * 3), 10).tolist() == [4, 3, 3]
    random = np.random.default_rng(0)
    for size in (1, 7, 100):
        shares = random.dirichlet(np.ones(5))
        counts = allot(shares, size)
        assert counts.sum() == size and (np.abs(counts - shares * size) < 1).all()


def sampler(size, batch=4, seed=0, sampling="temperature"):
    tasks = [name for name, count in zip("abc", COUNTS, strict=True) for _ in range(count)]
    random = np.random.default_rng(1)
    lengths = random.integers(5, 60, len(tasks)).tolist()
    return TaskSampler(tasks, task_probabilities(COUNTS, sampling), size, lengths, batch, seed), tasks, lengths


def test_every_epoch_has_its_exact_share_of_each_task():
    found, tasks, _ = sampler(70)
    for epoch in range(3):
        found.set_epoch(epoch)
        order = list(found)
        assert len(order) == len(found) == 70
        assert Counter(tasks[place] for place in order) == {"a": 40, "b": 20, "c": 10}


def test_examples_are_seen_equally_often():
    found, tasks, _ = sampler(70)
    seen = Counter()
    for epoch in range(5):
        found.set_epoch(epoch)
        seen.update(found)
    # 200 of 400, 100 of 100, 50 of 25.
    for task, expected in (("a", {0: 200, 1: 200}), ("b", {1: 100}), ("c", {2: 25})):
        assert Counter(seen[place] for place, name in enumerate(tasks) if name == task) == expected


def test_an_epoch_depends_on_seed_and_number_alone():
    first, _, _ = sampler(70)
    second, _, _ = sampler(70)
    first.set_epoch(3)
    list(second)
    second.set_epoch(3)
    assert list(first) == list(second)
    other, _, _ = sampler(70, seed=1)
    other.set_epoch(3)
    assert list(other) != list(first)
    first.set_epoch(2)
    assert list(first) != list(second)


def test_batches_are_of_similar_length_in_no_order_and_mix_tasks():
    found, tasks, lengths = sampler(210, batch=8)
    order = list(found)
    batches = [order[first : first + 8] for first in range(0, len(order), 8)]
    spread = np.mean([np.ptp([lengths[place] for place in batch]) for batch in batches])
    shuffled = np.random.default_rng(0).permutation(order)
    assert spread < 0.4 * np.mean([np.ptp([lengths[place] for place in shuffled[f : f + 8]]) for f in range(0, 200, 8)])
    means = [np.mean([lengths[place] for place in batch]) for batch in batches]
    assert means != sorted(means)
    assert np.mean([len({tasks[place] for place in batch}) > 1 for batch in batches]) > 0.8
    assert len(batches[-1]) == 210 % 8


def test_a_task_without_a_share_is_left_out():
    tasks = ["a"] * 1000 + ["b"]
    found = TaskSampler(tasks, task_probabilities([1000, 1], "proportional"), 20, [1] * 1001, 4, 0)
    assert {tasks[place] for place in found} == {"a"}
