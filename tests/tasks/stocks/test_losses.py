"""Losses against SciPy and sums, and on days that teach nothing."""

import math

import pytest
import torch
from scipy import stats

from tasks.stocks.losses import LOSSES, ic_loss, mse_loss

NAN = float("nan")


def some(size: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    scores, labels = torch.randn(2, size, dtype=torch.float64)
    labels[::7] = NAN
    labels[3] = float("inf")
    return scores, labels


def test_ic_loss_is_minus_the_correlation_over_known_labels() -> None:
    scores, labels = some()
    known = torch.isfinite(labels)
    expected = -stats.pearsonr(scores[known], labels[known]).statistic
    assert ic_loss(scores, labels).item() == pytest.approx(expected, abs=1e-12)
    assert ic_loss(3 + 1e-4 * scores, labels).item() == pytest.approx(expected, abs=1e-9)
    assert ic_loss(scores, -labels).item() == pytest.approx(-expected, abs=1e-12)


def test_mse_loss_is_the_mean_over_known_labels() -> None:
    scores, labels = some()
    squares = [(x - y) ** 2 for x, y in zip(scores.tolist(), labels.tolist(), strict=True) if math.isfinite(y)]
    assert mse_loss(scores, labels).item() == pytest.approx(sum(squares) / len(squares))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients(loss) -> None:
    scores, labels = some(12)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), scores.requires_grad_())
    loss(scores, labels).backward()
    assert (scores.grad[~torch.isfinite(labels)] == 0).all() and (scores.grad[torch.isfinite(labels)] != 0).all()


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ([0.1] * 50, list(range(50))),
        (list(range(50)), [0.1] * 50),
        ([0.0] * 4, [1.0, 2, 3, 4]),
        ([1.0, 2, 3], [NAN, 1.0, 2]),
        ([1.0, 2, 3], [NAN] * 3),
        ([1.0], [1.0]),
        ([], []),
    ],
)
def test_a_day_that_teaches_nothing_has_no_correlation_and_no_gradient(
    scores: list[float], labels: list[float]
) -> None:
    scores = torch.tensor(scores, dtype=torch.float32, requires_grad=True)
    loss = ic_loss(scores, torch.tensor(labels, dtype=torch.float32))
    loss.backward()
    assert loss.item() == 0 and (scores.grad == 0).all()


def test_a_day_without_labels_has_no_squared_error() -> None:
    scores = torch.randn(3, requires_grad=True)
    loss = mse_loss(scores, torch.full((3,), NAN))
    loss.backward()
    assert loss.item() == 0 and (scores.grad == 0).all()


def test_scores_that_are_not_numbers_do_not_pass_unseen() -> None:
    scores = torch.tensor([1.0, NAN, 2, 3])
    assert ic_loss(scores, torch.arange(4.0)).isnan() and mse_loss(scores, torch.arange(4.0)).isnan()
