"""One layer for all: the routed skeleton of every application, from the public API alone.

Each skeleton is compared with a plain computation of what its paper describes.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from zoo.moe import (
    DenseRouter,
    GroupedExperts,
    ModuleExperts,
    MoELayer,
    NoisyTopKRouter,
    RoutedModule,
    Router,
    RouterInput,
    RoutingOutput,
    ThresholdRouter,
    TopKRouter,
    collect_aux_losses,
    record_usage,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- the applications -------------------------------------------------------------------------------------------------


def conv_expert(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, out, 3, padding=1))


def test_fusion_routes_images_to_modality_tied_conv_experts() -> None:
    """MoLE: experts 0, 1 read the visible stream, 2, 3 the infrared one; logsumexp; one of each at least."""
    experts = [conv_expert(3, 2) for _ in range(4)]
    mole = MoELayer(
        NoisyTopKRouter(6, 4, 2, num_groups=2, min_per_group=1),
        ModuleExperts(experts, stream=[0, 0, 1, 1], unit_ndims=[3, 3]),
        combine="logsumexp",
        aux_losses={"importance": 0.01, "load": 0.01},
    )
    visible, infrared = torch.randn(5, 3, 8, 10), torch.randn(5, 3, 8, 10)
    gate_input = torch.cat([visible.mean((2, 3)), infrared.mean((2, 3))], 1)
    out, routing = mole((visible, infrared), router_input=gate_input, return_routing=True)
    assert out.shape == (5, 2, 8, 10)
    for image in range(5):
        first, second = routing.expert_index[image].tolist()
        assert {first // 2, second // 2} == {0, 1}
        terms = [
            math.log(routing.expert_weight[image, slot].item())
            + experts[expert]((visible if expert < 2 else infrared)[image : image + 1])[0]
            for slot, expert in enumerate((first, second))
        ]
        torch.testing.assert_close(out[image], torch.stack(terms).exp().sum(0).log(), atol=1e-5, rtol=1e-5)
    losses = collect_aux_losses(mole)
    (out.square().mean() + losses.total).backward()
    assert set(losses.values) == {"importance", "load"}
    assert mole.router.noise_weight.grad.norm() > 0


def test_fusion_global_experts_change_the_unit() -> None:
    """MoGE: 16 channels in, 1 channel out, any image size."""
    moge = MoELayer(
        TopKRouter(16, 4, 2), ModuleExperts([conv_expert(16, 1) for _ in range(4)], unit_ndims=[3]), combine="logsumexp"
    )
    for size in ((8, 8), (7, 13)):
        x = torch.randn(3, 16, *size)
        assert moge(x, router_input=x.mean((2, 3))).shape == (3, 1, *size)


def test_customization_gate_sees_the_outputs_of_both_experts() -> None:
    """Expert 0 is the global model's logits as they are, expert 1 a local one; the gate reads their confidences."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6 + 1, 1)

        def forward(self, x: Tensor, expert_output: Tensor | None) -> Tensor:
            confidence = torch.softmax(expert_output, -1).amax(-1)
            return self.linear(torch.cat([x, (confidence[:, 1] - confidence[:, 0])[:, None]], 1))

    local = nn.Linear(6, 3)
    layer = MoELayer(
        ThresholdRouter(gate=Gate()),
        ModuleExperts([nn.Identity(), local], stream=[0, 1], unit_ndims=[1, 1]),
        combine="select",
        experts_first=True,
    )
    logits, features = torch.randn(50, 3), torch.randn(50, 6)
    out, routing = layer((logits, features), router_input=features, return_routing=True)
    to_local = routing.expert_index[:, 0] == 1
    assert 0 < to_local.sum() < 50
    torch.testing.assert_close(out, torch.where(to_local[:, None], local(features), logits))
    layer.router.threshold.fill_(1.0)
    assert torch.equal(layer((logits, features), router_input=features), logits), "a closed gate is the global model"


