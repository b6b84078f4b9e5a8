"""Routers around routers: through depth, through time, over a sample."""

import copy

import pytest
import torch
from torch import nn

from zoo.moe import (
    GroupedExperts,
    MoELayer,
    PooledRouter,
    PreGateRouter,
    RecurrentRouter,
    TopKRouter,
    update_selection_biases,
)


def recurrent_stack(detach: bool = False) -> nn.ModuleList:
    cell = nn.GRUCell(5, 6)
    return nn.ModuleList(
        MoELayer(RecurrentRouter(TopKRouter(6, 4, 2), 8, cell, detach), GroupedExperts(4, 8, 16)) for _ in range(3)
    )


def run(layers: nn.ModuleList, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    state = None
    for layer in layers:
        update, routing = layer(x, state=state, return_routing=True)
        x, state = x + update, routing.state
    return x, routing.router_logits


def test_recurrent_state_passes_through_the_layers_by_argument() -> None:
    layers, x = recurrent_stack(), torch.randn(2, 3, 8)
    out, logits = run(layers, x)
    state, hidden = torch.zeros(6, 6), x
    for layer in layers:
        router = layer.router
        state = layers[0].router.cell(router.project(hidden.flatten(0, 1)), state)
        hidden = hidden + layer(hidden, routing=router.inner(state))
    torch.testing.assert_close(out, hidden)
    torch.testing.assert_close(logits, state @ router.inner.weight.T)
    shared = {id(layer.router.cell) for layer in copy.deepcopy(layers)}
    assert len(shared) == 1, "a copy still shares its cell"


@pytest.mark.parametrize("detach", [False, True])
def test_gradients_cross_layers_unless_detached(detach: bool) -> None:
    layers = recurrent_stack(detach)
    for layer in layers:  # leave the state as the only way from the first layer to the last
        layer.experts.requires_grad_(False)
        layer.experts.down_proj.zero_()
    _, logits = run(layers, torch.randn(2, 3, 8))
    gradient = torch.autograd.grad(logits.sum(), layers[0].router.project.weight)[0]
    assert (gradient.norm() == 0) == detach


def test_bias_balancing_reaches_an_inner_router() -> None:
    inner = TopKRouter(6, 4, 1, score="sigmoid", selection_bias=True)
    layer = MoELayer(RecurrentRouter(inner, 8, nn.GRUCell(5, 6)), GroupedExperts(4, 8, 16))
    _, routing = layer(torch.randn(50, 8), return_routing=True)
    update_selection_biases(layer, 0.1)
    torch.testing.assert_close(inner.expert_bias, 0.1 * torch.sign(12.5 - routing.column_counts()))


def test_pre_gate_decides_once_for_all_layers_and_is_causal() -> None:
    router = PreGateRouter(TopKRouter(6, 4, 2), 8, 6)
    layers = [MoELayer(router, GroupedExperts(4, 8, 16)) for _ in range(3)]
    x, state, seen = torch.randn(2, 5, 8), None, []
    hidden = x
    for layer in layers:
        update, routing = layer(hidden, state=state, return_routing=True)
        hidden, state = hidden + update, routing.state
        seen.append(routing)
    assert all(torch.equal(routing.expert_index, seen[0].expert_index) for routing in seen)
    later = x.clone()
    later[:, 3:] = 0
    first = layers[0](later, return_routing=True)[1].router_logits.view(2, 5, 4)
    torch.testing.assert_close(first[:, :3], seen[0].router_logits.view(2, 5, 4)[:, :3])
    assert not torch.allclose(first[:, 3:], seen[0].router_logits.view(2, 5, 4)[:, 3:])


def test_pooled_router_decides_once_per_sample() -> None:
    inner = TopKRouter(8, 4, 2)
    x = torch.randn(3, 5, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    layer = MoELayer(PooledRouter(inner), GroupedExperts(4, 8, 16))
    _, routing = layer(x, mask=mask, return_routing=True)
    for sample, size in enumerate((5, 2)):
        expected = inner(x[sample, :size].mean(0, keepdim=True))
        rows = slice(5 * sample, 5 * sample + size)
        assert (routing.expert_index[rows] == expected.expert_index).all()
        torch.testing.assert_close(routing.expert_weight[rows], expected.expert_weight.expand(size, 2))
    assert routing.column_counts().sum() == 14
