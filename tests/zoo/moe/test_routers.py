"""Routers against their formulas, and their errors."""

import pytest
import torch

from zoo.moe import DenseRouter, GroupedExperts, MoELayer, NoisyTopKRouter, Router, ThresholdRouter, TopKRouter
from zoo.moe.routers.topk import best_two

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


def test_both_orders_agree_when_normalised_and_differ_when_not() -> None:
    first = TopKRouter(8, 6, 2)
    second = TopKRouter(8, 6, 2, order="topk_then_softmax")
    second.load_state_dict(first.state_dict())
    a, b = first(X), second(X)
    assert torch.equal(a.expert_index, b.expert_index)
    torch.testing.assert_close(a.expert_weight, b.expert_weight)
    first.normalize = False
    probs = torch.softmax(X @ first.weight.T, 1)
    torch.testing.assert_close(first(X).expert_weight, probs.topk(2, dim=1).values)


def test_sigmoid_scores_normalised_to_k() -> None:
    router = TopKRouter(8, 6, 3, score="sigmoid", scale=3.0)
    routing = router(X)
    torch.testing.assert_close(routing.expert_weight.sum(1), torch.full((40,), 3.0))
    scores = torch.sigmoid(X @ router.weight.T).gather(1, routing.expert_index)
    torch.testing.assert_close(routing.expert_weight, 3 * scores / scores.sum(1, keepdim=True))
    torch.testing.assert_close(routing.router_probs.sum(1), torch.ones(40))


def test_bias_changes_the_choice_but_not_the_weights() -> None:
    router = TopKRouter(8, 6, 2, score="sigmoid", normalize=False, selection_bias=True)
    router.expert_bias[5] = 10.0
    routing = router(X)
    assert (routing.expert_index == 5).any(1).all()
    torch.testing.assert_close(
        routing.expert_weight, torch.sigmoid(X @ router.weight.T).gather(1, routing.expert_index)
    )


def test_bias_update_moves_use_towards_uniform() -> None:
    torch.manual_seed(0)
    router = TopKRouter(8, 4, 1, score="sigmoid", selection_bias=True)
    x = X + 2.0
    start = router(x).column_counts()
    for _ in range(300):
        router.update_bias(router(x).column_counts(), 0.005)
    end = router(x).column_counts()
    assert end.std() < 0.3 * start.std()
    assert "expert_bias" in router.state_dict() and "window_counts" not in router.state_dict()


def test_group_limited_selection_matches_a_loop() -> None:
    router = TopKRouter(8, 12, 3, num_groups=4, top_groups=2, normalize=False)
    routing = router(X)
    for unit, probs in enumerate(torch.softmax(X @ router.weight.T, 1).detach()):
        groups = probs.view(4, 3)
        best = groups.sort(dim=1, descending=True).values[:, :2].sum(1).topk(2).indices.tolist()
        allowed = [expert for expert in range(12) if expert // 3 in best]
        expected = sorted(allowed, key=lambda expert: -float(probs[expert]))[:3]
        assert routing.expert_index[unit].tolist() == expected


def test_every_group_gets_its_minimum() -> None:
    router = TopKRouter(8, 6, 4, num_groups=2, min_per_group=1)
    with torch.no_grad():
        router.weight[:3] += 5 * X.mean(0)
    routing = router(X)
    groups = routing.expert_index // 3
    assert ((groups == 0).any(1) & (groups == 1).any(1)).all()
    assert all(len(set(row)) == 4 for row in routing.expert_index.tolist())
    assert (routing.expert_weight.diff(dim=1) <= 1e-7).all(), "best first"


def test_jitter_acts_in_training_only() -> None:
    router = TopKRouter(8, 6, 2, jitter=0.3)
    assert not torch.equal(router(X).router_logits, router(X).router_logits)
    router.eval()
    assert torch.equal(router(X).router_logits, X @ router.weight.T)


def test_noisy_router_selects_on_noise_and_reports_it() -> None:
    router = NoisyTopKRouter(8, 6, 2)
    routing = router(X)
    assert torch.equal(routing.expert_index, routing.noisy_logits.topk(2, dim=1).indices)
    torch.testing.assert_close(routing.expert_weight.sum(1), torch.ones(40))
    torch.testing.assert_close(routing.noise_std, torch.full((40, 6), 2.0).log() + 1e-2)
    assert router.eval()(X).noise_std is None


def test_padding_is_neither_routed_nor_counted() -> None:
    mask = torch.arange(40) % 3 > 0
    routing = TopKRouter(8, 6, 2)(X, mask=mask)
    assert (routing.expert_index[~mask] == 6).all() and (routing.expert_weight[~mask] == 0).all()
    assert routing.column_counts().sum() == 2 * mask.sum() == routing.expert_counts().sum()
    assert routing.num_units() == mask.sum()


def test_the_two_best_are_those_of_topk() -> None:
    choice = torch.randn(50, 6)
    assert torch.equal(best_two(choice), choice.topk(2, dim=1).indices)


def test_the_two_best_differ_where_scores_tie_or_experts_are_forbidden() -> None:
    choice = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [float("-inf")] * 3]).repeat(3, 1)
    choice[3:6, 0] = float("-inf")
    choice[6:9, 1:] = float("-inf")
    pair = best_two(choice)
    assert (pair[:, 0] != pair[:, 1]).all()
    torch.testing.assert_close(choice.gather(1, pair), choice.topk(2, dim=1).values)