def test_miga_attends_among_unchosen_experts_of_a_group() -> None:
    """Experts run first, attention mixes the members of each group, then top-k weighs what it chose."""

    class InnerGroupAttention(nn.Module):
        def __init__(self, groups: int, dim: int) -> None:
            super().__init__()
            self.groups = groups
            self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)

        def forward(self, outputs: Tensor) -> Tensor:
            members = outputs.unflatten(1, (self.groups, -1)).flatten(0, 1)
            return (
                self.attention(members, members, members, need_weights=False)[0]
                .unflatten(0, (-1, self.groups))
                .flatten(1, 2)
            )

    mixer = InnerGroupAttention(3, 4)
    experts = GroupedExperts(9, 8, 16, out_dim=4)
    layer = MoELayer(TopKRouter(8, 9, 2), experts, experts_first=True, mixer=mixer, aux_losses={"load_balancing": 2e-3})
    stocks = torch.randn(20, 8)
    out, routing = layer(stocks, return_routing=True)
    mixed = mixer(experts.forward_all([stocks]))
    expected = torch.stack(
        [
            sum(w * mixed[t, e] for w, e in zip(routing.expert_weight[t], routing.expert_index[t], strict=True))
            for t in range(20)
        ]
    )
    torch.testing.assert_close(out, expected)
    gradient = torch.autograd.grad(out[0].sum(), experts.down_proj)[0].flatten(1).norm(dim=1)
    chosen = set(routing.expert_index[0].tolist())
    helpers = {e for e in range(9) if any(e // 3 == c // 3 for c in chosen)}
    assert {e for e in range(9) if gradient[e] > 0} == helpers and helpers > chosen


def test_dmoerm_concatenates_all_experts_for_an_mlp() -> None:
    """Inner layer: no gate, every LoRA-like expert, hidden states joined by expert id. Outer layer: one whole model."""
    members = [nn.Linear(8, 5) for _ in range(3)]
    inner = MoELayer(DenseRouter(3), ModuleExperts(members), combine="concat")
    x = torch.randn(7, 8)
    torch.testing.assert_close(inner(x), torch.cat([member(x) for member in members], 1))
    assert not list(inner.router.parameters())

    class Category(Router):
        def route(self, units: RouterInput) -> RoutingOutput:
            category = units.token_ids
            logits = nn.functional.one_hot(category, self.num_experts).float()
            return self.output(units, category[:, None], torch.ones(len(units.x), 1), logits=logits, probs=logits)

    heads = [nn.Sequential(inner, nn.Linear(15, 1)) for _ in range(2)]
    outer = MoELayer(Category(2, 1), ModuleExperts(heads), combine="select")
    category = torch.tensor([0, 1, 1, 0, 0, 1, 0])
    out = outer(x, token_ids=category)
    torch.testing.assert_close(out, torch.where(category[:, None] == 1, heads[1](x), heads[0](x)), atol=1e-6, rtol=0)


def test_smora_has_a_router_per_linear_and_ranks_as_experts() -> None:
    """A routed module of its own: dense-masked products, one bias-balanced router in every adapted linear."""

    class RankExperts(RoutedModule):
        def __init__(self, base: nn.Linear, rank: int, top_k: int) -> None:
            super().__init__()
            self.base = base
            self.router = TopKRouter(base.in_features, rank, top_k, score="sigmoid", scale=top_k, selection_bias=True)
            self.lora_a = nn.Parameter(torch.randn(rank, base.in_features) / 4)
            self.lora_b = nn.Parameter(torch.randn(base.out_features, rank) / 4)

        def forward(self, x: Tensor) -> Tensor:
            routing = self.router(x)
            self.record(routing)
            return self.base(x) + (x @ self.lora_a.T * routing.dense_weight()) @ self.lora_b.T

    model = nn.Sequential(RankExperts(nn.Linear(8, 6), 8, 2), RankExperts(nn.Linear(6, 4), 8, 8))
    x = torch.randn(10, 8)
    first = model[0]
    routing = first.router(x)
    expected = first.base(x)
    for unit in range(10):
        for gate, rank in zip(routing.expert_weight[unit], routing.expert_index[unit].tolist(), strict=True):
            expected[unit] = expected[unit] + gate * (first.lora_a[rank] @ x[unit]) * first.lora_b[:, rank]
    torch.testing.assert_close(first(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(routing.expert_weight.sum(1), torch.full((10,), 2.0))
    with record_usage(model) as usages:
        model(x)
    assert {name: usage.units for name, usage in usages.items()} == {"0": 10, "1": 10}


def test_qa_is_a_drop_in_for_a_feed_forward_block() -> None:
    """Token routing with padding: pads are neither routed nor counted, and change nothing for real tokens."""
    layer = MoELayer(
        TopKRouter(8, 4, 1, normalize=False), GroupedExperts(4, 8, 16), aux_losses={"load_balancing": 0.01}
    )
    x = torch.randn(2, 6, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    out, routing = layer(x, mask=mask, return_routing=True)
    torch.testing.assert_close(out[1, :2], layer(x[1:, :2])[0])
    assert routing.column_counts().sum() == 8
    assert routing.sample_index.tolist() == [0] * 6 + [1] * 6


def test_experts_that_get_all_units_read_them_without_a_copy():
    seen = []
    experts = [nn.Identity() for _ in range(4)]
    for expert in experts:
        expert.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(1, 3, 5, 5)
    layer = MoELayer(TopKRouter(2, 4, 2), ModuleExperts(experts, unit_ndims=[3]))
    out = layer(x, router_input=torch.randn(1, 2))
    assert len(seen) == 2 and all(rows.data_ptr() == x.data_ptr() for rows in seen)
    assert torch.allclose(out, x, atol=1e-6)
    # Two columns of one stored expert: as many rows as units, but not each unit once.
    layer = MoELayer(TopKRouter(5, 4, 2), ModuleExperts([nn.Identity()] * 2), expert_map=[0, 0, 1, 1])
    x = torch.randn(6, 5)
    assert torch.allclose(layer(x), x, atol=1e-6)
