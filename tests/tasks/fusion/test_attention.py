"""Attention from two bands, and from boxes."""

import pytest
import torch

from tasks.fusion.attention import SaliencyAttention, blur, box_attention


def test_saliency_finds_what_is_hot_and_what_is_bright_in_the_dark() -> None:
    infrared, visible = torch.full((2, 1, 96, 128), 0.2), torch.full((2, 1, 96, 128), 0.1)
    infrared[0, 0, 40:56, 20:28] = 0.9
    visible[1, 0, 10:16, 100:106] = 1.0
    attention = SaliencyAttention()(infrared, visible)
    assert attention.shape == infrared.shape and attention.min() >= 0 and attention.max() <= 1
    assert attention[0, 0, 40:56, 20:28].mean() > 0.9 and attention[0, 0, :, 60:].max() < 0.05
    assert attention[1, 0, 10:16, 100:106].mean() > 0.9 and attention[1, 0, 50:].max() < 0.05


def test_an_even_image_has_no_foreground() -> None:
    even = torch.full((1, 1, 50, 40), 0.7)
    assert SaliencyAttention()(even, even).max() < 1e-4


def test_blur_is_the_mean_of_a_square() -> None:
    image = torch.rand(1, 1, 40, 40)
    # Radius 3 needs no coarser grid: cell 1, kernel 7.
    assert blur(image, 3)[0, 0, 20, 20] == pytest.approx(float(image[0, 0, 17:24, 17:24].mean()), abs=1e-6)
    assert blur(image, 3)[0, 0, 0, 0] == pytest.approx(float(image[0, 0, :4, :4].mean()), abs=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (7, 9)])
def test_saliency_takes_any_size(size: tuple[int, int]) -> None:
    assert SaliencyAttention()(torch.rand(1, 1, *size), torch.rand(1, 1, *size)).isfinite().all()


def test_box_attention_is_one_inside() -> None:
    boxes = [torch.tensor([[2.0, 1.0, 5.0, 3.0], [-4.0, -4.0, 1.0, 1.0]]), torch.empty(0, 4)]
    attention = box_attention(boxes, (6, 8))
    assert attention.shape == (2, 1, 6, 8) and attention[0].sum() == 3 * 2 + 1 and attention[1].sum() == 0
    assert attention[0, 0, 1:3, 2:5].all()
    with pytest.raises(ValueError, match="image 0"):
        box_attention([torch.tensor([[5.0, 1.0, 2.0, 3.0]])], (6, 8))
