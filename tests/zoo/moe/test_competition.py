"""Capacity and balanced assignment against loops over samples and SciPy."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from zoo.moe import BaseRouter, ExpertChoiceRouter, RouterInput, TopKRouter
from zoo.moe.routers.competition import balanced_assignment, rank_within, sample_rows

X = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
SAMPLE = torch.tensor([5, 2, 9])[torch.arange(30) % 3]  # interleaved, ids with gaps
MASK = torch.arange(30) % 7 > 0


def test_rank_within_orders_by_group_then_keys_then_position() -> None:
    group = torch.tensor([1, 0, 1, 1, 0, 1])
    first = torch.tensor([2, 5, 1, 2, 5, 1])
    second = torch.tensor([0.5, 0.0, 0.3, 0.1, 0.0, 0.3])
    assert rank_within(group, first, second).tolist() == [3, 0, 0, 2, 1, 1]


def test_sample_rows_keep_the_order_of_real_units() -> None:
    rows = sample_rows(RouterInput(X, mask=MASK, sample_index=SAMPLE))
    for row, sample in zip(rows.tolist(), (2, 5, 9), strict=True):
        expected = [unit for unit in range(30) if SAMPLE[unit] == sample and MASK[unit]]
        assert [unit for unit in row if unit < 30] == expected


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("factor", [0.4, 1.0, 4.0])
def test_capacity_matches_a_loop(policy: str, factor: float) -> None:
    router = TopKRouter(8, 4, 2, normalize=False, capacity_factor=factor, drop_policy=policy)
    routing = router(X, mask=MASK, sample_index=SAMPLE)
    kept = torch.full((30, 2), 4)
    for sample in (2, 5, 9):
        units = [unit for unit in range(30) if SAMPLE[unit] == sample and MASK[unit]]
        limit, taken = math.ceil(len(units) * 2 / 4 * factor), [0] * 4
        for slot in range(2):  # first choices before second ones
            order = units
            if policy == "probs":
                order = sorted(
                    units, key=lambda unit, slot=slot: -routing.router_probs[unit].topk(2).values[slot].item()
                )
            for unit in order:
                expert = int(routing.selected_index[unit, slot])
                if taken[expert] < limit:
                    taken[expert] += 1
                    kept[unit, slot] = expert
    assert torch.equal(routing.expert_index, kept)
    assert routing.column_counts().sum() == 2 * MASK.sum(), "what was chosen is counted before dropping"
    assert (routing.expert_counts().sum() < 2 * MASK.sum()) == (factor < 4)


def test_capacity_is_not_fooled_by_the_last_bit() -> None:
    router = TopKRouter(8, 1, 1, capacity_factor=1.1, drop_policy="position")
    x = torch.randn(10, 8)
    assert router(x, sample_index=torch.zeros(10, dtype=torch.int64)).expert_counts().item() == 10
    assert router.eval()(x).expert_counts().item() == 10, "no capacity in eval by default"


def test_gshard_keeps_the_second_expert_in_proportion_to_twice_its_weight() -> None:
    router = TopKRouter(8, 4, 2, random_second=True)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[:, 0] = torch.tensor([2.0, 0.5, -9.0, -9.0])
    routing = router(torch.ones(4000, 8))
    second = math.exp(0.5) / (math.exp(2.0) + math.exp(0.5))
    assert (routing.expert_index[:, 0] == 0).all()
    assert (routing.expert_index[:, 1] == 1).float().mean().item() == pytest.approx(2 * second, abs=0.03)
    torch.testing.assert_close(routing.expert_weight[:, 0], torch.full((4000,), 1 - second), msg="not renormalised")
    assert (routing.selected_index[:, 1] == 1).all()
    assert (router.eval()(torch.ones(9, 8)).expert_index[:, 1] == 1).all()


@pytest.mark.parametrize("units", [12, 64, 61])
@pytest.mark.parametrize("tolerance", [0.05, 1e-4])
def test_auction_is_as_good_as_the_hungarian_method(units: int, tolerance: float) -> None:
    scores = torch.randn(units, 4, generator=torch.Generator().manual_seed(units)) + torch.tensor([2.0, 0, 0, -1])
    expert = balanced_assignment(scores, tolerance)
    capacity = math.ceil(units / 4)
    assert torch.bincount(expert, minlength=4).max() <= capacity
    rows, slots = linear_sum_assignment(scores.repeat_interleave(capacity, 1).numpy(), maximize=True)
    best = scores[rows, slots // capacity].sum()
    slack = units * tolerance * (scores.max() - scores.min())
    total = scores[torch.arange(units), expert].sum()
    assert best - slack - 1e-4 <= total <= best + 1e-4
    if tolerance < 1e-3:
        assert torch.equal(expert, torch.tensor(slots // capacity)), "the optimum itself"


def test_auction_of_equal_and_of_forbidden_scores_ends() -> None:
    assert torch.bincount(balanced_assignment(torch.zeros(12, 4))).tolist() == [3, 3, 3, 3]
    assert balanced_assignment(torch.zeros(0, 4)).shape == (0,)
    assert balanced_assignment(torch.randn(5, 1)).tolist() == [0] * 5
    scores = torch.randn(8, 4)
    scores[:, 3] = float("-inf")
    assert torch.bincount(balanced_assignment(scores), minlength=4).tolist() == [2, 2, 2, 2], "capacity comes first"
    scores = torch.randn(8, 4)
    scores[0, torch.tensor([True, True, False, True])] = float("-inf")
    assert balanced_assignment(scores)[0] == 2


def test_base_router_balances_in_training_and_is_greedy_in_eval() -> None:
    router = BaseRouter(8, 4)
    with torch.no_grad():
        router.weight[0] += X.mean(0) * 9
    sample = torch.arange(24) // 8
    routing = router(X[:24], sample_index=sample)
    for rows in routing.expert_index.view(3, 8):
        assert torch.bincount(rows).tolist() == [2, 2, 2, 2]
    score = (X[:24] @ router.weight.T).gather(1, routing.expert_index)
    torch.testing.assert_close(routing.expert_weight, torch.sigmoid(score))
    greedy = router.eval()(X[:24])
    assert torch.equal(greedy.expert_index[:, 0], (X[:24] @ router.weight.T).argmax(1))


def test_expert_choice_matches_a_loop() -> None:
    router = ExpertChoiceRouter(8, 4, capacity_factor=1.3)
    routing = router(X, mask=MASK, sample_index=SAMPLE)
    probs = torch.softmax(X @ router.weight.T, 1)
    expected = torch.zeros(30, 4, dtype=torch.bool)
    for sample in (2, 5, 9):
        units = ((sample == SAMPLE) & MASK).nonzero().flatten()
        take = math.ceil(len(units) * 1.3 / 4)
        for expert in range(4):
            expected[units[probs[units, expert].topk(take).indices], expert] = True
    assert torch.equal(routing.expert_index < 4, expected)
    torch.testing.assert_close(routing.expert_weight, probs * expected)


def test_competing_routers_must_know_the_samples() -> None:
    for router in (ExpertChoiceRouter(8, 4), TopKRouter(8, 4, 2, capacity_factor=1.0, drop_policy="probs")):
        with pytest.raises(ValueError, match="sample_index=None"):
            router(X)
