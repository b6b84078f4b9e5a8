"""Auxiliary losses against their formulas and on planted routings."""

import math

import pytest
import torch
from scipy import stats

from zoo.moe import (
    GroupedExperts,
    MoELayer,
    NoisyTopKRouter,
    RoutingOutput,
    StochasticRouter,
    TopKRouter,
    consistency_loss,
    consistency_step,
    entropy_loss,
    group_balancing_loss,
    importance_loss,
    load_balancing_loss,
    load_loss,
    sequence_balancing_loss,
    z_loss,
)
from zoo.moe.losses import LOSSES, probability_in_top_k


def routing_to(index: list[list[int]], num_experts: int, mask: list[bool] | None = None) -> RoutingOutput:
    """A confident routing to the given experts with equal weights."""
    choice = torch.tensor(index)
    logits = torch.zeros(len(index), num_experts).scatter_(1, choice, 20.0)
    weight = torch.full(choice.shape, 1 / choice.shape[1])
    keep = None if mask is None else torch.tensor(mask)
    if keep is not None:
        choice = choice.masked_fill(~keep[:, None], num_experts)
        weight = weight.masked_fill(~keep[:, None], 0.0)
    probs = torch.softmax(logits, 1)
    return RoutingOutput(
        choice, weight, choice, logits, probs, num_experts, keep, distilled_logits=logits, num_groups=2
    )


@pytest.mark.parametrize("loss", [load_balancing_loss, sequence_balancing_loss, importance_loss, load_loss])
def test_scale_is_one_when_balanced_and_the_number_of_columns_when_collapsed(loss: object) -> None:
    balanced = routing_to([[0, 1], [2, 3], [1, 2], [3, 0]], 4)
    collapsed = routing_to([[2], [2], [2], [2]], 4)
    assert loss(balanced) == pytest.approx(1.0, abs=1e-5)  # type: ignore[operator]
    assert loss(collapsed) == pytest.approx(4.0, abs=1e-4)  # type: ignore[operator]


@pytest.mark.parametrize("name", LOSSES)
def test_padding_does_not_count(name: str) -> None:
    padded = routing_to([[0], [1], [0], [3], [3]], 4, [True, True, True, False, False])
    real = routing_to([[0], [1], [0]], 4)
    assert LOSSES[name](padded) == pytest.approx(LOSSES[name](real).item(), abs=1e-6)
    nothing = routing_to([[0], [1]], 4, [False, False])
    assert torch.isfinite(LOSSES[name](nothing))


def test_load_balancing_matches_the_definition() -> None:
    router = TopKRouter(8, 5, 2)
    routing = router(torch.randn(30, 8))
    share = [int((routing.expert_index == e).sum()) / 60 for e in range(5)]
    expected = 5 * sum(f * routing.router_probs[:, e].mean().item() for e, f in enumerate(share))
    assert load_balancing_loss(routing).item() == pytest.approx(expected, abs=1e-6)


def test_two_collapsed_complementary_layers_are_not_balanced() -> None:
    first, second = routing_to([[0, 1]] * 6, 4), routing_to([[2, 3]] * 6, 4)
    assert (load_balancing_loss(first) + load_balancing_loss(second)) / 2 == pytest.approx(2.0, abs=1e-4)


def test_importance_is_one_plus_squared_coefficient_of_variation() -> None:
    routing = TopKRouter(8, 5, 2)(torch.randn(30, 8))
    importance = routing.dense_weight().sum(0)
    expected = 1 + (importance.var(unbiased=False) / importance.mean() ** 2).item()
    assert importance_loss(routing).item() == pytest.approx(expected, abs=1e-6)


def test_smooth_load_is_the_probability_of_a_fresh_draw() -> None:
    torch.manual_seed(0)
    routing = NoisyTopKRouter(8, 5, 2, init_std=1.0)(torch.randn(6, 8))
    clean, noisy, std = routing.router_logits, routing.noisy_logits, routing.noise_std
    assert noisy is not None and std is not None
    ours = probability_in_top_k(clean, noisy, std, 2)
    for unit in range(6):
        for expert in range(5):
            others = noisy[unit][torch.arange(5) != expert].sort(descending=True).values
            z = ((clean[unit, expert] - others[1]) / std[unit, expert]).item()
            assert ours[unit, expert].item() == pytest.approx(stats.norm.cdf(z), abs=1e-6)
    assert (probability_in_top_k(clean, noisy, std, 5) == 1).all()


def test_z_loss() -> None:
    routing = TopKRouter(8, 5, 2)(torch.randn(30, 8))
    expected = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in routing.router_logits.tolist()) / 30
    assert z_loss(routing).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_reaches_the_router(name: str) -> None:
    torch.manual_seed(0)
    router = NoisyTopKRouter(8, 6, 2, num_groups=2, init_std=1.0)
    routing = router(torch.randn(30, 8))
    routing.distilled_logits = routing.router_logits
    LOSSES[name](routing).backward()
    assert router.weight.grad is not None and router.weight.grad.norm() > 0


