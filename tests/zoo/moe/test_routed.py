"""Collection of auxiliary losses: once per step, cleared, and right under gradient checkpointing."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from zoo.errors import UnknownNameError
from zoo.moe import (
    GroupedExperts,
    MoELayer,
    RoutedModule,
    TopKRouter,
    collect_aux_losses,
    routed_modules,
    update_selection_biases,
)
from zoo.moe.routed import MAX_PENDING_FORWARDS


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *[
            MoELayer(TopKRouter(8, 4, 2), GroupedExperts(4, 8, 16), aux_losses={"load_balancing": 0.01, "z": 0.001})
            for _ in range(2)
        ]
    )


def test_total_is_the_weighted_mean_over_layers_and_is_cleared() -> None:
    model = make_model()
    model(torch.randn(10, 8))
    losses = collect_aux_losses(model)
    expected = 0.01 * losses.values["load_balancing"] + 0.001 * losses.values["z"]
    torch.testing.assert_close(losses.total.detach(), expected)
    assert losses.total.requires_grad and not losses.values["z"].requires_grad
    assert float(collect_aux_losses(model).total) == 0 and not collect_aux_losses(model).values


def test_nothing_is_kept_without_gradient_or_in_eval() -> None:
    model = make_model()
    with torch.no_grad():
        model(torch.randn(10, 8))
    model.eval()(torch.randn(10, 8))
    assert not collect_aux_losses(model).values


def test_gradient_checkpointing_counts_once_and_gives_the_same_gradient() -> None:
    x = torch.randn(10, 8)
    gradients = []
    for checkpointed in (False, True):
        model = make_model()
        seen: list[int] = []
        for module in routed_modules(model).values():
            module.observe_routing(lambda routing, seen=seen: seen.append(1))
        out = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        (out.square().mean() + collect_aux_losses(model).total).backward()
        assert not collect_aux_losses(model).values, "the recomputed forward must not leave losses behind"
        assert len(seen) == 2
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_observer_can_be_removed() -> None:
    model, seen = make_model(), []
    handle = routed_modules(model)["0"].observe_routing(seen.append)
    model(torch.randn(3, 8))
    handle.remove()
    model(torch.randn(3, 8))
    assert len(seen) == 1


def test_losses_that_nobody_collects_are_an_error() -> None:
    model = make_model()
    x = torch.randn(2, 8)
    for _ in range(MAX_PENDING_FORWARDS):
        model(x)
    with pytest.raises(RuntimeError, match="never collected"):
        model(x)


def test_biases_that_nobody_moves_are_told_once() -> None:
    layer, x = MoELayer(TopKRouter(8, 4, 2, selection_bias=True), GroupedExperts(4, 8, 16)), torch.randn(2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(MAX_PENDING_FORWARDS - 1):
            layer(x)
        update_selection_biases(layer)
        for _ in range(MAX_PENDING_FORWARDS - 1):
            layer(x)
        with pytest.raises(UserWarning, match="biases have not moved in 256 forwards of training"):
            layer(x)
        layer(x)


def test_losses_of_several_devices_are_added_on_one() -> None:
    first, second = make_model()
    first._pending_losses.append({"z": torch.ones((), device="meta")})
    second._pending_losses.append({"z": torch.ones(())})
    losses = collect_aux_losses(nn.Sequential(first, second))
    assert losses.total.device.type == losses.values["z"].device.type == "meta"


def test_copy_after_a_forward_works_and_starts_clean() -> None:
    model = make_model()
    model(torch.randn(3, 8))
    clone = copy.deepcopy(model)
    assert not collect_aux_losses(clone).values
    assert collect_aux_losses(model).values


def test_unknown_loss_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'importance'"):
        RoutedModule({"importence": 1.0})
