"""Sorting slots by expert."""

import pytest
import torch

from zoo.moe.dispatch import sort_slots


@pytest.mark.parametrize("num_experts", [1, 7, 300, 40_000])
@pytest.mark.parametrize("units", [0, 50])
def test_slots_are_sorted_by_expert_and_else_keep_their_order(num_experts: int, units: int) -> None:
    index = torch.randint(num_experts + 1, (units, 3), generator=torch.Generator().manual_seed(0))
    slot, sizes = sort_slots(index, num_experts)
    expected = sorted((expert, place) for place, expert in enumerate(index.flatten().tolist()) if expert < num_experts)
    assert slot.tolist() == [place for _, place in expected] and slot.dtype == torch.int64
    assert len(sizes) == num_experts and sum(sizes) == len(expected)
    assert all(sizes[expert] == [e for e, _ in expected].count(expert) for expert in {e for e, _ in expected})
