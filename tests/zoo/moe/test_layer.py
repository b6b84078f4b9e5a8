"""The layer against a per-unit double loop, on every backend."""

import copy
import logging

import pytest
import torch
from torch import nn

from tests.zoo.moe.reference import double_loop
from zoo.moe import (
    DenseRouter,
    GroupedExperts,
    ModuleExperts,
    MoELayer,
    Router,
    ThresholdRouter,
    TopKRouter,
    collect_aux_losses,
)
from zoo.moe import experts as experts_module

BACKENDS = ["loop", "sorted_mm", "grouped_mm", "dense", "auto"]


def make_layer(router: Router, backend: str = "loop", **options: object) -> MoELayer:
    torch.manual_seed(1)
    return MoELayer(router, GroupedExperts(router.num_experts, 8, 16, backend=backend, **options))


@pytest.mark.parametrize("options", [{"gated": False, "activation": "gelu"}, {"bias": True}, {"out_dim": 12}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kinds_of_experts(backend: str, options: dict[str, object]) -> None:
    layer = make_layer(TopKRouter(8, 4, 2), backend, **options)
    x = torch.randn(9, 8)
    out, routing = layer(x, return_routing=True)
    torch.testing.assert_close(out, double_loop(layer.experts, x, routing), atol=2e-6, rtol=0)


@pytest.mark.parametrize("options", [{}, {"gated": False, "activation": "gelu"}, {"bias": True, "activation": "tanh"}])
@pytest.mark.parametrize("backend", ["loop", "sorted_mm"])
def test_gradcheck_in_double_precision(backend: str, options: dict[str, object]) -> None:
    layer = make_layer(TopKRouter(8, 4, 2), backend, **options).double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    routing = layer(x, return_routing=True)[1]
    weight = routing.expert_weight.detach().double().requires_grad_()

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        routing.expert_weight = weight
        return layer(x, routing=routing)

    assert torch.autograd.gradcheck(run, (x, weight))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_expert_is_the_dense_network(backend: str) -> None:
    layer = make_layer(TopKRouter(8, 1, 1), backend, gated=False, bias=True, activation="gelu")
    experts = layer.experts
    dense = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    dense[0].weight.data, dense[0].bias.data = experts.up_proj.data[0], experts.up_bias.data[0]
    dense[2].weight.data, dense[2].bias.data = experts.down_proj.data[0], experts.down_bias.data[0]
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(layer(x), dense(x), atol=1e-6, rtol=0)


def test_state_dict_round_trip_with_buffers() -> None:
    layer = make_layer(TopKRouter(8, 4, 2, score="sigmoid", selection_bias=True))
    layer.router.update_bias(torch.tensor([4.0, 0.0, 1.0, 3.0]), 0.1)
    fresh = make_layer(TopKRouter(8, 4, 2, score="sigmoid", selection_bias=True))
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(10, 8)
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(fresh.router.expert_bias, torch.tensor([-0.1, 0.1, 0.1, -0.1]))


def test_bfloat16_keeps_routing_in_float32() -> None:
    layer = make_layer(TopKRouter(8, 4, 2, selection_bias=True))
    layer.router.expert_bias += 1.0001
    layer.bfloat16()
    out, routing = layer(torch.randn(5, 8, dtype=torch.bfloat16), return_routing=True)
    assert out.dtype == torch.bfloat16
    assert routing.router_logits.dtype == routing.expert_weight.dtype == torch.float32
    assert torch.equal(layer.router.expert_bias, torch.full((4,), 1.0001))


def test_shared_experts_are_added() -> None:
    shared = nn.Linear(8, 8)
    layer = MoELayer(TopKRouter(8, 4, 2), GroupedExperts(4, 8, 16), shared_experts=shared)
    x = torch.randn(2, 3, 8)
    out, routing = layer(x, return_routing=True)
    layer.shared_experts = None
    torch.testing.assert_close(out, layer(x, routing=routing) + shared(x))


def test_expert_mask_forbids_experts() -> None:
    layer = make_layer(TopKRouter(8, 4, 2))
    layer.expert_mask = torch.tensor([True, False, False, False])
    routing = layer(torch.randn(30, 8), return_routing=True)[1]
    assert (routing.expert_index[:, 0] == 0).all()
    assert (routing.expert_index[:, 1] == 4).all(), "the second slot has no expert left and stays empty"
    torch.testing.assert_close(routing.expert_weight.sum(1), torch.ones(30))
    per_unit = torch.zeros(30, 4, dtype=torch.bool)
    per_unit[torch.arange(30), torch.arange(30) % 4] = True
    layer.expert_mask = per_unit
    assert torch.equal(layer(torch.randn(30, 8), return_routing=True)[1].expert_index[:, 0], torch.arange(30) % 4)


@pytest.mark.parametrize("backend", ["loop", "dense"])
def test_expert_map_points_columns_at_stored_experts(backend: str) -> None:
    torch.manual_seed(0)
    merged = GroupedExperts(2, 8, 16, backend=backend)
    layer = MoELayer(TopKRouter(8, 4, 2), merged, expert_map=[1, 0, 0, 1])
    spread = GroupedExperts(4, 8, 16)
    for name in ("up_proj", "down_proj"):
        getattr(spread, name).data = getattr(merged, name).data[[1, 0, 0, 1]]
    x = torch.randn(11, 8)
    torch.testing.assert_close(layer(x), MoELayer(layer.router, spread)(x), atol=1e-6, rtol=0)


def test_concat_leaves_the_place_of_an_expert_that_is_not_used_empty() -> None:
    layer = MoELayer(DenseRouter(3), GroupedExperts(3, 8, 16, out_dim=2), combine="concat")
    x = torch.randn(6, 8, requires_grad=True)
    outputs = layer.experts.forward_all([x])
    layer.expert_mask = torch.tensor([False, True, True])
    expected = torch.cat([torch.zeros(6, 2), outputs[:, 1], outputs[:, 2]], dim=1)
    out = layer(x)
    torch.testing.assert_close(out, expected)
    ours, theirs = (torch.autograd.grad(value.square().sum(), x, retain_graph=True)[0] for value in (out, expected))
    torch.testing.assert_close(ours, theirs)
    layer = MoELayer(TopKRouter(8, 3, 3), layer.experts, combine="concat")
    torch.testing.assert_close(layer(x), outputs.flatten(1))


def test_forced_routing_replays_a_decision() -> None:
    first, second = make_layer(TopKRouter(8, 4, 2)), make_layer(TopKRouter(8, 4, 2))
    second.router.weight.data.neg_()
    x = torch.randn(7, 8)
    out, routing = first(x, return_routing=True)
    assert torch.equal(second(x, routing=routing), out)
    assert not torch.allclose(second(x), out)


def test_forced_routing_of_other_experts_or_units_is_refused() -> None:
    layer, x = make_layer(TopKRouter(8, 4, 2)), torch.randn(7, 8)
    for other, rows, words in (
        (TopKRouter(8, 3, 2), 7, "routing='3 experts': but the router of this layer has 4"),
        (TopKRouter(8, 5, 2), 7, "routing='5 experts': but the router of this layer has 4"),
        (layer.router, 6, "routing='6 units': but x has 7"),
        (layer.router, 8, "routing='8 units': but x has 7"),
    ):
        with pytest.raises(ValueError, match=words):
            layer(x, routing=other(torch.randn(rows, 8)))


@pytest.mark.parametrize("backend", ["loop", "sorted_mm", "grouped_mm"])
def test_sparse_backends_equal_dense_export_path(backend: str) -> None:
    sparse = make_layer(TopKRouter(8, 4, 2), backend)
    dense = copy.deepcopy(sparse)
    dense.experts.backend = "dense"
    x = torch.randn(4, 6, 8)
    torch.testing.assert_close(sparse(x), dense(x), atol=2e-6, rtol=0)


def test_exports_with_dynamic_number_of_tokens() -> None:
    layer = make_layer(TopKRouter(8, 4, 2)).eval()
    x = torch.randn(6, 8)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=64)},))
    longer = torch.randn(11, 8)
    torch.testing.assert_close(program.module()(longer), layer(longer), atol=1e-5, rtol=0)


