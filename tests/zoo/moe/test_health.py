"""Usage totals, verdicts, traces and figures on planted routings, and what hooks read from Hugging Face blocks."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.moe.test_losses import routing_to
from zoo.moe import (
    GroupedExperts,
    MoELayer,
    NullExpertRouter,
    RoutingOutput,
    RoutingTrace,
    TopKRouter,
    Usage,
    record_trace,
    record_usage,
)
from zoo.report import draw_shares, draw_usage, save_figure


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


def usage_of(routing: RoutingOutput) -> Usage:
    usage = Usage.empty()
    usage.update(routing)
    return usage


def test_coactivation_counts_all_pairs() -> None:
    usage = usage_of(routing_to([[0, 1], [0, 1], [0, 2], [3, 2], [1, 2]], 4, [True] * 4 + [False]))
    expected = [[1, 2 / 3, 1 / 3, 0], [1, 1, 0, 0], [1 / 2, 0, 1, 1 / 2], [0, 0, 1, 1]]
    torch.testing.assert_close(usage.coactivation, torch.tensor(expected))


def test_an_expert_that_every_unit_takes_is_named_whatever_k_is() -> None:
    every = [[0, 1 + unit % 7] for unit in range(70)]
    assert "one expert takes 50% of the slots" in usage_of(routing_to(every, 8)).verdict()
    assert "healthy" in usage_of(routing_to([[unit % 8, (unit + 1) % 8] for unit in range(64)], 8)).verdict()


def test_slots_on_null_experts_are_not_dropped() -> None:
    usage = usage_of(NullExpertRouter(8, 4, 3, num_null=4)(torch.randn(50, 8)))
    assert usage.summary()["dropped"] == 0 and 0 < usage.summary()["slots_per_unit"] < 3


class Gate(nn.Module):
    """Like transformers 5: logits, weights and index."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ self.weight.T
        weight, index = torch.softmax(logits, -1).topk(2, dim=-1)
        return logits, weight, index


class FusedExperts(nn.Module):
    """Like transformers 5: called with hidden states, index and weights."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden * top_k_weights.sum(-1, keepdim=True)


class Block(nn.Module):
    """Like transformers' sparse MoE blocks; `probabilities` plays those whose gate returns these as logits."""

    def __init__(self, probabilities: bool = False) -> None:
        super().__init__()
        self.gate, self.experts, self.probabilities = Gate(), FusedExperts(), probabilities
        if probabilities:
            self.gate.register_forward_hook(lambda gate, args, out: (torch.softmax(out[0], -1), *out[1:]))

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, -2)
        _, weight, index = self.gate(flat)
        return self.experts(flat, top_k_index=index, top_k_weights=weight).view_as(hidden)


@pytest.mark.parametrize("probabilities", [False, True])
def test_hugging_face_blocks_are_read_through_hooks(probabilities: bool) -> None:
    model, x = nn.ModuleDict({"mlp": Block(probabilities)}), torch.randn(2, 5, 8)
    with record_usage(model) as usages, record_trace(model) as trace:
        model["mlp"](x)
    model["mlp"](x)
    block = model["mlp"]
    _, weight, index = block.gate(x.flatten(0, 1))
    assert usages["mlp"].units == 10
    assert torch.equal(usages["mlp"].counts, torch.bincount(index.flatten(), minlength=4).float())
    assert torch.equal(trace["mlp"].expert_index, index)
    torch.testing.assert_close(trace["mlp"].expert_weight, weight.detach())
    probs = torch.softmax(x.flatten(0, 1) @ block.gate.weight.T, 1)
    torch.testing.assert_close(torch.softmax(trace["mlp"].router_logits, 1), probs.detach())


def test_a_model_that_routes_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing that routes"), record_usage(nn.Linear(2, 2)):
        pass


def traced_model() -> tuple[nn.ModuleDict, RoutingTrace, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "a": MoELayer(TopKRouter(8, 4, 2), GroupedExperts(4, 8, 16)),
            "b": MoELayer(TopKRouter(8, 3, 1), GroupedExperts(3, 8, 16)),
        }
    )
    inputs = [torch.randn(2, 5, 8), torch.randn(3, 4, 8)]
    with record_trace(model) as trace:
        for x in inputs:
            for layer in model.values():
                layer(x, mask=torch.arange(x.shape[1]).expand(x.shape[:2]) > 0)
    return model, trace, inputs


