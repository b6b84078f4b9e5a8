"""Rendered strokes lie where EMNIST's characters lie."""

import os
from itertools import pairwise

import numpy as np
import pytest
from scipy import ndimage

from tasks.customization.characters import CHARACTERS
from tasks.customization.strokes import SyntheticWriter, glyph, render
from zoo.data import find


def test_ink_fills_the_inner_square_and_is_centred() -> None:
    image = render([np.array([[0, 0], [10, 20]])])
    rows, columns = np.nonzero(image > 100)
    assert image.shape == (28, 28) and image.dtype == np.uint8
    assert 22 <= rows.max() - rows.min() + 1 <= 26
    assert abs(rows.mean() - 13.5) < 1 and abs(columns.mean() - 13.5) < 1
    assert image[0].max() < 10


def test_size_and_place_of_the_strokes_do_not_matter() -> None:
    stroke = np.array([[0, 0], [3, 5], [7, 2.0]])
    assert np.array_equal(render([stroke]), render([stroke * 40 + 13]))


def test_a_dot_is_a_dot() -> None:
    image = render([np.array([[5, 5]])], thickness=4)
    assert 0 < (image > 100).sum() < 25
    with pytest.raises(ValueError, match="nothing to draw"):
        render([])


def test_a_writer_is_reproducible_and_unlike_another() -> None:
    first, again, other = (SyntheticWriter(seed).write("A") for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_no_sample_of_a_writer_is_like_the_last() -> None:
    writer = SyntheticWriter(0)
    assert not np.array_equal(writer.write("q"), writer.write("q"))


def emnist_pipeline(strokes: list[np.ndarray]) -> np.ndarray:
    """EMNIST's own conversion of a scan (Cohen et al. 2017, section II-A), in SciPy and NumPy.

    A binary 128 x 128 image is blurred with a Gaussian of standard deviation 1, cut to the ink, put into the middle of
    a square with a border of two pixels of the result, and scaled to 28 x 28 by cubic interpolation.
    """
    points = np.concatenate(strokes)
    low, high = points.min(0), points.max(0)
    scale = 90 / (high - low).max()
    rows, columns = np.mgrid[:128, :128]
    ink = np.zeros((128, 128))
    for stroke in strokes:
        placed = (stroke - low) * scale + 16
        for (x0, y0), (x1, y1) in pairwise(placed):
            along = np.clip(
                ((columns - x0) * (x1 - x0) + (rows - y0) * (y1 - y0)) / max((x1 - x0) ** 2 + (y1 - y0) ** 2, 1e-9),
                0,
                1,
            )
            near = np.hypot(columns - x0 - along * (x1 - x0), rows - y0 - along * (y1 - y0)) < 5.2
            ink[near] = 255
    blurred = ndimage.gaussian_filter(ink, 1)
    tall, wide = (np.flatnonzero(ink.max(axis)) for axis in (1, 0))
    cut = blurred[tall[0] : tall[-1] + 1, wide[0] : wide[-1] + 1]
    side = max(cut.shape) * 28 // 24
    top, left = ((side - length) // 2 for length in cut.shape)
    square = np.zeros((side, side))
    square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    smooth = ndimage.gaussian_filter(square, side / 28 / 2.5)  # against aliasing
    return ndimage.zoom(smooth, 28 / side, order=3, grid_mode=True, mode="grid-constant").clip(0, 255)


@pytest.mark.parametrize("character", list("AgQ47"))
def test_preparation_agrees_with_emnists_own(character: str) -> None:
    strokes = [stroke * 137 + 11 for stroke in glyph("futural", character)]
    ours, theirs = render(strokes).astype(float), emnist_pipeline(strokes)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.97
    assert np.abs(ours - theirs).mean() < 12
    for axis in (0, 1):
        middle = [(image.sum(axis) * np.arange(28)).sum() / image.sum() for image in (ours, theirs)]
        assert abs(middle[0] - middle[1]) < 0.5


@pytest.mark.skipif(not os.environ.get("MOE_ZOO_DATA"), reason="MOE_ZOO_DATA names no data")
def test_rendered_characters_lie_where_emnists_do() -> None:
    with np.load(find(None, "characters/emnist_byclass.npz", "")) as file:
        real = file["images"][::200]
    drawn = np.stack([render(glyph("futural", character)) for character in CHARACTERS])

    def longest(images: np.ndarray) -> np.ndarray:
        return np.maximum((images > 100).any(1).sum(1), (images > 100).any(2).sum(1))

    for measure in (longest, lambda images: images.mean((1, 2)), lambda images: (images > 127).mean((1, 2))):
        low, high = np.percentile(measure(real), [0.5, 99.5])
        assert low <= np.median(measure(drawn)) <= high
    assert np.abs(np.median(longest(drawn)) - np.median(longest(real))) <= 1