def test_threshold_router() -> None:
    router = ThresholdRouter(8, threshold=0.6)
    routing = router(X)
    gate = torch.sigmoid(router.gate(X, None))[:, 0]
    assert torch.equal(routing.expert_index[:, 0], (gate > 0.6).long())
    assert (routing.router_logits[:, 0] == 0).all()
    router.threshold.fill_(1.0)
    assert (router(X * 1e4).expert_index == 0).all(), "threshold 1 never leaves expert 0"
    router.threshold.fill_(0.0)
    assert (router(X).expert_index == 1).all()
    assert (router(X, expert_mask=torch.tensor([True, False])).expert_index == 0).all()
    assert "threshold" in router.state_dict()
    router.threshold.fill_(1.0)
    experts = GroupedExperts(2, 8, 16)
    alone, probability = experts.forward_all([X])[:, 0], router(X).router_probs[:, :1]
    torch.testing.assert_close(MoELayer(router, experts, combine="select")(X), alone)
    torch.testing.assert_close(MoELayer(router, experts)(X), probability * alone)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "none"])
def test_dense_router_visits_all_in_order(score: str) -> None:
    router = DenseRouter(5, None if score == "none" else 8, score)
    routing = router(X)
    assert torch.equal(routing.expert_index, torch.arange(5).expand(40, 5))
    if score == "none":
        assert (routing.expert_weight == 1).all() and not list(router.parameters())
    else:
        logits = X @ router.weight.T
        torch.testing.assert_close(
            routing.expert_weight, torch.softmax(logits, 1) if score == "softmax" else torch.sigmoid(logits)
        )


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TopKRouter(8, 4, 5), "top_k=5: must not exceed num_experts=4"),
        (lambda: TopKRouter(8, 4, 0), "top_k=0"),
        (lambda: TopKRouter(0, 4, 1), "input_dim=0"),
        (lambda: TopKRouter(8, 4, 2, score="relu"), "score='relu'"),
        (lambda: TopKRouter(8, 4, 2, order="first"), "order='first'"),
        (lambda: TopKRouter(8, 4, 2, score="sigmoid", order="topk_then_softmax"), "order="),
        (lambda: TopKRouter(8, 4, 2, jitter=1.5), "jitter=1.5"),
        (lambda: TopKRouter(8, 4, 2, num_groups=3), "num_groups=3: must divide"),
        (lambda: TopKRouter(8, 4, 3, num_groups=2, top_groups=1), "fit into 1 groups of 2"),
        (lambda: TopKRouter(8, 4, 2, num_groups=2, top_groups=3), "top_groups=3"),
        (lambda: TopKRouter(8, 4, 3, num_groups=2, min_per_group=2), "min_per_group=2"),
        (lambda: TopKRouter(8, 4, 2).update_bias(torch.zeros(4), 0.1), "selection_bias=False"),
        (lambda: NoisyTopKRouter(8, 4, 2, init_std=-1), "init_std=-1"),
        (lambda: ThresholdRouter(8, threshold=1.5), "threshold=1.5"),
        (lambda: DenseRouter(4, score="softmax"), "input_dim=None"),
        (lambda: DenseRouter(4, 8, "relu"), "score='relu'"),
        (lambda: Router(0, 1), "num_experts=0"),
    ],
)
def test_bad_arguments_name_argument_value_and_rule(build: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()  # type: ignore[operator]
