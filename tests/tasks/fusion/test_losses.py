"""Losses against scikit-image, NumPy and what they promise."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from tasks.fusion import losses


@pytest.fixture
def bands() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 1, 40, 48), torch.rand(2, 1, 40, 48)


def test_similarity_is_scikit_images(bands: tuple[torch.Tensor, torch.Tensor]) -> None:
    first, second = bands
    expected = []
    for one, other in zip(first[:, 0].double().numpy(), second[:, 0].double().numpy(), strict=True):
        _, full = structural_similarity(
            one, other, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, full=True
        )
        expected.append(full[5:-5, 5:-5].mean())
    assert float(losses.similarity(first.double(), second.double())) == pytest.approx(np.mean(expected), abs=1e-6)


def test_difference_loss_is_two_minus_the_correlations(bands: tuple[torch.Tensor, torch.Tensor]) -> None:
    infrared, visible = bands
    fused = torch.rand_like(infrared)
    values = [
        np.corrcoef((f - v).flatten(), i.flatten())[0, 1] + np.corrcoef((f - i).flatten(), v.flatten())[0, 1]
        for f, i, v in zip(fused.numpy(), infrared.numpy(), visible.numpy(), strict=True)
    ]
    assert float(losses.difference_loss(fused, infrared, visible)) == pytest.approx(2 - np.mean(values), abs=1e-5)
    assert float(losses.difference_loss(infrared + visible, infrared, visible)) == pytest.approx(0, abs=1e-5)


def test_gradient_loss_wants_the_steeper_edge_with_its_sign() -> None:
    infrared, visible = torch.zeros(1, 1, 12, 12), torch.zeros(1, 1, 12, 12)
    infrared[..., 6:] = 0.2
    visible[..., 6:] = 0.8
    assert losses.gradient_loss(visible, infrared, visible) == 0
    assert losses.gradient_loss(1 - visible, infrared, visible) > losses.gradient_loss(infrared, infrared, visible) > 0
    assert losses.gradient_loss(1.5 * visible, infrared, visible, gain=1.5) == pytest.approx(0, abs=1e-7)


def test_foreground_wants_the_brighter_and_background_the_mean(bands: tuple[torch.Tensor, torch.Tensor]) -> None:
    infrared, visible = bands
    everywhere, nowhere = torch.ones_like(infrared), torch.zeros_like(infrared)
    assert losses.pixel_loss(torch.maximum(infrared, visible), infrared, visible, everywhere) == 0
    assert losses.pixel_loss((infrared + visible) / 2, infrared, visible, nowhere) == 0
    attention = torch.ones_like(infrared, requires_grad=True)
    fused = torch.rand_like(infrared, requires_grad=True)
    losses.pixel_loss(fused, infrared, visible, attention).backward()
    assert attention.grad is None and fused.grad is not None


def test_range_loss_counts_what_cannot_be_stored() -> None:
    assert losses.range_loss(torch.rand(1, 1, 4, 4)) == 0
    assert losses.range_loss(torch.full((1, 1, 4, 4), 1.5)) == pytest.approx(0.25)
    assert losses.range_loss(torch.full((1, 1, 4, 4), -0.5)) == pytest.approx(0.25)


def test_edge_loss_is_low_for_what_keeps_the_edges(bands: tuple[torch.Tensor, torch.Tensor]) -> None:
    infrared, visible = bands
    even = torch.full_like(infrared, 0.5)
    assert losses.edge_loss(infrared, infrared, infrared) < 0.2
    assert losses.edge_loss(1 - infrared, infrared, infrared) > 0.9
    assert losses.edge_loss(even, infrared, visible) > 0.9
    mean = ((infrared + visible) / 2).requires_grad_()
    losses.edge_loss(mean, infrared, visible).backward()
    assert mean.grad.isfinite().all() and mean.grad.abs().sum() > 0
