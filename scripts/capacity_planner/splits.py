"""What a step takes where several cards share it, by what fewer of them were measured to gain."""

from __future__ import annotations

from dataclasses import dataclass

from glm_image.parallel.layout import MEMBERS, ParallelLayout


@dataclass(frozen=True)
class Splits:
    """The share of a step that takes as long on any number of cards, by how it is split (Amdahl, 1967).

    Attributes:
        decode: of a decode step.
        cfg: of a denoising step, as are the others; see ``ParallelLayout``.
        tp: see ``cfg``.
        ring: see ``cfg``.
        ulysses: see ``cfg``.
    """

    decode: float = 0.0
    cfg: float = 0.0
    tp: float = 0.0
    ring: float = 0.0
    ulysses: float = 0.0

    def select_decode_step(self, cards: int) -> float:
        """Returns what a decode step takes over some cards, as a share of what it takes on one."""
        return _share(self.decode, cards)

    def denoising_step(self, layout: ParallelLayout) -> float:
        """Returns the same of a denoising step; what is split in several ways gains by all of them."""
        share = 1.0
        for member in MEMBERS:
            share *= _share(getattr(self, member), getattr(layout, member))
        return share


def undivided(cards: int, gain: float) -> float:
    """Returns the share that takes as long on any number of cards, where some, two or more, gain ``gain``."""
    return (cards / gain - 1) / (cards - 1)


def _share(stays: float, cards: int) -> float:
    return stays + (1 - stays) / cards
