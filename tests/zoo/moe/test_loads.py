"""Who works for whom: loads against a loop over units, what groups explain against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import homogeneity_score, mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from zoo.moe import DenseRouter, RoutingOutput, TopKRouter, expert_loads, expert_shares, group_dependence
from zoo.moe.routing import RouterInput


def routed(rows: list[int], experts: int, top_k: int, seed: int = 0) -> RoutingOutput:
    """Decisions for rows of so many real units, each padded to the longest, by a router of random weights."""
    length = max(rows)
    router = TopKRouter(input_dim=6, num_experts=experts, top_k=top_k)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(next(router.parameters()), generator=generator)
    x = torch.randn(len(rows) * length, 6, generator=generator)
    sample = torch.arange(len(rows)).repeat_interleave(length)
    mask = torch.arange(length).repeat(len(rows)) < torch.tensor(rows).repeat_interleave(length)
    return router(x, mask=mask, sample_index=sample)


def test_loads_are_a_loop_over_units() -> None:
    first = routed([4, 7, 2], 5, 2)
    x = torch.randn(len(first.mask), 6, generator=torch.Generator().manual_seed(2))
    dense = DenseRouter(4, 6, "softmax").route(RouterInput(x, first.mask, first.sample_index))
    routing = {"first": first, "second": routed([4, 7, 2], 3, 1, seed=1), "dense": dense}
    owners, count = [2, 0, 2], 4
    found = expert_loads(routing, owners, count)
    assert list(found) == list(routing)
    for layer, decided in routing.items():
        expected = np.zeros((count, decided.num_experts))
        for unit in range(len(decided.mask)):
            for index, weight in zip(decided.expert_index[unit], decided.expert_weight[unit], strict=True):
                if decided.mask[unit] and index < decided.num_experts:
                    expected[owners[int(decided.sample_index[unit])], index] += weight.item()
        np.testing.assert_allclose(found[layer], expected, rtol=1e-6)
    # Weights of a unit add up to 1.
    np.testing.assert_allclose(found["first"].sum(axis=1), [7, 0, 6, 0], rtol=1e-6)
    of_tensor = expert_loads(routing, torch.tensor(owners), count)
    np.testing.assert_array_equal(of_tensor["first"], found["first"])


@pytest.mark.parametrize("owners", [[1, 0], torch.tensor([1, 0])])
def test_owners_are_brought_to_where_the_sums_are(owners: list[int] | torch.Tensor) -> None:
    routing = {"top": routed([2, 3], 3, 1)}
    expected = expert_loads(routing, [1, 0], 2)["top"]
    # Stands for a GPU: what does not say where it goes is put on another device than the sums.
    with torch.device("meta"):
        found = expert_loads(routing, owners, 2)["top"]
    np.testing.assert_array_equal(found, expected)


def test_padding_is_left_out_whatever_its_weight() -> None:
    routing = routed([3, 1], 4, 2)
    before = expert_loads({"": routing}, [0, 1], 2)[""]
    padding = ~routing.mask
    routing.expert_index[padding], routing.expert_weight[padding] = 0, 5.0
    np.testing.assert_array_equal(expert_loads({"": routing}, [0, 1], 2)[""], before)
    real = routing.take(routing.mask.nonzero()[:, 0])
    real.mask = None
    np.testing.assert_array_equal(expert_loads({"": real}, [0, 1], 2)[""], before)


def test_loads_need_to_know_the_row() -> None:
    routing = routed([2], 3, 1)
    routing.sample_index = None
    with pytest.raises(ValueError, match="'top' has no sample_index"):
        expert_loads({"top": routing}, [0], 1)


def test_shares_of_groups() -> None:
    load = np.array([[1.0, 3], [4, 0], [1, 1], [0, 0]])
    shares = expert_shares({"top": load}, ["b", "a", "b", "a"])
    assert list(shares["top"]) == ["b", "a"]
    np.testing.assert_allclose(shares["top"]["b"], [2 / 6, 4 / 6])
    np.testing.assert_allclose(shares["top"]["a"], [1, 0])
    with pytest.raises(ValueError, match="'top' has routed nothing of 'c'"):
        expert_shares({"top": load}, ["a", "a", "a", "c"])
    with pytest.raises(ValueError, match="'top' has routed nothing of 'c'"):
        group_dependence({"top": load}, ["a", "a", "a", "c"])


def test_dependence_is_scikit_learns() -> None:
    """With as many units in each group it is the homogeneity of experts within groups; groups count alike."""
    random = np.random.default_rng(0)
    group = np.repeat(["a", "b", "c"], 40)
    expert = np.concatenate([random.choice(4, 40, p=share) for share in random.dirichlet(np.ones(4), 3)])
    load = np.eye(4)[expert]
    weights = np.concatenate([load[:40] * 7.5, load[40:]])
    found = group_dependence({"load": load, "weights": weights}, list(group), 1)
    explained = found["load"].explained
    assert explained == pytest.approx(homogeneity_score(expert, group), abs=1e-12)
    assert 0.05 < explained < 0.95
    assert found["weights"].explained == pytest.approx(explained)
    whole = load.mean(axis=0)
    information = mutual_info_score(None, None, contingency=contingency_matrix(group, expert))
    assert explained == pytest.approx(information / -(whole * np.log(whole)).sum())


def test_dependence_of_extremes_and_of_chance() -> None:
    groups, random = list("aabbcc"), np.random.default_rng(0)
    layers = {"all": np.eye(3)[[0, 0, 1, 1, 2, 2]], "none": np.ones((6, 5)), "one": np.eye(3)[[1] * 6]}
    found = group_dependence(layers, groups, permutations=100)
    assert list(found) == list(layers)
    assert found["all"].explained == pytest.approx(1)
    for layer in ("none", "one"):
        assert found[layer] == pytest.approx((0, 0, 1), abs=1e-12)
    many = list(np.repeat(["a", "b", "c"], 20))
    drawn = group_dependence({"": np.eye(4)[random.integers(4, size=60)]}, many, permutations=100)[""]
    decided = group_dependence({"": np.eye(3)[np.repeat([0, 1, 2], 20)]}, many, permutations=100)[""]
    assert 0.01 < drawn.chance < 0.2 and drawn.p_value > 0.02
    assert decided.p_value == pytest.approx(1 / 101)
    assert group_dependence({}, []) == {}
