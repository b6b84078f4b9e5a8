"""Usage totals and verdicts on planted routings."""

import math

import pytest
import torch

from tests.zoo.moe.test_losses import routing_to
from zoo.moe import GroupedExperts, MoELayer, TopKRouter, Usage, record_usage


def test_totals_of_a_planted_routing() -> None:
    usage = Usage.empty()
    usage.update(routing_to([[0], [1], [1], [1]], 4))
    usage.update(routing_to([[0], [1]], 4, [True, False]))
    assert usage.counts.tolist() == [2, 3, 0, 0]
    assert usage.units == 5 and usage.dead == [2, 3]
    summary = usage.summary()
    assert summary["max_load"] == pytest.approx(3 / 5 * 4)
    assert summary["slots_per_unit"] == 1 and summary["dropped"] == 0
    assert summary["entropy"] == pytest.approx(0, abs=1e-4) and summary["margin"] == pytest.approx(1, abs=1e-4)
    assert "2 of 4 experts dead" in usage.verdict("layer 3") and usage.verdict("layer 3").startswith("layer 3")


def test_entropy_is_one_for_an_undecided_router() -> None:
    routing = routing_to([[0], [1], [2], [3]], 4)
    routing.router_probs = torch.full((4, 4), 0.25)
    usage = Usage.empty()
    usage.update(routing)
    assert usage.summary()["entropy"] == pytest.approx(1)
    assert "undecided" in usage.verdict()


def test_verdicts() -> None:
    healthy, dropping = routing_to([[0], [1], [2], [3]], 4), routing_to([[0], [1], [2], [3]], 4)
    dropping.expert_index = torch.tensor([[0], [4], [4], [3]])
    for routing, words in ((healthy, "healthy"), (dropping, "50% of the slots dropped")):
        usage = Usage.empty()
        usage.update(routing)
        assert words in usage.verdict()
    assert "no unit was routed" in Usage.empty().verdict()
    assert all(math.isfinite(value) for value in Usage.empty().summary().values())


def test_recorder_sees_every_forward_and_stops_after_the_block() -> None:
    layer = MoELayer(TopKRouter(8, 4, 2), GroupedExperts(4, 8, 16))
    with record_usage(layer) as usages, torch.no_grad():
        layer(torch.randn(5, 8))
        layer(torch.randn(6, 8))
    layer(torch.randn(7, 8))
    assert usages[""].units == 11 and usages[""].counts.sum() == 22
