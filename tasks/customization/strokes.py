"""Pen strokes to images in EMNIST's style, and synthetic writers who write in stroke fonts."""

from collections.abc import Sequence
from functools import cache

import numpy as np
from HersheyFonts import HersheyFonts
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from tasks.customization.characters import CHARACTERS

SIDE = 28
# EMNIST draws the character into the inner 24 pixels (Cohen et al. 2017, figure 1).
INNER = 24
_OVERSAMPLING = 4

FONTS = ("futural", "rowmans", "scripts", "cursive", "scriptc", "futuram")

Stroke = NDArray[np.float64]


def render(strokes: Sequence[Stroke], thickness: float = 2.5, blur: float = 0.6) -> NDArray[np.uint8]:
    """Draw strokes as EMNIST's scans were prepared: centred, scaled to the inner 24 pixels, blurred, white on black.

    Args:
        strokes: Polylines `(n, 2)` of x and y, y pointing down, in any unit; a dot is a polyline of one point.
        thickness: Width of the pen in pixels of the result.
        blur: Standard deviation of the blur in pixels of the result.

    Returns:
        `(28, 28)`.

    Raises:
        ValueError: There is no point at all.
    """
    strokes = [np.asarray(stroke, dtype=np.float64).reshape(-1, 2) for stroke in strokes if len(stroke)]
    if not strokes:
        raise ValueError("There is nothing to draw: no stroke has a point.")
    points = np.concatenate(strokes)
    low, high = points.min(0), points.max(0)
    extent = float((high - low).max())
    scale = (INNER - thickness) / extent if extent > 0 else 0.0
    canvas = Image.new("L", (SIDE * _OVERSAMPLING, SIDE * _OVERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    radius = thickness * _OVERSAMPLING / 2
    for stroke in strokes:
        pixels = ((stroke - (low + high) / 2) * scale + SIDE / 2) * _OVERSAMPLING
        path = [(float(x), float(y)) for x, y in pixels]
        if len(path) > 1:
            draw.line(path, fill=255, width=round(2 * radius), joint="curve")
        for x, y in (path[0], path[-1]):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    smooth = canvas.filter(ImageFilter.GaussianBlur(blur * _OVERSAMPLING))
    return np.asarray(smooth.resize((SIDE, SIDE), Image.Resampling.BOX))


@cache
def glyph(font: str, character: str) -> tuple[Stroke, ...]:
    """The strokes of a character in a stroke font, y pointing down, height about 1."""
    fonts = HersheyFonts()
    fonts.load_default_font(font)
    fonts.normalize_rendering(1.0)
    return tuple(np.array(stroke, dtype=np.float64) * (1, -1) for stroke in fonts.strokes_for_text(character))


class SyntheticWriter:
    """A made-up person: a font for each class, a slant, a size of wobble and a pen; every sample differs a little.

    Whatever is drawn here is synthetic and must be called so wherever it is shown.
    """

    def __init__(self, seed: int, fonts: Sequence[str] = FONTS, strength: float = 1.0) -> None:
        """Draw the person's habits.

        Args:
            seed: The person.
            fonts: Fonts to choose from, one for each class.
            strength: How far habits and wobble depart from the font.
        """
        self.random = np.random.default_rng(seed)
        self.fonts = {character: str(self.random.choice(list(fonts))) for character in CHARACTERS}
        self.slant = strength * self.random.uniform(-0.5, 0.5)
        self.rotation = strength * self.random.uniform(-0.25, 0.25)
        self.aspect = 1 + strength * self.random.uniform(-0.3, 0.3)
        self.wobble = strength * self.random.uniform(0.01, 0.03)
        self.thickness = self.random.uniform(1.8, 3.2)

    def write(self, character: str) -> NDArray[np.uint8]:
        """Write a character once: `(28, 28)`, white on black."""
        angle = self.rotation + self.random.normal(0, 0.06)
        slant = self.slant + self.random.normal(0, 0.06)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        shape = turn @ np.array([[self.aspect, slant], [0.0, 1.0]])
        phase = self.random.uniform(0, 2 * np.pi, 2)
        strokes = []
        for stroke in glyph(self.fonts[character], character):
            bent = stroke @ shape.T
            bent = bent + self.wobble * np.sin(6 * bent[:, ::-1] + phase) * 2
            strokes.append(bent + self.random.normal(0, self.wobble / 2, bent.shape))
        return render(strokes, self.thickness + self.random.normal(0, 0.15))
