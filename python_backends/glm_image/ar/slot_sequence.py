"""The executor's record of a sequence in a slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from glm_image.ar.config import NOISE_BLOCK


@dataclass(eq=False)
class SlotSequence:
    """How far a sequence is on the device, as far as the host knows, and the source of its noise.

    Attributes:
        sampled: number of its tokens that are sampled.
        drawn: number of tokens whose noise is drawn.
    """

    generator: torch.Generator
    total: int
    sampled: int = 0
    drawn: int = 0

    def draw_noise(self, noise: Tensor, until: int) -> None:
        """Draws the noise of the tokens before index ``until``; noise is a slot's, [NOISE_BLOCK, vocabulary].

        The noise of token i replaces that of token ``i - NOISE_BLOCK``.
        """
        # Row by row, as the reference samples it: on CUDA one larger call would give other numbers.
        for index in range(self.drawn, min(until, self.total)):
            noise[index % NOISE_BLOCK].exponential_(generator=self.generator)
            self.drawn = index + 1
