"""What users ask a fleet for: kinds of requests, their shares, and what an image of each kind costs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from capacity_planner.pool_simulation import ImageCosts
from capacity_planner.simulated_dit import Rendering
from capacity_planner.times import MEGAPIXEL, StageTimes
from glm_image.request.geometry import Size, output_grids, target_grid

SMALL_SHARE: Final = 0.8
"""Of 512 x 512 and 2048 x 2048 in the mix ``sizes``."""

MIXES: Final = ("t2i", "i2i", "both", "sizes")


@dataclass(frozen=True)
class Kind:
    """Requests for one image with guidance; ``sources`` have the size of the image."""

    size: Size
    steps: int
    sources: int = 0


Mix = Mapping[Kind, float]
"""The share of each kind."""


def mix_named(name: str, size: Size, steps: int) -> Mix:
    """Returns a mix of ``MIXES``; ``sizes`` has sizes of its own."""
    text, edit = Kind(size, steps), Kind(size, steps, 1)
    if name == "sizes":
        return {Kind(Size(512, 512), steps): SMALL_SHARE, Kind(Size(2048, 2048), steps): 1 - SMALL_SHARE}
    return {"t2i": {text: 1.0}, "i2i": {edit: 1.0}, "both": {text: 0.5, edit: 0.5}}[name]


def image_costs(kind: Kind, times: StageTimes) -> ImageCosts:
    """Returns what an image costs, from measured times."""
    grid = target_grid(kind.size)
    tokens = sum(part.tokens for part in output_grids(grid, image_to_image=kind.sources > 0))
    scale, source = kind.size.height * kind.size.width / MEGAPIXEL, times.of_source
    # On average half of its tokens are in the cache.
    cached = kind.sources * grid.tokens + tokens / 2
    added = times.cached_token * max(0.0, cached - times.step_tokens)
    # Every token of the image reads those of the source: both grow with the size.
    step = times.denoise_step(kind.size) + kind.sources * source.step * scale**2
    condition = times.condition + kind.sources * source.condition * scale
    return ImageCosts(
        tokens=tokens,
        prefill=times.prefill + kind.sources * (source.tower + source.prefill) * scale,
        rendering=Rendering(condition + kind.steps * step, times.vae * scale, times.encode * scale),
        added_step=added,
        decode=tokens * (times.step(times.full) + times.full * added),
    )


def ar_seconds(costs: ImageCosts, times: StageTimes) -> float:
    """Returns the seconds of a member of the AR for an image, its slots full."""
    return costs.prefill + costs.decode / times.full


def drawn(mix: Mix, times: StageTimes, requests: int, seed: int) -> list[ImageCosts]:
    """Returns the costs of requests of random kinds."""
    costs = {kind: image_costs(kind, times) for kind in mix}
    chosen = random.Random(f"kinds {seed}").choices(list(mix), weights=list(mix.values()), k=requests)
    return [costs[kind] for kind in chosen]
