"""Consistency and its intervals against loops, the balanced subset, best-of-n against all subsets, losses by hand."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from sklearn.metrics import confusion_matrix as reference_confusion

from tasks.reward.best_of_n import best_of_n_curve, expected_best, kl_of
from tasks.reward.evaluate import (
    BALANCED,
    POOLED,
    Report,
    agreement,
    confusion_matrix,
    length_balanced,
    length_differences,
)
from tasks.reward.examples import Pair
from tasks.reward.losses import bradley_terry_loss, capability_loss
from tasks.reward.plots import plot_best_of_n, plot_consistency, plot_routes
from zoo.comparison import RESAMPLES
from zoo.errors import UnknownNameError


@pytest.fixture(scope="module")
def report():
    """Two models, one of them with two seeds, on 200 pairs of 60 prompts in three categories."""
    random = np.random.default_rng(0)
    prompts = random.integers(60, size=200)
    categories = [("a", "b", "c")[number % 3] for number in prompts]
    lengths = random.integers(-20, 30, size=200).astype(float)
    differences = {"ours": random.normal(0.5, 1, (2, 200)), "other": random.normal(0.1, 1, 200), "longer": lengths}
    found = Report.of(categories, prompts, lengths, differences, {"good": ["a", "b"], "none": []})
    return found, prompts, np.array(categories), lengths, differences


def test_metrics_are_shares_of_pairs(report):
    found, _, categories, lengths, differences = report
    right = differences["ours"] > 0
    metrics = found.metrics("ours")
    assert metrics[POOLED] == pytest.approx(100 * right.mean())
    assert metrics["b/consistency"] == pytest.approx(100 * right[:, categories == "b"].mean())
    assert metrics["good/consistency"] == pytest.approx(100 * right[:, categories != "c"].mean())
    assert "none/consistency" not in metrics
    tied = 50 * (lengths == 0) + 100 * (lengths > 0)
    assert found.metrics("longer")[POOLED] == pytest.approx(tied.mean())
    assert found.all_metrics("ours")["other/consistency"] == found.metrics("other")[POOLED]
    rows = found.rows([POOLED])
    assert rows[1]["model"] == "+- over 2 seeds"
    assert rows[1][POOLED] == pytest.approx((100 * right.mean(1)).std(ddof=1))


def test_a_tie_counts_half_and_no_number_is_an_error():
    assert agreement(np.array([0.1, 0.0, -3.0])).tolist() == [100, 50, 0]
    with pytest.raises(ValueError, match="1 of 2 rewards"):
        agreement(np.array([np.nan, 1.0]))


def test_picking_the_longer_is_right_in_half_of_the_balanced_subset(report):
    found, _, categories, lengths, _ = report
    places = length_balanced(lengths, categories)
    assert found.metrics("longer")[BALANCED] == 50
    for name in "abc":
        own = lengths[places][categories[places] == name]
        sides = lengths[categories == name]
        # As large as it can be.
        assert (own > 0).sum() == (own < 0).sum() == min((sides > 0).sum(), (sides < 0).sum())
    assert not (lengths[places] == 0).any() and len(set(places.tolist())) == len(places)
    assert np.array_equal(places, length_balanced(lengths, categories))
    only = Report.of(["a"], [0], np.array([5.0]), {"ours": np.array([1.0])})
    assert BALANCED not in only.metric_names()
    assert length_differences([Pair("p", "four", "of", "", "1")]).tolist() == [2]


def test_intervals_draw_whole_prompts(report):
    found, prompts, categories, _, differences = report
    right = 100.0 * (differences["other"] > 0)
    for key, chosen in ((POOLED, np.ones(200, bool)), ("a/consistency", categories == "a")):
        expected = []
        for draw in found.draws[:300]:
            taken = [
                value
                for value, prompt, own in zip(right, prompts, chosen, strict=True)
                if own
                for _ in range(int(draw[prompt]))
            ]
            expected.append(np.mean(taken))
        np.testing.assert_allclose(found.resample("other", key)[:300, 0], expected)
    assert found.draws.shape == (RESAMPLES, prompts.max() + 1)
    assert (found.draws.sum(1) == prompts.max() + 1).all()
    low, high = np.quantile(found.resample("other", POOLED)[:, 0], [0.025, 0.975])
    assert found.interval("other", POOLED) == pytest.approx((right.mean(), low, high))
    # Pairs of few prompts say less than as many pairs of many.
    same = Report.of(["a"] * 200, prompts % 5, np.ones(200), {"other": differences["other"] + prompts % 5 - 2.0})
    many = Report.of(["a"] * 200, np.arange(200), np.ones(200), {"other": differences["other"] + prompts % 5 - 2.0})
    widths = [interval.high - interval.low for interval in (r.interval("other", POOLED) for r in (same, many))]
    assert widths[0] > 2 * widths[1]


def test_differences_are_paired(report):
    found = report[0]
    assert found.difference("other", "other", POOLED)[:3] == (0, 0, 0)
    between = found.difference("ours", "other", POOLED)
    assert between.mean == pytest.approx(found.metrics("ours")[POOLED] - found.metrics("other")[POOLED])
    assert between.low < between.mean < between.high
    (row,) = found.difference_rows("ours", "other", ["c/consistency"])
    assert row["metric"] == "c/consistency"
    single = Report.of(["a", "a"], [0, 0], np.ones(2), {"ours": np.array([1.0, -1.0])})
    assert single.interval("ours", POOLED).mean == 50 and math.isnan(single.interval("ours", POOLED).low)
    with pytest.raises(UnknownNameError, match="model"):
        found.interval("our", POOLED)
    with pytest.raises(UnknownNameError, match="metric"):
        found.interval("ours", "d/consistency")
    with pytest.raises(ValueError, match="of 3 pairs; there are 2"):
        Report.of(["a", "a"], [0, 1], np.ones(2), {"ours": np.ones(3)})
    with pytest.raises(ValueError, match="no pairs"):
        Report.of([], [], np.ones(0), {})


def test_confusion_is_scikit_learns():
    random = np.random.default_rng(1)
    wanted, found = random.integers(4, size=(2, 50))
    assert np.array_equal(confusion_matrix(wanted, found, 4), reference_confusion(wanted, found, labels=range(4)))


# --- best of n -------------------------------------------------------------------------------------------------------


def brute_force(proxy, values, n):
    """The mean over all sets of n; among equals of a set, and over their order, each is as likely."""
    found = []
    for chosen in combinations(range(len(proxy)), n):
        best = max(proxy[place] for place in chosen)
        found.append(np.mean([values[place] for place in chosen if proxy[place] == best]))
    return np.mean(found)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_the_estimator_is_the_mean_over_all_subsets(n):
    random = np.random.default_rng(n)
    proxy, values = random.normal(size=(2, 7))
    assert expected_best(proxy, values, n) == pytest.approx(brute_force(proxy, values, n))


def test_ties_count_as_their_mean():
    proxy, values = np.array([1.0, 1.0, 0.0]), np.array([4.0, 0.0, 9.0])
    assert expected_best(proxy, values, 3) == 2
    # Two of three: the two tied ones (2), or one of them with the lower one (4 or 0).
    assert expected_best(proxy, values, 2) == pytest.approx(2)
    with pytest.raises(ValueError, match="n=4"):
        expected_best(proxy, values, 4)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_kl_of_best_of_n_is_that_of_the_exact_distribution(n):
    # Of a large finite policy with a strict order: the best of n is the i-th with ((i/N)^n - ((i-1)/N)^n).
    size = 20000
    edges = np.arange(size + 1) / size
    best = np.diff(edges**n)
    assert kl_of(n) == pytest.approx(entropy(best, np.full(size, 1 / size)), abs=1e-3)


def test_a_curve_of_an_over_optimised_proxy(tmp_path):
    random = np.random.default_rng(0)
    gold = list(random.normal(size=(40, 16)))
    right, wrong = best_of_n_curve(gold, gold, [1, 4, 16]), best_of_n_curve([-of for of in gold], gold, [1, 4, 16])
    assert (np.diff(right.gold) > 0).all() and (np.diff(wrong.gold) < 0).all() and (np.diff(wrong.proxy) > 0).all()
    assert right.gold[0] == pytest.approx(np.mean(gold)) and wrong.gold[0] == pytest.approx(np.mean(gold))
    assert right.gold[2] == pytest.approx(np.mean([of.max() for of in gold]))
    assert (right.low < right.gold).all() and (right.gold < right.high).all()
    assert plot_best_of_n({"right": right, "wrong": wrong}, tmp_path / "curve.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="only 16 answers"):
        best_of_n_curve(gold, gold, [1, 32])


# --- losses ----------------------------------------------------------------------------------------------------------


def test_the_loss_falls_when_the_chosen_answer_rises():
    chosen = torch.tensor([0.3, -1.0], requires_grad=True)
    rejected = torch.tensor([0.1, 0.5], requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected)
    expected = np.mean([-math.log(1 / (1 + math.exp(-d))) for d in (0.2, -1.5)])
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()
    # Far apart, and no overflow.
    assert bradley_terry_loss(torch.tensor([-1e4]), torch.tensor([1e4])).item() == pytest.approx(2e4)
    with pytest.raises(ValueError, match="no pair"):
        bradley_terry_loss(torch.empty(0), torch.empty(0))


def test_a_capability_is_learned_from_what_is_clear():
    chosen, rejected = torch.randn(4, 3), torch.randn(4, 3)
    signs = torch.tensor([[1, 0, 0], [-1, 1, 0], [0, -1, 0], [1, 1, 0]], dtype=torch.int8)
    expected = 0.0
    for column in range(2):
        terms = []
        for row in range(4):
            if (sign := int(signs[row, column])) != 0:
                better, worse = (chosen, rejected) if sign > 0 else (rejected, chosen)
                terms.append(bradley_terry_loss(better[row, column], worse[row, column]))
        expected += sum(terms) / len(terms)
    # The third capability is unclear everywhere, and adds nothing.
    torch.testing.assert_close(capability_loss(chosen, rejected, signs), expected)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures(report, tmp_path):
    assert plot_consistency(report[0], tmp_path / "consistency.png").stat().st_size > 1000
    matrix = confusion_matrix([0, 1, 1], [0, 1, 0], 2)
    assert plot_routes(matrix, ["one", "two"], tmp_path / "routes.png").stat().st_size > 1000
