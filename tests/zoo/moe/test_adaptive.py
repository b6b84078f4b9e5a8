"""Top-p, null experts and dense-to-sparse against loops over units."""

import pytest
import torch

from zoo.moe import (
    CosineRouter,
    DenseToSparseRouter,
    GroupedExperts,
    ModuleExperts,
    MoELayer,
    NullExpertRouter,
    TopPRouter,
    load_balancing_loss,
)

X = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("max_k", [None, 2])
def test_top_p_takes_experts_until_p_is_reached(max_k: int | None) -> None:
    router = TopPRouter(8, 6, 0.6, max_k)
    routing = router(X)
    for unit, probs in enumerate(torch.softmax(X @ router.weight.T, 1)):
        expected, reached = [], 0.0
        for expert in probs.argsort(descending=True).tolist()[:max_k]:
            if reached <= 0.6:
                expected.append(expert)
                reached += probs[expert].item()
        assert [expert for expert in routing.expert_index[unit].tolist() if expert < 6] == expected
        torch.testing.assert_close(routing.expert_weight[unit, : len(expected)], probs[expected])
    slots = (routing.expert_index < 6).sum(1)
    assert slots.min() == 1 and (slots.max() == 2 if max_k else slots.max() > 2)
    assert torch.equal(routing.selected_index, routing.expert_index), "what was not reached was not selected"


def test_null_experts_cost_nothing_and_true_weights_sum_to_one() -> None:
    router = NullExpertRouter(8, 4, 3, num_null=4)
    routing = router(X)
    probs = torch.softmax(X @ router.weight.T, 1)
    for unit in range(40):
        chosen = probs[unit].topk(3).indices.tolist()
        true = [column for column in chosen if column < 4]
        assert routing.selected_index[unit].tolist() == chosen
        assert [expert for expert in routing.expert_index[unit].tolist() if expert < 4] == true
        weight = routing.expert_weight[unit][routing.expert_index[unit] < 4]
        torch.testing.assert_close(weight, probs[unit, true] / probs[unit, true].sum())
    assert (routing.expert_index == 4).all(1).any(), "some units are satisfied with the residual alone"


def test_identity_null_experts_give_the_unit_itself() -> None:
    router = NullExpertRouter(8, 4, 3, num_null=4, null_kind="identity")
    layer = MoELayer(router, GroupedExperts(4, 8, 16))
    out, routing = layer(X, return_routing=True)
    probs = torch.softmax(X @ router.weight.T, 1)
    everything = torch.cat([layer.experts.forward_all([X]), X[:, None].expand(-1, 4, -1)], 1)
    value, column = probs.topk(3, dim=1)
    weight = (value / value.sum(1, keepdim=True))[..., None]
    torch.testing.assert_close(out, (weight * everything.gather(1, column[..., None].expand(-1, -1, 8))).sum(1))
    torch.testing.assert_close(routing.identity_weight + routing.expert_weight.sum(1), torch.ones(40))
    wider = MoELayer(router, GroupedExperts(4, 8, 16, out_dim=9))
    with pytest.raises(ValueError, match="shape of the units"):
        wider(X)
    with pytest.raises(ValueError, match="combine='sum'"):
        MoELayer(router, ModuleExperts([torch.nn.Identity()] * 4), combine="logsumexp")(X[:1])


def test_balance_loss_cares_for_the_total_of_null_experts_only() -> None:
    router = NullExpertRouter(8, 4, 3, num_null=4)
    routing = router(X)
    counts = torch.bincount(routing.selected_index.flatten(), minlength=8) / 120
    null = counts[4:].mean().item()
    share = [*counts[:4].tolist(), null, null, null, null]
    mean = routing.router_probs.mean(0).tolist()
    expected = 8 * sum(f * p for f, p in zip(share, mean, strict=True))
    assert load_balancing_loss(routing).item() == pytest.approx(expected, abs=1e-5)
    moved = load_balancing_loss(routing)
    routing.selected_index = torch.where(routing.selected_index > 4, 4, routing.selected_index)
    torch.testing.assert_close(load_balancing_loss(routing), moved, msg="which null expert is of no interest")


def test_dense_to_sparse_follows_its_temperature() -> None:
    router = DenseToSparseRouter(8, 6, temperature=2.0, threshold=0.02)
    torch.manual_seed(3)
    routing = router(X)
    torch.manual_seed(3)
    gumbel = -torch.empty(40, 6).exponential_().log()
    weight = torch.softmax((X @ router.weight.T + gumbel) / 2.0, 1)
    torch.testing.assert_close(routing.expert_weight, weight * (weight > 0.02))
    assert torch.equal(routing.expert_index < 6, weight > 0.02)
    slots = []
    for temperature in (2.0, 0.5, 0.1):
        router.set_temperature(temperature)
        slots.append(int(router(X).expert_counts().sum()))
    assert slots[0] > slots[1] > slots[2] > 40
    router.set_temperature(0.0)
    for routing in (router(X), router.eval()(X)):
        probs = torch.softmax(X @ router.weight.T, 1)
        assert torch.equal(routing.expert_index[:, 0], probs.argmax(1))
        torch.testing.assert_close(routing.expert_weight, probs.amax(1, keepdim=True))
    assert "temperature" in router.state_dict()


def test_cosine_router_is_blind_to_the_length_of_a_unit() -> None:
    router = CosineRouter(8, 6, 2, project_dim=5, temperature=0.1, score="sigmoid", normalize=False)
    routing = router(X)
    for unit in range(3):
        for expert in range(6):
            cosine = torch.cosine_similarity(router.project @ X[unit], router.weight[expert], dim=0)
            assert routing.router_logits[unit, expert].item() == pytest.approx(10 * cosine.item(), abs=1e-4)
    torch.testing.assert_close(router(7 * X).router_logits, routing.router_logits)
    torch.testing.assert_close(
        routing.expert_weight, torch.sigmoid(routing.router_logits.gather(1, routing.expert_index))
    )
