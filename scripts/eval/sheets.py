"""Contact sheets of judged images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from eval.judge import Verdict
from eval.questions import Picture, Question, Request
from train_tiny.world.sheet import sheet

MARK = (230, 0, 0)


def save_sheet(
    folder: Path,
    name: str,
    questions: Sequence[Question],
    pictures: Sequence[Picture],
    verdicts: Sequence[Verdict],
    request: Request,
) -> None:
    """Writes each image, and a sheet on which wrong images have a red frame and a description.

    Edits come with their source on the left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells, texts = [], []
    for index, (question, picture, verdict) in enumerate(zip(questions, pictures, verdicts, strict=True)):
        Image.fromarray(picture).save(folder / f"{name}_{index:03}.png")
        wrong = [prop for prop, right in verdict.items() if not right]
        marked = _marked(picture) if wrong else picture
        source = question.source(request)
        cells.append(marked if source is None else np.concatenate([source, marked], axis=1))
        texts.append(f"{'WRONG: ' + ', '.join(wrong) if wrong else 'right'} | {question.prompt}")
    columns = 6 if questions[0].edit is None else 3
    sheet(np.stack(cells), texts, columns).save(folder / f"{name}_sheet.png")


def _marked(picture: Picture) -> Picture:
    image = Image.fromarray(picture)
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline=MARK, width=4)
    return np.asarray(image)
