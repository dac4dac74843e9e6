"""A sheet of what a checkpoint draws for prompts it was not trained on, by the project's own engines."""

from __future__ import annotations

import io
import time
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from glm_image.pipeline import LocalPipeline
from glm_image.request.parameters import GenerationParameters
from train_tiny.world.caption import caption
from train_tiny.world.draw import draw
from train_tiny.world.edits import KINDS, sample_edit
from train_tiny.world.scene import sample_scene
from train_tiny.world.sheet import sheet

SIDE, STEPS = 256, 20


def sample_sheet(checkpoint: Path, out: Path, device: str, prompts: int = 18, seed: int = 7) -> None:
    """Writes a PNG: a picture for each of so many held-out prompts, then source and answer of an edit of each kind."""
    rng = Random(seed)
    texts = [caption(sample_scene(rng, held_out=True), rng, "zh" if n % 6 == 5 else "en") for n in range(prompts)]
    pictures, began = [], time.perf_counter()
    with LocalPipeline(checkpoint, device) as pipeline:

        def painted(prompt: str, *sources: bytes) -> np.ndarray:
            parameters = GenerationParameters(
                prompt=prompt, height=SIDE, width=SIDE, num_inference_steps=STEPS, seed=seed, images=sources or None
            )
            return pipeline.generate(parameters).pixels[0]

        pictures += [painted(text) for text in texts]
        for kind in KINDS:
            edit = sample_edit(rng, held_out=True, kind=kind)
            source = draw([edit.before], SIDE, SIDE)[0].permute(1, 2, 0).numpy()
            file = io.BytesIO()
            Image.fromarray(source).save(file, "PNG")
            pictures += [source, painted(edit.instruction, file.getvalue())]
            texts += [kind, edit.instruction]
    sheet(np.stack(pictures), texts).save(out)
    print(f"{out}: {time.perf_counter() - began:.1f} s")
