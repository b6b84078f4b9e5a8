"""The function of `sorted_mm`, its chunks and its memory, against the double loop and in double precision."""

import copy
import pickle

import pytest
import torch

from tests.zoo.moe.reference import double_loop
from zoo.moe import GroupedExperts, MoELayer, TopKRouter, sorted_mm
from zoo.moe.experts import sorted_sum
from zoo.moe.sorted_mm import Plan, Recycled


@pytest.fixture(params=["together", "pairs", "alone"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have `sorted_mm` run its experts all together, two by two or one by one, whatever their loads."""
    tiny_rows, min_share = {"together": (10_000, 0), "pairs": (0, 0), "alone": (-1, 2)}[request.param]
    monkeypatch.setattr(sorted_mm, "TINY_ROWS", tiny_rows)
    monkeypatch.setattr(sorted_mm, "MIN_SHARE", min_share)
    used = []
    found = Plan.chunks
    monkeypatch.setattr(Plan, "chunks", lambda plan: used.extend(found(plan)) or found(plan))
    yield request.param
    assert max(len(chunk.sizes) for chunk in used) == {"together": 4, "pairs": 2, "alone": 1}[request.param]


def make_layer(**options: object) -> MoELayer:
    torch.manual_seed(1)
    return MoELayer(TopKRouter(8, 4, 2), GroupedExperts(4, 8, 16, backend="sorted_mm", **options))


OPTIONS = [{}, {"bias": True}, {"gated": False, "activation": "gelu", "bias": True}, {"activation": "tanh"}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("padding", [False, True])
def test_equals_the_double_loop(chunks: str, options: dict[str, object], padding: bool) -> None:
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
def test_gradcheck(chunks: str, options: dict[str, object]) -> None:
    experts = make_layer(**options).double().experts
    # Every expert has rows, one unit is served twice by different experts, one slot is empty.
    unit, slot = torch.tensor([0, 2, 1, 0, 3, 2]), torch.tensor([0, 4, 2, 1, 6, 5])
    plan = Plan(unit, slot, [2, 1, 2, 1], (4, 2))
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)

    def run(*operands: torch.Tensor) -> torch.Tensor:
        return sorted_sum(experts, operands[0], operands[1], plan)

    assert torch.autograd.gradcheck(run, (x, weight, *experts.parameters()))


def test_backward_can_run_twice(chunks: str) -> None:
    layer = make_layer(activation="identity")
    loss = layer(torch.randn(20, 8)).square().sum()
    first, second = (torch.autograd.grad(loss, layer.experts.up_proj, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_not_routed_is_not_read(chunks: str) -> None:
    layer = make_layer(bias=True)
    x, mask = torch.randn(20, 8), torch.arange(20) > 2
    clean = layer(x, mask=mask)
    expected = torch.autograd.grad(clean.square().sum(), layer.experts.parameters())
    routing = layer(x, mask=mask, return_routing=True)[1]
    x[0] = float("nan")
    out = layer(x, routing=routing)
    assert torch.equal(out, clean)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), layer.experts.parameters()), expected)


def plan_of(sizes: list[int]) -> Plan:
    slot = torch.arange(sum(sizes))
    return Plan(slot, slot, sizes, (len(slot), 1))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([100, 500, 110, 480], [[1, 3], [0, 2]]),
        ([500, 100, 0, 90], [[0], [1, 3]]),
        ([500, 100, 10], [[0], [1], [2]]),
        ([30, 20, 0, 0], [[0, 1]]),
        ([1, 9, 0, 1], [[0, 1, 2, 3]]),
        ([0, 0, 0, 8], [[3]]),
        ([0, 0], []),
    ],
    ids=["alike", "an odd one", "too different", "few rows", "tiny: idle ones too", "mostly idle", "nothing"],
)
def test_experts_of_nearly_the_same_load_share_a_chunk(sizes: list[int], expected: list[list[int]]) -> None:
    plan = plan_of(sizes)
    chunks = plan.chunks()
    assert [list(range(len(sizes))[chunk.experts]) for chunk in chunks] == expected
    # Every slot has a place of its own, within the rows of its expert.
    places = plan.places(chunks).split(sizes)
    for chunk in chunks:
        longest = max(chunk.sizes)
        for number, expert in enumerate(range(len(sizes))[chunk.experts]):
            assert chunk.sizes[number] == sizes[expert]
            start = chunk.rows.start + number * longest
            assert places[expert].tolist() == list(range(start, start + sizes[expert]))


def test_memory_is_used_again_only_once_nobody_holds_it() -> None:
    memory, like = Recycled(), torch.zeros(3, 4)
    first = memory.empty_like(like).fill_(1)
    address, view = first.data_ptr(), first[1:].detach()
    assert first.shape == like.shape and first.dtype == like.dtype
    del first
    second = memory.empty_like(like).fill_(2)
    assert (view == 1).all(), "a view keeps it"
    del second
    third = memory.empty_like(like)
    assert third.data_ptr() != address
    address = third.data_ptr()
    del third
    assert memory.empty_like(like).data_ptr() == address
    assert memory.empty_like(like.double()).dtype == torch.float64
    shared = memory.empty_like(like).share_memory_()
    address = shared.data_ptr()
    del shared
    assert memory.empty_like(like).data_ptr() != address, "another process may read it"
    assert copy.deepcopy(memory).storage is pickle.loads(pickle.dumps(memory)).storage is None


def test_gradients_use_the_memory_of_the_step_before() -> None:
    layer = make_layer()
    x = torch.randn(20, 8)

    def step() -> torch.Tensor:
        layer(x).square().sum().backward()
        return layer.experts.up_proj.grad

    kept = step()
    expected, address = kept.clone(), kept.data_ptr()
    torch.testing.assert_close(step(), 2 * expected, msg="gradients accumulate")
    layer.zero_grad(set_to_none=True)
    assert step().data_ptr() != address
    torch.testing.assert_close(kept, 2 * expected, msg="what is kept stays")
    address = layer.experts.up_proj.grad.data_ptr()
    layer.zero_grad(set_to_none=True)
    assert step().data_ptr() == address
