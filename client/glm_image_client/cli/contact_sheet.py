"""The contact sheet of ``generate --prompts``: small copies of all images in one file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageOps

from glm_image_client.result import write_file

TILE: Final = 192
"""Side of a copy in pixels."""

LABEL_HEIGHT: Final = 16
LABEL_CHARACTERS: Final = 30
MARGIN: Final = 4
MAX_IMAGES: Final = 400
"""Images of a sheet: further ones are left out."""


def write_contact_sheet(file: Path, images: Sequence[tuple[str, Path]]) -> Path | None:
    """Writes small copies of images, each with its label below, as PNG and returns the file; None without images."""
    shown = images[:MAX_IMAGES]
    if not shown:
        return None
    columns = math.ceil(math.sqrt(len(shown)))
    width, height = TILE + MARGIN, TILE + LABEL_HEIGHT + MARGIN
    size = (columns * width + MARGIN, math.ceil(len(shown) / columns) * height + MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for place, (label, path) in enumerate(shown):
        row, column = divmod(place, columns)
        left, top = MARGIN + column * width, MARGIN + row * height
        with Image.open(path) as image:
            small = ImageOps.contain(image.convert("RGB"), (TILE, TILE))
        sheet.paste(small, (left + (TILE - small.width) // 2, top + (TILE - small.height) // 2))
        # Pillow's font has no Chinese.
        text = label[:LABEL_CHARACTERS].encode("ascii", "replace").decode()
        draw.text((left, top + TILE), text, fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "png")
    write_file(file, buffer.getvalue())
    return file
