"""Fusion metrics against scikit-image, scikit-learn, SciPy, torchmetrics and naive loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import rankdata
from skimage.measure import block_reduce, shannon_entropy
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import mutual_info_score
from torch.nn import functional
from torchmetrics.functional.image import visual_information_fidelity as torchmetrics_vif

from tasks.fusion import metrics
from tasks.fusion.metrics import NINE_METRICS, mean_rank, quantize, score

SIZE = (47, 60)
SSIM_OPTIONS = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}


def texture(height, width):
    """Smooth shapes and fine noise, whole numbers 0 to 255, with a flat patch as a burnt-out sky has."""
    coarse = functional.interpolate(torch.rand(1, 1, 6, 7), (height, width), mode="bicubic")[0, 0]
    image = quantize(coarse + 0.1 * torch.randn(height, width))
    image[: height // 3, : width // 4] = 255
    return image


@pytest.fixture
def images():
    """Fused, infrared, visible; the fused image depends on both."""
    infrared, visible = texture(*SIZE), texture(*SIZE)
    return (0.5 * infrared + 0.4 * visible + 3 * torch.randn(SIZE)).clamp(0, 255).round(), infrared, visible


@pytest.fixture
def scores(images):
    return score(*images)


@pytest.fixture
def arrays(images):
    return [image.numpy() for image in images]


def both(reference, arrays):
    fused, infrared, visible = arrays
    return reference(fused, infrared), reference(fused, visible)


def test_fused_image_alone(scores, arrays):
    fused = arrays[0]
    assert scores["EN"] == pytest.approx(shannon_entropy(fused))
    assert scores["SD"] == pytest.approx(np.std(fused))
    rows, columns = np.diff(fused, axis=1), np.diff(fused, axis=0)
    assert scores["SF"] == pytest.approx(math.sqrt(np.mean(rows**2) + np.mean(columns**2)))
    assert scores["AG"] == pytest.approx(np.mean(np.sqrt(sum(g**2 for g in np.gradient(fused)) / 2)))


def test_mutual_information_in_bits(scores, arrays):
    infrared, visible = both(lambda *pair: mutual_info_score(*(x.ravel() for x in pair)) / math.log(2), arrays)
    assert scores["MI_ir"] == pytest.approx(infrared) and scores["MI_vi"] == pytest.approx(visible)
    assert scores["MI"] == pytest.approx(infrared + visible)
    ramp = torch.arange(256.0).repeat(50, 1)
    assert metrics.mutual_information(ramp, 255 - ramp).item() == metrics.entropy(ramp).item() == 8


def test_correlations(scores, arrays):
    fused, infrared, visible = (array.ravel() for array in arrays)
    expected = np.corrcoef(fused, infrared)[0, 1] + np.corrcoef(fused, visible)[0, 1]
    assert scores["CC"] == pytest.approx(expected / 2)
    expected = np.corrcoef(infrared, fused - visible)[0, 1] + np.corrcoef(visible, fused - infrared)[0, 1]
    assert scores["SCD"] == pytest.approx(expected)


def test_ssim(scores, arrays):
    infrared, visible = both(lambda *pair: structural_similarity(*pair, **SSIM_OPTIONS), arrays)
    assert infrared != pytest.approx(visible)
    assert scores["SSIM"] == pytest.approx((infrared + visible) / 2)


def test_psnr(scores, arrays):
    fused, *sources = arrays
    assert scores["PSNR"] == pytest.approx(
        peak_signal_noise_ratio(np.stack(sources), np.stack([fused, fused]), data_range=255)
    )
    assert scores["PSNR"] == pytest.approx(10 * math.log10(255**2 / np.mean(both(mean_squared_error, arrays))))


def contrast_structure(first, second):
    """Mean of the SSIM map without its luminance, by SciPy's filter, borders cut off."""

    def local(image):
        return gaussian_filter(image, 1.5, truncate=3.5)[5:-5, 5:-5]

    variances = local(first**2) - local(first) ** 2 + local(second**2) - local(second) ** 2
    covariance = local(first * second) - local(first) * local(second)
    constant = (0.03 * 255) ** 2
    return np.mean((2 * covariance + constant) / (variances + constant))


