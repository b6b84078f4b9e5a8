"""Dense networks, mixtures made from them, and sized designs."""

import pytest
import torch
from torch import nn

from zoo.moe import (
    DenseRouter,
    FeedForward,
    GroupedExperts,
    ModuleExperts,
    MoELayer,
    TopKRouter,
    deepseek_moe,
    diversify_experts,
    per_layer,
    split_dense_mlp,
    upcycle_dense_mlp,
)

KINDS = [{"gated": True}, {"gated": False, "activation": "gelu"}, {"bias": True}, {"out_dim": 5, "bias": True}]
X = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", KINDS)
def test_the_parts_of_a_split_network_sum_to_it(options: dict[str, object]) -> None:
    dense = FeedForward(8, 24, **options)
    experts = split_dense_mlp(dense, 4)
    assert experts.hidden_dim == 6
    torch.testing.assert_close(MoELayer(DenseRouter(4), experts)(X), dense(X), atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", KINDS)
def test_upcycling_starts_as_the_dense_network(options: dict[str, object]) -> None:
    dense = FeedForward(8, 24, **options)
    layer = MoELayer(TopKRouter(8, 4, 2), upcycle_dense_mlp(dense, 4))
    torch.testing.assert_close(layer(X), dense(X), atol=1e-6, rtol=0)
    layer(X).sum().backward()
    assert dense.up_proj.weight.grad is None, "the experts are copies"


def test_linear_layers_of_others_become_a_feed_forward() -> None:
    theirs = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
    ours = FeedForward.from_linears(theirs[0], theirs[2], activation="gelu")
    torch.testing.assert_close(ours(X), theirs(X))
    gate, up, down = (nn.Linear(*size, bias=False) for size in ((8, 24), (8, 24), (24, 8)))
    gated = FeedForward.from_linears(up, down, gate)
    torch.testing.assert_close(gated(X), down(nn.functional.silu(gate(X)) * up(X)))
    with pytest.raises(ValueError, match="bias"):
        FeedForward.from_linears(nn.Linear(8, 24), down)
    with pytest.raises(ValueError, match="num_experts=5: must divide H=24"):
        split_dense_mlp(ours, 5)


def test_diversifying_redraws_a_share_of_each_expert() -> None:
    experts = upcycle_dense_mlp(FeedForward(8, 64), 4)
    before = experts.up_proj.detach().clone()
    diversify_experts(experts, 0.3)
    changed = experts.up_proj != before
    assert changed.float().mean(dim=(1, 2)).tolist() == pytest.approx([0.3] * 4, abs=0.05)
    assert not torch.equal(changed[0], changed[1])
    diversify_experts(experts, 0.0)
    assert torch.equal(experts.up_proj != before, changed)
    with pytest.raises(ValueError, match=r"ratio=1\.5"):
        diversify_experts(experts, 1.5)


def test_residual_mixture_weighs_dense_and_routed() -> None:
    shared = FeedForward(8, 16)
    layer = MoELayer(TopKRouter(8, 4, 1, normalize=False), GroupedExperts(4, 8, 16), shared, residual=True)
    x = X.view(4, 5, 8)
    out, routing = layer(x, return_routing=True)
    share = torch.softmax(layer.coefficient(x), -1)
    layer.shared_experts = None
    routed = layer(x, routing=routing)
    torch.testing.assert_close(out, share[..., :1] * routed + share[..., 1:] * shared(x))
    for experts in (GroupedExperts(4, 8, 16), ModuleExperts([nn.Identity()] * 4)):
        with pytest.raises(ValueError, match="residual=True"):
            MoELayer(TopKRouter(8, 4, 1), experts, residual=True)


def test_deepseek_moe_has_the_size_and_the_cost_of_plain_top_k() -> None:
    plain = deepseek_moe(8, 32, 4, 2)
    fine = deepseek_moe(8, 32, 4, 2, segments=4, num_shared=2, num_groups=2, aux_losses={"group_balancing": 0.05})

    def size(layer: MoELayer) -> int:
        return sum(p.numel() for name, p in layer.named_parameters() if "router" not in name)

    assert size(plain) == size(fine)
    assert (fine.router.num_experts, fine.router.top_k, fine.experts.hidden_dim) == (14, 6, 8)
    out, routing = fine(X, return_routing=True)
    probs = torch.softmax(X @ fine.router.weight.T, 1)
    torch.testing.assert_close(routing.expert_weight, probs.topk(6, dim=1).values)
    torch.testing.assert_close(out - fine.shared_experts(X), MoELayer(fine.router, fine.experts)(X))
    for options, words in (({"segments": 3}, "segments=3"), ({"num_shared": 2}, "num_shared=2")):
        with pytest.raises(ValueError, match=words):
            deepseek_moe(8, 32, 4, 2, **options)


def test_per_layer() -> None:
    assert per_layer(4, 3) == [4, 4, 4] and per_layer([2, 4, 8], 3) == [2, 4, 8]
    with pytest.raises(ValueError, match="each of 2 layers"):
        per_layer([2, 4, 8], 2)