def test_a_trace_survives_its_file_and_replays(tmp_path: Path) -> None:
    model, trace, inputs = traced_model()
    loaded = RoutingTrace.load(trace.save(tmp_path / "trace.npz"))
    assert loaded.names == ["a", "b"]
    layer = loaded["a"]
    assert layer.sample_index.tolist() == [0] * 4 + [1] * 4 + [2] * 3 + [3] * 3 + [4] * 3
    units = torch.cat([x[:, 1:].flatten(0, 1) for x in inputs])
    torch.testing.assert_close(model["a"](units, routing=layer.routing()), model["a"](units))
    for key in ("expert_index", "expert_weight", "router_logits", "sample_index"):
        assert torch.equal(getattr(layer, key), getattr(trace["a"], key))
    loaded.add("a", model["a"].router(units))
    assert loaded["a"].sample_index[17] == 5, "what is added comes after"
    with pytest.raises(KeyError, match="it holds 'a', 'b'"):
        trace["c"]
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        trace.save(tmp_path / "trace.pt")


def test_a_trace_replays_what_identity_null_experts_give(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = MoELayer(NullExpertRouter(8, 4, 3, num_null=4, null_kind="identity"), GroupedExperts(4, 8, 16))
    model, x = nn.ModuleDict({"a": layer}), torch.randn(2, 5, 8)
    mask = torch.arange(5).expand(2, 5) > 0
    with record_trace(model) as trace:
        out, routing = layer(x, mask=mask, return_routing=True)
        layer(x, routing=replace(routing, identity_weight=None))
    loaded = RoutingTrace.load(trace.save(tmp_path / "trace.npz"))["a"]
    replayed = layer(torch.cat([x[mask], x[mask]]), routing=loaded.routing())
    torch.testing.assert_close(replayed[:8], out[mask])
    assert (loaded.identity_weight[:8] > 0).any() and (loaded.identity_weight[8:] == 0).all()


def test_forwards_with_other_numbers_of_slots_join() -> None:
    trace = RoutingTrace()
    for routing in (routing_to([[0]], 3), routing_to([[1, 2]], 3)):
        trace.add("", routing)
    assert trace[""].expert_index.tolist() == [[0, 3], [1, 2]]
    assert trace[""].expert_weight.tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_load_by_label_and_transitions_match_loops() -> None:
    _, trace, _ = traced_model()
    first, second = trace["a"], trace["b"]
    by_sample = torch.tensor([0, 1, 1, 0, 2])
    table = first.load_by_label(by_sample)
    counts, moves = torch.zeros(3, 4), torch.zeros(4, 3)
    for unit in range(17):
        for expert in first.expert_index[unit]:
            counts[by_sample[first.sample_index[unit]], expert] += 1
            moves[expert, second.expert_index[unit, 0]] += 1
    torch.testing.assert_close(table, counts / counts.sum(1, keepdim=True))
    assert torch.equal(first.load_by_label(by_sample[first.sample_index]), table), "labels of units"
    assert torch.equal(first.transitions(second), moves)
    with pytest.raises(ValueError, match="labels has 3 entries; expected one for each of 17 units or of 5 samples"):
        first.load_by_label(by_sample[:3])


def test_figures_show_every_layer_and_its_verdict(tmp_path: Path) -> None:
    usages = {
        "blocks.0": usage_of(routing_to([[0], [1], [2], [3]], 4)),
        "blocks.1": usage_of(routing_to([[0]], 2)),
        "unused": Usage.empty(),
    }
    figure = draw_usage(usages)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["blocks.0", "blocks.1"]
    assert "healthy" in axes.texts[0].get_text() and "1 of 2 experts dead" in axes.texts[1].get_text()
    assert axes.lines[1].get_xydata().tolist() == [[1, 1]], "a cross on the dead expert"
    shares = draw_shares({"blocks.0": torch.eye(2, 4)}, ["news", "code"])
    assert [label.get_text() for label in shares.axes[0].get_yticklabels()] == ["news", "code"]
    for name, drawn in (("usage.png", figure), ("shares.svg", shares)):
        assert save_figure(drawn, tmp_path / name).stat().st_size > 1000
