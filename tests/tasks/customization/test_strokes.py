"""Rendered strokes lie where EMNIST's characters lie."""

import numpy as np
import pytest

from tasks.customization.strokes import SyntheticWriter, render


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
