"""Selection biases: counted in training only, once per forward, moved once per step."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from zoo.moe import GroupedExperts, MoELayer, TopKRouter, update_selection_biases


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
