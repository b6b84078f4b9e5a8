"""Image files and colour: 8 and 16 bit in, 8 bit out; luminance is fused, chroma comes back afterwards.

BT.601 with full range, the JPEG standard's YCbCr (ITU-T T.871), which Pillow's `L` and `YCbCr` are too.
"""

import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
LUMINANCE = (0.299, 0.587, 0.114)
CB_SCALE = 2 * (1 - LUMINANCE[2])
CR_SCALE = 2 * (1 - LUMINANCE[0])
SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")
GREY = ("1", "L", "LA", "La")
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr")
# Orientations of Exif that swap width and height.
TURNED = (5, 6, 7, 8)
EXIF_ORIENTATION = 0x0112


def read_pixels(path: str | Path) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Read an image file as it is stored: upright, without alpha, palettes resolved.

    Args:
        path: A PNG, JPEG, BMP, TIFF or WebP file.

    Returns:
        `(H, W)` for grey or `(H, W, 3)` for RGB; uint8, or uint16 for 16-bit grey. Pillow reads 16-bit colour as 8 bit.

    Raises:
        ValueError: The file is unreadable or of a kind without 8 or 16 bit per channel, such as CMYK or float.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            mode = file.mode
            # Through RGBA, since a palette may hold an alpha of its own.
            image = ImageOps.exif_transpose(file.convert("RGBA") if mode in ("P", "PA") else file)
        if mode in GREY:
            return np.asarray(image.convert("L"))
        if mode in COLOUR:
            return np.asarray(image.convert("RGB"))
        if mode not in SIXTEEN_BIT:
            raise ValueError(
                f"its mode is {mode}; allowed are grey of 8 or 16 bit, palettes and RGB, with or without alpha"
            )
        pixels = np.asarray(image).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"it holds values {pixels.min()}..{pixels.max()}; 16 bit are 0..65535")
        return pixels.astype(np.uint16)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}.") from None


def read_size(path: str | Path) -> tuple[int, int]:
    """Width and height of an image file, from its header alone.

    Args:
        path: The file.

    Raises:
        ValueError: The file is unreadable.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.format != "TIFF" and image.getexif().get(EXIF_ORIENTATION) in TURNED
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}.") from None
    return (height, width) if turned else (width, height)


def to_tensor(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> Tensor:
    """Pixels `(H, W)` or `(H, W, 3)` to float `(1, H, W)` or `(3, H, W)` in 0..1."""
    scaled = torch.from_numpy(pixels.astype(np.float32)) / np.iinfo(pixels.dtype).max
    return scaled.unsqueeze(0) if scaled.ndim == 2 else scaled.permute(2, 0, 1).contiguous()


def read_image(path: str | Path) -> Tensor:
    """Read an image file as float, 0..1 being the whole range of its bit depth.

    Args:
        path: A PNG, JPEG, BMP, TIFF or WebP file.

    Returns:
        `(1, H, W)` for grey or `(3, H, W)` for RGB.

    Raises:
        ValueError: As for `read_pixels`.
    """
    return to_tensor(read_pixels(path))


def luminance(image: Tensor) -> Tensor:
    """BT.601 luminance.

    Args:
        image: `(..., 3, H, W)` RGB, or `(..., 1, H, W)` grey, which is its own luminance.

    Returns:
        `(..., 1, H, W)` in the range of the image.
    """
    return to_ycbcr(image)[0]


def to_ycbcr(image: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and chroma.

    Args:
        image: `(..., 3, H, W)` RGB or `(..., 1, H, W)` grey, 0..1.

    Returns:
        Luminance `(..., 1, H, W)` in 0..1 and chroma `(..., 2, H, W)`, Cb and Cr in -0.5..0.5; grey has zeros.

    Raises:
        ValueError: There are neither one nor three channels.
    """
    channels = image.shape[-3]
    if channels == 1:
        return image, torch.zeros_like(image).expand(*image.shape[:-3], 2, -1, -1).contiguous()
    if channels != 3:
        raise ValueError(f"An image has 1 (grey) or 3 (RGB) channels; found {channels} in {tuple(image.shape)}.")
    red, green, blue = image.split(1, dim=-3)
    y = LUMINANCE[0] * red + LUMINANCE[1] * green + LUMINANCE[2] * blue
    return y, torch.cat([(blue - y) / CB_SCALE, (red - y) / CR_SCALE], dim=-3)


def recolour(luminance: Tensor, chroma: Tensor) -> Tensor:
    """Give a fused luminance the colours of the visible image; the inverse of `to_ycbcr`.

    Args:
        luminance: `(..., 1, H, W)` in 0..1.
        chroma: `(..., 2, H, W)`, Cb and Cr in -0.5..0.5.

    Returns:
        `(..., 3, H, W)` RGB; what no screen can show is clipped to 0..1.
    """
    blue_less_y, red_less_y = (chroma * chroma.new_tensor([[[CB_SCALE]], [[CR_SCALE]]])).split(1, dim=-3)
    green_less_y = -(LUMINANCE[0] * red_less_y + LUMINANCE[2] * blue_less_y) / LUMINANCE[1]
    return (luminance + torch.cat([red_less_y, green_less_y, blue_less_y], dim=-3)).clamp(0, 1)


def write_image(image: Tensor, path: str | Path, overwrite: bool = False, quality: int = 95) -> Path:
    """Write an image of 8 bit per channel, rounded; the file appears whole or not at all.

    Args:
        image: `(1, H, W)` grey or `(3, H, W)` RGB; values outside 0..1 are clipped.
        path: Where to; its suffix names the format.
        overwrite: Whether a file that is there may be replaced.
        quality: Of the formats that lose some: JPEG and WebP, 1..100.

    Raises:
        FileExistsError: The file is there and `overwrite` is not set.
        ValueError: The suffix is unknown, the shape is no image's, or a value is not finite.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"Cannot write {path}: its suffix names no format. Allowed: {', '.join(SUFFIXES)}.")
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"Cannot write {path}: found shape {tuple(image.shape)}, expected (1, H, W) or (3, H, W).")
    if not image.isfinite().all():
        raise ValueError(f"Cannot write {path}: the image holds values that are not finite.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already: choose another folder, move it away, or allow overwriting.")
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    picture = Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).contiguous().numpy())
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        picture.save(partial, format=Image.registered_extensions()[path.suffix.lower()], quality=quality)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
