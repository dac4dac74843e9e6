"""A visible text in a corner of an image."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from glm_image.errors import ConfigurationError
from glm_image.provenance.settings import ProvenanceSettings

HEIGHT_SHARE: Final = 0.05
"""Height of the letters over the shorter side of the image: the least that GB 45438-2025 allows."""
MARGIN_SHARE: Final = 0.02
OUTLINE_SHARE: Final = 0.08
"""Width of the outline over the height of the letters."""
MISSING: Final = "\U0010ffff"
"""A character that no font has."""

Font = ImageFont.FreeTypeFont


class VisibleMark:
    """Draws the text of ``visible_text`` in white with a dark outline.

    Raises:
        ConfigurationError: the font cannot be read, or lacks a character of the text.
    """

    def __init__(self, settings: ProvenanceSettings) -> None:
        self._text, self._corner, self._path = settings.visible_text, settings.visible_corner, settings.visible_font
        self._fonts: dict[int, Font] = {}
        try:
            font = self._font(64)
        except OSError as error:
            raise ConfigurationError(
                f"provenance_visible_font is {self._path!r}, which cannot be read: {error}; allowed: none, or a "
                "font file"
            ) from error
        missing = bytes(font.getmask(MISSING))
        lacking = [letter for letter in self._text if not letter.isspace() and bytes(font.getmask(letter)) == missing]
        if lacking:
            raise ConfigurationError(
                f"provenance_visible_text is {self._text!r}, but its font has no {lacking[0]!r}; allowed: characters "
                "of the font that provenance_visible_font names"
            )

    def drawn(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns an image with the text, uint8 [height, width, 3]; a text that is too wide is drawn smaller."""
        height, width, _ = pixels.shape
        margin = max(1, round(min(height, width) * MARGIN_SHARE))
        font, outline, box = self._fitting(min(height, width), width - 2 * margin)
        left = margin - box[0] if "left" in self._corner else width - margin - box[2]
        top = margin - box[1] if "top" in self._corner else height - margin - box[3]
        # Of the whole image, most time would go into copies.
        rows = slice(max(0, int(top + box[1])), min(height, int(top + box[3]) + 1))
        columns = slice(max(0, int(left + box[0])), min(width, int(left + box[2]) + 1))
        part = Image.fromarray(np.ascontiguousarray(pixels[rows, columns]))
        place = (left - columns.start, top - rows.start)
        ImageDraw.Draw(part).text(place, self._text, fill="white", font=font, stroke_width=outline, stroke_fill="black")
        drawn = pixels.copy()
        drawn[rows, columns] = np.asarray(part)
        return drawn

    def _fitting(self, side: int, room: int) -> tuple[Font, int, tuple[float, float, float, float]]:
        """Returns the font, the width of the outline and the text's box, at most ``room`` pixels wide if possible."""
        size = self._size(side * HEIGHT_SHARE)
        while True:
            font = self._font(size)
            outline = max(1, round(size * OUTLINE_SHARE))
            box = font.getbbox(self._text, stroke_width=outline)
            if box[2] - box[0] <= room or size == 1:
                return font, outline, box
            size = max(1, min(size - 1, int(size * room / (box[2] - box[0]))))

    def _size(self, height: float) -> int:
        """Returns the size at which the text's tallest letter has at least a height in pixels."""
        top, bottom = self._font(64).getbbox(self._text)[1::2]
        return max(1, int(np.ceil(64 * height / max(1.0, bottom - top))))

    def _font(self, size: int) -> Font:
        if size not in self._fonts:
            made = ImageFont.truetype(self._path, size) if self._path else ImageFont.load_default(size)
            assert isinstance(made, Font)
            self._fonts[size] = made
        return self._fonts[size]