def test_backend_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    experts_module.log_once.cache_clear()
    layer = make_layer(TopKRouter(8, 4, 2), "auto")
    with caplog.at_level(logging.INFO, logger="zoo.moe.experts"):
        layer(torch.randn(3, 8))
        layer(torch.randn(3, 8))
    assert len(caplog.records) == 1 and "MoE backend" in caplog.text and "(" in caplog.text


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MoELayer(TopKRouter(8, 3, 1), GroupedExperts(4, 8, 16)), "3 experts.*4 are stored"),
        (lambda: MoELayer(TopKRouter(8, 4, 1), GroupedExperts(4, 8, 16), combine="sun"), "Did you mean 'sum'"),
        (lambda: MoELayer(TopKRouter(8, 4, 2), GroupedExperts(4, 8, 16), combine="select"), "the router has 2"),
        (lambda: MoELayer(TopKRouter(8, 4, 2), GroupedExperts(4, 8, 16), combine="concat"), "use DenseRouter"),
        (lambda: MoELayer(TopKRouter(8, 4, 2), GroupedExperts(4, 8, 16), mixer=nn.Identity()), "experts_first=True"),
        (
            lambda: MoELayer(TopKRouter(8, 4, 2), GroupedExperts(4, 8, 16), aux_losses={"load_balance": 1}),
            "Did you mean 'load_balancing'",
        ),
        (lambda: MoELayer(TopKRouter(8, 4, 2), GroupedExperts(4, 8, 16), aux_losses={"z": -1}), "-1.*0 or larger"),
        (lambda: MoELayer(TopKRouter(8, 4, 2), GroupedExperts(2, 8, 16), expert_map=[0, 1, 2, 0]), "0..1"),
        (lambda: GroupedExperts(4, 8, 16, activation="silo"), "Did you mean 'silu'"),
        (lambda: GroupedExperts(4, 8, 16, backend="looop"), "Did you mean 'loop'"),
        (lambda: GroupedExperts(4, 8, 0), "hidden_dim=0"),
        (lambda: ModuleExperts([nn.Identity()], stream=[1]), "stream"),
        (lambda: ModuleExperts([]), "at least one"),
    ],
)
def test_parts_that_do_not_fit(build: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()  # type: ignore[operator]


def test_shapes_that_do_not_fit() -> None:
    layer = make_layer(TopKRouter(8, 4, 2))
    with pytest.raises(ValueError, match=r"mask has shape \(3,\), expected \(2, 3\)"):
        layer(torch.randn(2, 3, 8), mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 streams"):
        layer((torch.randn(2, 8), torch.randn(2, 8)))
    images = MoELayer(
        ThresholdRouter(8), ModuleExperts([nn.Identity(), nn.Identity()], unit_ndims=[3]), combine="select"
    )
    with pytest.raises(ValueError, match="pass router_input"):
        images(torch.randn(2, 1, 4, 4))
    with pytest.raises(ValueError, match="router_input has shape"):
        images(torch.randn(2, 1, 4, 4), router_input=torch.randn(3, 8))


def test_a_backend_asked_for_by_name_that_cannot_run_says_so() -> None:
    layer = MoELayer(TopKRouter(7, 4, 2), GroupedExperts(4, 7, 16, backend="grouped_mm"))
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        layer(torch.randn(3, 7))


def test_every_routed_expert_and_the_router_get_a_gradient() -> None:
    layer = make_layer(TopKRouter(8, 4, 2), bias=True)
    layer(torch.randn(200, 8)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        per_expert = parameter.grad.flatten(1).norm(dim=1)
        assert (per_expert > 0).all(), name
    assert float(collect_aux_losses(layer).total) == 0
