"""Both functions of `sorted_mm`, padded and not, against the double loop and in double precision."""

import pytest
import torch

from tests.zoo.moe.reference import double_loop
from zoo.moe import GroupedExperts, MoELayer, TopKRouter, sorted_mm
from zoo.moe import experts as experts_module
from zoo.moe.sorted_mm import PaddedFeedForward, Plan, SortedFeedForward

FUNCTIONS = {"padded": PaddedFeedForward, "sorted": SortedFeedForward}


@pytest.fixture(params=FUNCTIONS)
def function(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have `sorted_mm` use one of its functions, whatever the shape."""
    rows = 0 if request.param == "sorted" else 10_000
    monkeypatch.setattr(sorted_mm, "TINY_ROWS", rows)
    monkeypatch.setattr(sorted_mm, "FEW_ROWS", rows)
    used = []
    for name, cls in (("PaddedFeedForward", PaddedFeedForward), ("SortedFeedForward", SortedFeedForward)):
        spy = type(name, (), {"apply": staticmethod(lambda *args, cls=cls: (used.append(cls), cls.apply(*args))[1])})
        monkeypatch.setattr(experts_module, name, spy)
    yield request.param
    assert set(used) == {FUNCTIONS[request.param]}


def make_layer(**options: object) -> MoELayer:
    torch.manual_seed(1)
    return MoELayer(TopKRouter(8, 4, 2), GroupedExperts(4, 8, 16, backend="sorted_mm", **options))


OPTIONS = [{}, {"bias": True}, {"gated": False, "activation": "gelu", "bias": True}, {"activation": "tanh"}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("padding", [False, True])
def test_equals_the_double_loop(function: str, options: dict[str, object], padding: bool) -> None:
    torch.manual_seed(0)
    layer = make_layer(**options)
    x = torch.randn(30, 8, requires_grad=True)
    mask = torch.rand(30) > 0.3 if padding else None
    out, routing = layer(x, mask=mask, return_routing=True)
    expected = double_loop(layer.experts, x, routing)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, mask=mask), expected, atol=2e-6, rtol=0)
    target = torch.randn_like(out)
    wanted = [x, layer.router.weight, *layer.experts.parameters()]
    ours = torch.autograd.grad((out * target).sum(), wanted, retain_graph=True)
    naive = torch.autograd.grad((expected * target).sum(), wanted)
    torch.testing.assert_close(ours, naive, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [*OPTIONS, {"gated": False, "activation": "relu"}, {"activation": "identity"}])
def test_gradcheck(function: str, options: dict[str, object]) -> None:
    experts = make_layer(**options).double().experts
    # Every expert has rows, one unit is served twice by different experts, one slot is empty.
    unit, slot = torch.tensor([0, 2, 1, 0, 3, 2]), torch.tensor([0, 4, 2, 1, 6, 5])
    plan = Plan(unit, slot, [2, 1, 2, 1], (4, 2))
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)

    def run(*operands: torch.Tensor) -> torch.Tensor:
        return experts_module.sorted_sum(experts, operands[0], operands[1], plan)

    assert torch.autograd.gradcheck(run, (x, weight, *experts.parameters()))


def test_backward_can_run_twice(function: str) -> None:
    layer = make_layer(activation="identity")
    loss = layer(torch.randn(20, 8)).square().sum()
    first, second = (torch.autograd.grad(loss, layer.experts.up_proj, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_padding_is_chosen_for_few_rows_of_most_experts() -> None:
    def pads(sizes: list[int]) -> bool:
        rows = torch.zeros(sum(sizes), dtype=torch.long)
        return Plan(rows, rows, sizes, (sum(sizes), 1)).pads_well

    assert pads([60, 64, 70, 66])
    assert pads([1, 9, 1, 1]), "tiny: padding is free beside reading the weights"
    assert not pads([500, 500, 500, 500]), "many rows"
    assert not pads([150, 20, 20, 20]), "more padding than rows"
    assert not pads([8, 0, 0, 8]), "half the experts have nothing to do"
    assert not pads([0, 0, 0, 0])