@pytest.mark.parametrize(("size", "scales"), [((176, 190), 5), ((175, 190), 4), (SIZE, 3), ((43, 60), 2)])
def test_ms_ssim(size, scales):
    first = texture(*size)
    second = (first + 30 * torch.randn(size)).clamp(0, 255).round()
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    left, right, terms = first.numpy(), second.numpy(), []
    for _ in weights[1:]:
        terms.append(contrast_structure(left, right))
        even = tuple(slice(side // 2 * 2) for side in left.shape)
        left, right = (block_reduce(image[even], 2, np.mean) for image in (left, right))
    terms.append(structural_similarity(left, right, **SSIM_OPTIONS))
    expected = np.prod(np.array(terms) ** (weights / weights.sum()))
    assert 0.05 < expected < 0.95
    assert metrics.ms_ssim(first, second).item() == pytest.approx(expected)
    assert metrics.ms_ssim(first, 255 - first).item() == 0


def test_vif(scores, images):
    fused, infrared, visible = (image[None, None] for image in images)
    expected = [torchmetrics_vif(fused, source).item() for source in (infrared, visible)]
    assert [scores["VIF_ir"], scores["VIF_vi"]] == pytest.approx(expected)
    assert scores["VIF"] == pytest.approx(sum(expected))
    assert metrics.visual_information_fidelity(images[1], images[1]).item() == pytest.approx(1)
    mild = 100 + images[1] / 4
    assert metrics.visual_information_fidelity(100 + images[1] / 2, mild) > 1


def naive_edges(image):
    """Strength and orientation of the Sobel gradient, pixel by pixel, nothing outside the image."""
    height, width = image.shape
    strength, angle = np.zeros(image.shape), np.zeros(image.shape)
    for y, x in itertools.product(range(height), range(width)):
        horizontal = vertical = 0
        for dy, dx in itertools.product((-1, 0, 1), repeat=2):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                horizontal += dx * (2 - abs(dy)) * image[y + dy, x + dx]
                vertical += dy * (2 - abs(dx)) * image[y + dy, x + dx]
        strength[y, x] = math.sqrt(horizontal**2 + vertical**2)
        angle[y, x] = math.atan(vertical / horizontal) if horizontal else math.pi / 2
    return strength, angle


def naive_preservation(fused, source):
    """Sum over all pixels of Q g and of g."""
    (g_f, a_f), (g_s, a_s) = naive_edges(fused), naive_edges(source)
    kept = 0
    for place in np.ndindex(source.shape):
        low, high = sorted((g_f[place], g_s[place]))
        if high == 0:
            continue
        parallel = abs(abs(a_f[place] - a_s[place]) - math.pi / 2) * 2 / math.pi
        if abs(a_f[place] - a_s[place]) > math.pi / 2:
            parallel = -parallel
        strength = 0.9994 / (1 + math.exp(-15 * (low / high - 0.5)))
        orientation = 0.9879 / (1 + math.exp(-22 * (parallel - 0.8)))
        kept += strength * orientation * g_s[place]
    return kept, g_s.sum()


def test_qabf(scores, arrays):
    (infrared, infrared_total), (visible, visible_total) = both(naive_preservation, arrays)
    assert scores["Qabf_ir"] == pytest.approx(infrared / infrared_total)
    assert scores["Qabf_vi"] == pytest.approx(visible / visible_total)
    assert scores["Qabf"] == pytest.approx((infrared + visible) / (infrared_total + visible_total))
    assert 0.1 < scores["Qabf"] < 0.9


def test_copying_the_visible_image(images):
    row = score(images[2], *images[1:])
    assert row["VIF_vi"] == pytest.approx(1) and row["VIF_ir"] < 0.2
    assert row["MI_vi"] == pytest.approx(row["EN"])
    assert row["Qabf_vi"] > 0.97 and row["Qabf_ir"] < 0.3


def test_constant_images_are_scored(images):
    grey, white = torch.full(SIZE, 77.0), torch.full(SIZE, 255.0)
    for triple in itertools.product((images[0], grey), (images[1], white), (images[2], torch.zeros(SIZE))):
        assert all(map(math.isfinite, score(*triple).values())), triple
    flat = score(grey, *images[1:])
    assert [flat[name] for name in ("EN", "SD", "SF", "AG", "MI", "CC", "VIF")] == pytest.approx([0] * 7)
    sources = score(images[0], grey, white)
    assert [sources[name] for name in ("CC", "SCD", "MI", "VIF", "VIF_ir", "VIF_vi")] == pytest.approx([0] * 6)
    # Sobel's zeros outside the image make an edge of the frame of anything but black.
    black = torch.zeros(SIZE)
    assert score(images[0], black, black)["Qabf"] == 0 < sources["Qabf"]
    assert score(grey, grey, grey)["PSNR"] == math.inf


def test_quantize():
    image = torch.tensor([-0.2, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 7.0])
    assert quantize(image).tolist() == [0, 0, 0, 1, 255, 255]


def test_integers_are_welcome(images, scores):
    assert score(*(image.byte() for image in images)) == scores


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda image: image[:, :-1], r"one size.*fused \(47, 60\), infrared \(47, 60\), visible \(47, 59\)"),
        (lambda image: image[None], r"\(H, W\).*visible \(1, 47, 60\)"),
        (lambda image: image / 255, "whole numbers.*visible image holds 0 to 1.*quantize"),
        (lambda image: image + 10, "whole numbers.*visible image.*to 265"),
        (lambda image: image * math.nan, "whole numbers.*visible image.*nan"),
    ],
)
def test_bad_images(images, spoil, words):
    fused, infrared, visible = images
    with pytest.raises(ValueError, match=words):
        score(fused, infrared, spoil(visible))


def test_small_images():
    score(*(texture(41, 41) for _ in range(3)))
    with pytest.raises(ValueError, match="at least 41"):
        score(*(texture(40, 50) for _ in range(3)))


def test_mean_rank():
    generator = np.random.default_rng(0)
    values = generator.integers(0, 4, (6, len(NINE_METRICS))).astype(float)
    table = {f"method {i}": dict(zip(NINE_METRICS, row, strict=True)) | {"PSNR": 0.0} for i, row in enumerate(values)}
    expected = rankdata(-values, axis=0).mean(1)
    assert len(set(expected)) > 3
    assert list(mean_rank(table).values()) == pytest.approx(expected.tolist())
    assert mean_rank({"a": {"EN": 1.0, "SD": 5.0}, "b": {"EN": 2.0, "SD": 5.0}}, ["EN", "SD"]) == {"a": 1.75, "b": 1.25}


@pytest.mark.parametrize("value", [None, math.nan])
def test_mean_rank_needs_every_number(value):
    row = dict.fromkeys(NINE_METRICS, 1.0)
    broken = {name: number for name, number in row.items() if name != "SCD"} | ({} if value is None else {"SCD": value})
    with pytest.raises(ValueError, match="Cannot rank 'ours': it has no SCD"):
        mean_rank({"average": row, "ours": broken})
