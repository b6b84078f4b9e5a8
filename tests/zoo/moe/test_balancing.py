"""Selection biases and count windows: counted in training only, once per forward, over a whole optimiser step."""

from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from two_ranks import run_ranks

from tests.zoo.moe.two_processes import balanced_layer, train_share
from zoo.moe import (
    GroupedExperts,
    MoELayer,
    TopKRouter,
    collect_aux_losses,
    open_count_windows,
    update_selection_biases,
)


def make_layer() -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(TopKRouter(8, 4, 1, score="sigmoid", selection_bias=True), GroupedExperts(4, 8, 16))


def test_one_update_over_an_accumulation_window() -> None:
    layer, x = make_layer(), torch.randn(12, 8)
    counts = sum(layer(part, return_routing=True)[1].column_counts() for part in x.split(4))
    assert torch.equal(layer.router.window_counts, counts)
    update_selection_biases(layer, 0.1)
    torch.testing.assert_close(layer.router.expert_bias, 0.1 * torch.sign(3 - counts))
    assert (layer.router.window_counts == 0).all()
    before = layer.router.expert_bias.clone()
    update_selection_biases(layer, 0.1)
    assert torch.equal(layer.router.expert_bias, before), "no units, no step"


def test_eval_and_recomputation_do_not_count() -> None:
    layer, x = make_layer(), torch.randn(12, 8)
    layer.eval()(x)
    with torch.no_grad():
        layer.train()(x)
    assert layer.router.window_counts.sum() == 0
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.router.window_counts.sum() == 12


def test_a_model_without_biases_is_an_error() -> None:
    with pytest.raises(ValueError, match="selection_bias=True"):
        update_selection_biases(MoELayer(TopKRouter(8, 4, 1), GroupedExperts(4, 8, 16)))


def test_a_window_balances_what_micro_batches_cannot() -> None:
    """Each micro-batch keeps to its own two experts; together they are balanced."""
    layer = balanced_layer()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4, 8) * 20)
    domains = [torch.eye(4, 8)[rows].repeat(3, 1) for rows in ([0, 1], [2, 3])]
    with torch.no_grad():
        layer.router.weight[:, :4] += 10 * torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    alone = [(layer(x), collect_aux_losses(layer).values["load_balancing"].item())[1] for x in domains]
    assert alone == pytest.approx([2.0, 2.0], abs=1e-3)
    open_count_windows(layer)
    windowed = [(layer(x), collect_aux_losses(layer).values)[1] for x in domains]
    assert [v["load_balancing"].item() for v in windowed] == pytest.approx([2.0, 1.0], abs=1e-3)
    assert [v["group_balancing"].item() for v in windowed] == pytest.approx([2.0, 1.0], abs=1e-3)
    open_count_windows(layer)
    layer(domains[0])
    assert collect_aux_losses(layer).values["load_balancing"].item() == pytest.approx(2.0, abs=1e-3), "a new window"


def test_window_matches_its_formula_and_checkpointing_counts_once() -> None:
    gradients = []
    x = torch.randn(3, 10, 8)
    for checkpointed in (False, True):
        layer = balanced_layer()
        open_count_windows(layer)
        total = torch.zeros(4)
        for part in x:
            routing = layer.router(part)
            total += routing.column_counts()
            if checkpointed:
                checkpoint(layer, part, use_reentrant=False)
            else:
                layer(part)
            losses = collect_aux_losses(layer)
            expected = 4 * (total / total.sum() * routing.router_probs.mean(0)).sum()
            torch.testing.assert_close(losses.values["load_balancing"], expected.detach())
            losses.total.backward()
        assert torch.equal(layer.count_window.total, total)
        gradients.append(layer.router.weight.grad)
    torch.testing.assert_close(*gradients)


def test_windows_need_a_loss_that_counts() -> None:
    with pytest.raises(ValueError, match="group_balancing, load_balancing"):
        open_count_windows(MoELayer(TopKRouter(8, 4, 1), GroupedExperts(4, 8, 16), aux_losses={"z": 1.0}))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """The same losses, bias updates and gradients, under gradient accumulation."""
    x = torch.randn(2, 2, 12, 8, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "x.pt")
    run_ranks(Path(__file__).with_name("two_processes.py"), tmp_path)
    one = train_share(balanced_layer(selection_bias=True), x.flatten(1, 2))
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(value, one[name], msg=name)
