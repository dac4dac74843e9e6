"""Commands that make libraries load at start what they would otherwise load during the first requests.

Libraries keep handles per thread, choose kernels by shape and load them at their first call: half a second of the first
request. So the thread that will run requests runs these commands before; they leave every slot idle.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

from glm_image.ar.commands import Admit, Advance, ArCommand, Encode, Release, Step
from glm_image.request.geometry import Grid
from glm_image.request.parameters import Sampling

STEPS = 3
"""Steps after a prompt, so that the host gets ahead of the device as it does in a request."""

TEXT_LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
"""Lengths of prompts for which matrix products may choose different kernels; ours distinguish multiples of 16."""


def warmup_commands(
    ids: Sequence[int], sources: Sequence[Encode], sampling: Sampling, longest: int, *, speculates: bool = False
) -> list[ArCommand[Any]]:
    """Returns commands that encode source images, and prefill and decode prompts of usual lengths.

    The prompts repeat ``ids``, up to the ``longest`` that a slot holds. Without sources, on a device that loads nothing
    lazily, only ``ids`` run.
    """
    sources = [source for source in sources if len(source.patches) <= longest]
    lengths = [len(ids)]
    if sources:
        lengths += [*TEXT_LENGTHS, *(len(ids) + len(source.patches) for source in sources)]
    commands: list[ArCommand[Any]] = list(sources)
    for length in lengths:
        if length + STEPS + 1 <= longest:
            repeated = tuple(islice(cycle(ids), length))
            steps = [Advance(((0, 1),))] * STEPS if speculates else [Step(STEPS)]
            commands += [Admit(0, repeated, (Grid(1, STEPS + 1),), sampling, seed=0), *steps, Release(0)]
    return commands
