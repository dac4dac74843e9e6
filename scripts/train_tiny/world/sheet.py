"""Draws a sheet of scenes, or of edits, with their captions: to look at.

From the folder above: python -m world.sheet OUT.png [--edits] [--held-out] [--size WxH] [--seed N]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .caption import LANGUAGES, caption
from .draw import draw
from .edits import sample_edit
from .scene import sample_scene

COLUMNS, ROWS, TEXT = 6, 5, 46


def sheet(pictures: np.ndarray, texts: list[str], columns: int = COLUMNS) -> Image.Image:
    """Lays out pictures, uint8 [n, height, width, 3], with a text under each; what the font lacks shows as boxes."""
    count, height, width, _ = pictures.shape
    rows = -(-count // columns)
    page = Image.new("RGB", (columns * (width + 4), rows * (height + TEXT + 4)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for index, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left, top = index % columns * (width + 4), index // columns * (height + TEXT + 4)
        page.paste(Image.fromarray(picture), (left, top))
        letters = max(10, width // 6)
        lines = [text[start : start + letters] for start in range(0, len(text), letters)]
        pen.text((left, top + height + 1), "\n".join(lines), fill="black", font=font, spacing=1)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(prog="sheet", description="Draws a sheet of scenes with their captions.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--edits", action="store_true")
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--size", default="256x256", metavar="WxH")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    width, height = map(int, flags.size.split("x"))
    rng = Random(flags.seed)
    if flags.edits:
        edits = [sample_edit(rng, flags.held_out) for _ in range(COLUMNS * ROWS // 2)]
        scenes = [scene for edit in edits for scene in (edit.before, edit.after)]
        texts = [text for edit in edits for text in (edit.kind, edit.instruction)]
    else:
        scenes = [sample_scene(rng, flags.held_out) for _ in range(COLUMNS * ROWS)]
        texts = [caption(scene, rng, LANGUAGES[index % 6 == 5]) for index, scene in enumerate(scenes)]
    sheet(draw(scenes, height, width).permute(0, 2, 3, 1).numpy(), texts).save(flags.out)
    print("\n".join(texts))


if __name__ == "__main__":
    main()
