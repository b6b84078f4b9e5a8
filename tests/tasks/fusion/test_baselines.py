"""Parameter-free fusion against a pyramid made with SciPy, and against the numbers known of RoadScene."""

import os

import numpy as np
import pytest
import torch
from scipy import ndimage

from tasks.fusion.baselines import BASELINES
from tasks.fusion.metrics import quantize, score
from zoo.data import find

real_data = pytest.mark.skipif(not os.environ.get("MOE_ZOO_DATA"), reason="MOE_ZOO_DATA names no data")


def blurred(image):
    taps = np.array([1, 4, 6, 4, 1]) / 16
    return ndimage.correlate1d(ndimage.correlate1d(image, taps, axis=0, mode="mirror"), taps, axis=1, mode="mirror")


def expanded(coarse, shape):
    sparse = np.zeros(shape)
    sparse[::2, ::2] = coarse
    return 4 * blurred(sparse)


def scipy_laplacian(infrared, visible, levels=4):
    if not levels:
        return (infrared + visible) / 2
    coarse = [blurred(image)[::2, ::2] for image in (infrared, visible)]
    hot, bright = (
        image - expanded(small, image.shape) for image, small in zip((infrared, visible), coarse, strict=True)
    )
    detail = np.where(abs(hot) > abs(bright), hot, bright)
    return detail + expanded(scipy_laplacian(*coarse, levels - 1), infrared.shape)


@pytest.mark.parametrize("size", [(64, 48), (47, 61), (17, 33)])
def test_laplacian(size):
    infrared, visible = torch.rand(2, 3, 1, *size, dtype=torch.double)
    fused = BASELINES["laplacian"](infrared, visible)
    for item, *sources in zip(fused[:, 0], infrared[:, 0], visible[:, 0], strict=True):
        expected = scipy_laplacian(*(source.numpy() for source in sources))
        assert expected.min() < 0 and expected.max() > 1
        np.testing.assert_allclose(item.numpy(), expected.clip(0, 1), atol=1e-12)


def test_pointwise():
    infrared, visible = torch.rand(2, 3, 1, 8, 9)
    expected = {
        "average": np.mean([infrared.numpy(), visible.numpy()], axis=0),
        "max": np.maximum(infrared.numpy(), visible.numpy()),
        "visible": visible.numpy(),
        "infrared": infrared.numpy(),
    }
    for name, image in expected.items():
        np.testing.assert_allclose(BASELINES[name](infrared, visible).numpy(), image)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("size", [(1, 1), (2, 40), (16, 3), (31, 33)])
def test_any_size(name, size):
    infrared, visible = torch.rand(2, 2, 1, *size)
    fused = BASELINES[name](infrared, visible)
    assert fused.shape == infrared.shape and fused.dtype == infrared.dtype
    assert fused.min() >= 0 and fused.max() <= 1
    torch.testing.assert_close(BASELINES[name](visible, visible), visible)


@real_data
def test_laplacian_on_roadscene():
    """All 45 pairs of the test part score what the issue that asked for this application says, to its digits."""
    import pandas as pd
    from PIL import Image

    folder = find(None, "fusion/roadscene", "It is checked only where it is.")
    table = pd.read_csv(folder / "pairs.csv")
    scores = []
    for row in table[table["split"] == "test"].itertuples():
        arrays = (np.asarray(Image.open(folder / name).convert("L")) for name in (row.ir, row.vi))
        infrared, visible = (torch.from_numpy(array / 255).float()[None, None] for array in arrays)
        fused = BASELINES["laplacian"](infrared, visible)
        scores.append(score(*(quantize(image)[0, 0] for image in (fused, infrared, visible))))
    assert len(scores) == 45
    found = pd.DataFrame(scores).mean().to_dict()
    assert found == pytest.approx(
        found
        | {"EN": 7.11, "SD": 37.3, "SF": 15.8, "AG": 5.92, "SCD": 1.51, "VIF": 0.646, "Qabf": 0.584, "SSIM": 0.702},
        rel=4e-3,
    )
