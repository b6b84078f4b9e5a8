"""Sizes, features and the closed gate."""

import numpy as np
import pytest
import torch
from scipy import special, stats

from tasks.customization.evaluate import matrix_macs
from tasks.customization.model import (
    GREY_LEVELS,
    CustomizedLeNet,
    LeNet,
    confidences,
    early_features,
    num_early_features,
)
from zoo.errors import UnknownNameError


@pytest.mark.parametrize(
    ("variant", "parameters", "macs"), [("lenet5", 64_851, 419_628), ("lenet-large", 449_617, 2_311_500)]
)
def test_sizes_of_the_global_experts(variant: str, parameters: int, macs: int) -> None:
    model = LeNet(variant)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert matrix_macs(model, torch.zeros(1, 1, 28, 28)) == macs


def test_unknown_variant() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'lenet5'"):
        LeNet("lenet")


@pytest.mark.parametrize("variant", ["lenet5", "lenet-large"])
def test_a_fresh_model_is_its_global_expert(variant: str) -> None:
    torch.manual_seed(0)
    model = CustomizedLeNet(variant, replay_size=3).eval()
    torch.nn.init.normal_(model.local_expert.bias)
    images = torch.rand(5, 1, 28, 28)
    out, routing = model(images, return_routing=True)
    assert torch.equal(out, model.global_expert(images))
    assert (routing.expert_index == 0).all()
    model.threshold.fill_(0.0)
    features = model.features(images)
    assert torch.equal(model(images), model.local_expert((features.logits, features.hidden)))
    assert not torch.equal(model(images), out)


def test_confidences_against_scipy() -> None:
    first, second = 3 * torch.randn(6, 5), 3 * torch.randn(6, 5)
    ours = confidences(first, second).numpy()
    for row in range(6):
        a, b = first[row].double().numpy(), second[row].double().numpy()
        p, q = special.softmax(a), special.softmax(b)
        top_p, top_q = np.sort(np.log(p))[::-1], np.sort(np.log(q))[::-1]
        expected = [
            top_p[0],
            top_q[0],
            q.max() - p.max(),
            stats.entropy(p),
            stats.entropy(q),
            (top_p[0] - top_p[1]) / 4,
            (top_q[0] - top_q[1]) / 4,
            float(p.argmax() == q.argmax()),
            np.log(p[q.argmax()]) / 3,
            np.log(q[p.argmax()]) / 3,
            stats.entropy(p, q),
            (special.logsumexp(a) - 10) / 5,
            (special.logsumexp(b) - 10) / 5,
        ]
        np.testing.assert_allclose(ours[row], np.clip(expected, -5, 5), atol=1e-5)


def test_early_features_against_numpy() -> None:
    images, first, second = torch.rand(2, 1, 28, 28), torch.rand(2, 6, 14, 14), torch.rand(2, 16, 5, 5)
    ours = early_features(images, first, second, grey_levels=True)
    assert ours.shape == (2, num_early_features("lenet5", True))
    a, b, x = first[1].numpy(), second[1].numpy(), images[1, 0].numpy()
    assert np.allclose(ours[1, :6], a.mean((1, 2)), atol=1e-6)
    assert np.allclose(ours[1, 6:12], np.sqrt((a**2).mean((1, 2))), atol=1e-6)
    assert np.allclose(ours[1, 12:18], a.max((1, 2)))
    assert np.allclose(ours[1, 18], a[0, :5, :5].mean(), atol=1e-6), "the first cell of the 3 x 3 grid"
    assert np.allclose(ours[1, 72:88], b.mean((1, 2)), atol=1e-6)
    assert np.allclose(ours[1, -10:-8], [x.mean(), (x**2).mean()], atol=1e-6)
    assert np.allclose(ours[1, -8:], [(x > level).mean() for level in GREY_LEVELS], atol=1e-6)
    without = early_features(images, first, second, grey_levels=False)
    assert torch.equal(without, ours[:, :-8]) and without.shape[1] == num_early_features("lenet5", False)


def test_replay_buffer_remembers_features_and_logits(model: CustomizedLeNet) -> None:
    images = torch.rand(62, 1, 28, 28)
    model.fill_replay(images, torch.arange(62) % 47)
    features, labels = model.replay()
    assert torch.equal(labels, torch.arange(62) % 47)
    torch.testing.assert_close(features.logits, model.global_expert(images), atol=2e-3, rtol=0)
    torch.testing.assert_close(features.early, model.features(images).early, atol=2e-3, rtol=1e-3)


def test_exports_with_a_dynamic_batch(model: CustomizedLeNet) -> None:
    model.threshold.fill_(0.5)
    torch.nn.init.normal_(model.gate.linear.weight)
    images = torch.rand(4, 1, 28, 28)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    more = torch.rand(9, 1, 28, 28)
    torch.testing.assert_close(program.module()(more), model(more), atol=1e-5, rtol=0)