def test_sequence_loss_is_the_mean_of_the_samples_own_losses() -> None:
    router, x = TopKRouter(8, 4, 2), torch.randn(20, 8)
    sample = torch.arange(20) % 3 * 7
    mask = torch.arange(20) % 5 > 0
    mask[sample == 14] = False  # a sample of padding does not count
    ours = sequence_balancing_loss(router(x, mask=mask, sample_index=sample))
    own = [load_balancing_loss(router(x[(sample == s) & mask])) for s in (0, 7)]
    torch.testing.assert_close(ours, torch.stack(own).mean())
    specialised = routing_to([[0], [0], [1], [1]], 2)
    specialised.sample_index = torch.tensor([0, 0, 1, 1])
    assert load_balancing_loss(specialised).item() == pytest.approx(1.0, abs=1e-4)
    assert sequence_balancing_loss(specialised).item() == pytest.approx(2.0, abs=1e-4)


def test_group_loss_sees_groups_only() -> None:
    assert group_balancing_loss(routing_to([[0], [0], [2], [2]], 4)).item() == pytest.approx(1.0, abs=1e-4)
    assert group_balancing_loss(routing_to([[0], [1], [0], [1]], 4)).item() == pytest.approx(2.0, abs=1e-4)
    routing = TopKRouter(8, 6, 2, num_groups=3)(torch.randn(30, 8))
    share = torch.stack([(routing.expert_index // 2 == group).float().mean() for group in range(3)])
    probs = routing.router_probs.view(30, 3, 2).sum(2).mean(0)
    torch.testing.assert_close(group_balancing_loss(routing), 3 * (share * probs).sum())
    with pytest.raises(ValueError, match="num_groups > 1"):
        group_balancing_loss(TopKRouter(8, 6, 2)(torch.randn(30, 8)))


def test_entropy_matches_scipy() -> None:
    routing = TopKRouter(8, 5, 2)(torch.randn(30, 8))
    expected = stats.entropy(routing.router_probs.detach().numpy(), axis=1).mean()
    assert entropy_loss(routing).item() == pytest.approx(expected, abs=1e-5)


def test_entropy_of_a_router_that_is_sure_has_a_gradient() -> None:
    logits = torch.tensor([[0.0, 200.0, 1.0]], requires_grad=True)
    routing = routing_to([[1]], 3)
    routing.router_probs = torch.softmax(logits, 1)
    loss = entropy_loss(routing)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-30) and torch.isfinite(logits.grad).all()


def test_a_forbidden_expert_has_no_load_and_one_without_rivals_has_all_of_it() -> None:
    torch.manual_seed(0)
    router, x = NoisyTopKRouter(8, 4, 2), torch.randn(10, 8)
    allowed = torch.tensor([True, False, True, True])
    routing = router(x, expert_mask=allowed)
    free = [column[:, allowed] for column in (routing.router_logits, routing.noisy_logits, routing.noise_std)]
    ours = probability_in_top_k(routing.router_logits, routing.noisy_logits, routing.noise_std, 2)
    assert (ours[:, 1] == 0).all()
    torch.testing.assert_close(ours[:, allowed], probability_in_top_k(*free, 2))
    load_loss(routing).backward()
    assert torch.isfinite(router.noise_weight.grad).all() and router.noise_weight.grad.norm() > 0
    routing = router(x, expert_mask=torch.tensor([True, False, False, True]))
    ours = probability_in_top_k(routing.router_logits, routing.noisy_logits, routing.noise_std, 2)
    assert torch.equal(ours, torch.tensor([1.0, 0.0, 0.0, 1.0]).expand(10, 4))


def test_consistency_is_half_the_symmetric_divergence() -> None:
    first, second = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    p, q = torch.softmax(first[mask], 1).numpy(), torch.softmax(second[mask], 1).numpy()
    expected = (stats.entropy(p, q, axis=1) + stats.entropy(q, p, axis=1)).mean() / 2
    assert consistency_loss(first, second, mask).item() == pytest.approx(expected, abs=1e-5)
    assert consistency_loss(first, first) == 0


def test_consistency_step_runs_twice_with_other_experts() -> None:
    torch.manual_seed(0)
    layer = MoELayer(StochasticRouter(4), GroupedExperts(4, 8, 16, out_dim=3))
    x, target, outputs = torch.randn(32, 8), torch.randint(3, (32,)), []

    def run() -> torch.Tensor:
        outputs.append(layer(x))
        return outputs[-1]

    def task_loss(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, target)

    loss, logits = consistency_step(run, task_loss, coefficient=5.0)
    first, second = outputs
    assert not torch.allclose(first, second), "another draw"
    expected = task_loss(first) + task_loss(second) + 5 * consistency_loss(first, second)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, (first + second) / 2)
    with pytest.raises(ValueError, match="coefficient=-1"):
        consistency_step(run, task_loss, -1)
