"""Reading, colour and writing, checked against Pillow and NumPy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.fusion.images import luminance, read_image, read_pixels, read_size, recolour, to_ycbcr, write_image

GREY = np.arange(5 * 7, dtype=np.uint8).reshape(5, 7) * 7
COLOUR = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
DEEP = GREY.astype(np.uint16) * 257 + 3


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".TIFF"])
def test_eight_bit_grey_and_colour(tmp_path: Path, suffix: str) -> None:
    for pixels in (GREY, COLOUR):
        path = tmp_path / f"image{suffix}"
        Image.fromarray(pixels).save(path)
        image = read_image(path)
        assert image.dtype == torch.float32 and image.is_contiguous()
        expected = pixels.reshape(5, 7, -1).transpose(2, 0, 1) / 255
        assert np.allclose(image.numpy(), expected, atol=1e-7)
        assert read_size(path) == (7, 5)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "wide.tif", "big_endian.tif"])
def test_sixteen_bit_keeps_all_its_levels(tmp_path: Path, name: str) -> None:
    if name == "big_endian.tif":
        raw = DEEP.astype(">u2").tobytes()
        picture = Image.frombytes("I;16B", (7, 5), raw)
    else:
        picture = Image.fromarray(DEEP.astype(np.int32) if name == "wide.tif" else DEEP)
    picture.save(tmp_path / name)
    pixels = read_pixels(tmp_path / name)
    assert pixels.dtype == np.uint16 and np.array_equal(pixels, DEEP)
    assert np.allclose(read_image(tmp_path / name)[0], DEEP / 65535, atol=1e-7)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1"])
def test_palettes_and_alpha(tmp_path: Path, mode: str) -> None:
    opaque = Image.fromarray(COLOUR)
    if mode == "P":
        picture = opaque.quantize(16)
        expected = np.asarray(picture.convert("RGB"))
        # Two levels of alpha for one palette entry each; they change no colour.
        options = {"transparency": bytes([0, 128])}
    elif mode == "1":
        picture = Image.fromarray(GREY > 100)
        expected, options = (GREY > 100) * 255, {}
    else:
        solid = opaque if mode == "RGBA" else Image.fromarray(GREY)
        picture = solid.convert(mode)
        picture.putalpha(Image.fromarray(GREY))
        expected, options = np.asarray(solid), {}
    picture.save(tmp_path / "image.png", **options)
    assert np.array_equal(read_pixels(tmp_path / "image.png"), expected)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_turned_photographs_are_read_upright(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:, :16] = 255
    Image.fromarray(stored).save(tmp_path / f"image{suffix}", exif=exif)
    pixels = read_pixels(tmp_path / f"image{suffix}")
    assert pixels.shape == (32, 16, 3) and read_size(tmp_path / f"image{suffix}") == (16, 32)
    assert pixels[:14].min() > 200 and pixels[18:].max() < 50, "what was stored left is on top"


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    for name in ("text.png", "empty.jpg", "cut.png", "absent.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            read_image(tmp_path / name)
    for name in ("text.png", "empty.jpg", "absent.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            read_size(tmp_path / name)
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "print.tif")
    with pytest.raises(ValueError, match=r"print.tif .* mode is CMYK; allowed are grey of 8 or 16 bit"):
        read_image(tmp_path / "print.tif")
    Image.fromarray(DEEP.astype(np.int32) + 60000).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match=r"wide.tif .* holds values 60003\.\.121"):
        read_image(tmp_path / "wide.tif")


def test_luminance_and_chroma_are_those_of_pillow() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    picture = Image.fromarray(pixels)
    light, chroma = to_ycbcr(image)
    assert torch.equal(light, luminance(image)) and light.shape == (1, 64, 64) and chroma.shape == (2, 64, 64)
    found = np.concatenate([light.numpy() * 255, chroma.numpy() * 255 + 128])
    expected = np.asarray(picture.convert("YCbCr")).transpose(2, 0, 1).astype(float)
    assert np.abs(found.round() - expected).max() <= 1
    levels = (light[0] * 255).round().numpy()
    assert np.abs(levels - np.asarray(picture.convert("L")).astype(float)).max() <= 1
    assert (levels == np.asarray(picture.convert("L"))).mean() > 0.99


def test_colour_comes_back() -> None:
    image = torch.rand(2, 3, 8, 9)
    assert torch.allclose(recolour(*to_ycbcr(image)), image, atol=1e-5)
    grey = torch.rand(1, 8, 9)
    light, chroma = to_ycbcr(grey)
    assert torch.equal(light, grey) and not chroma.any() and chroma.shape == (2, 8, 9)
    assert torch.allclose(recolour(light, chroma), grey.expand(3, -1, -1), atol=1e-6)
    vivid = recolour(torch.full((1, 1, 1), 0.9), torch.tensor([[[-0.5]], [[0.5]]]))
    assert vivid.min() >= 0 and vivid.max() == 1, "what no screen can show is clipped"
    with pytest.raises(ValueError, match=r"found 4 in \(4, 8, 9\)"):
        to_ycbcr(torch.rand(4, 8, 9))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".jpg", ".webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_written_images_are_rounded_and_come_back(tmp_path: Path, suffix: str, channels: int) -> None:
    levels = torch.arange(256).reshape(1, 16, 16).expand(channels, -1, -1).float()
    # A third of a level above and below must round back, beyond the ends must clip.
    offset = torch.tensor([-1 / 3, 1 / 3]).repeat(128).reshape(16, 16)
    path = write_image((levels + offset) / 255, tmp_path / f"image{suffix}")
    found = read_image(path) * 255
    tolerance = 0 if suffix in (".png", ".bmp", ".tif") else 12
    assert (found.round() - levels).abs().max() <= tolerance
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "nothing half written stays"


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    write_image(torch.zeros(1, 4, 4), path)
    with pytest.raises(FileExistsError, match=r"image\.png is there already"):
        write_image(torch.ones(1, 4, 4), path)
    assert read_image(path).max() == 0
    write_image(torch.ones(1, 4, 4), path, overwrite=True)
    assert read_image(path).min() == 1


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_image(torch.zeros(1, 4, 4), tmp_path / "image.png")

    def fill_the_disk(self: Image.Image, target: Path, **options: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        write_image(torch.ones(1, 4, 4), path, overwrite=True)
    assert read_image(path).max() == 0 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("image", "name", "words"),
    [
        (torch.zeros(1, 4, 4), "image.gif", "suffix names no format. Allowed: .png"),
        (torch.zeros(2, 4, 4), "image.png", r"found shape \(2, 4, 4\)"),
        (torch.full((1, 4, 4), torch.nan), "image.png", "not finite"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, image: torch.Tensor, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_image(image, tmp_path / name)
    assert not list(tmp_path.iterdir())
