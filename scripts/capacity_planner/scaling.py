"""Duration of a step that several cards share, extrapolated from measured speedups (Amdahl, 1967)."""

from __future__ import annotations

from dataclasses import dataclass

from glm_image.parallel.layout import MEMBERS, ParallelLayout


@dataclass(frozen=True)
class ParallelScaling:
    """The serial share of a step, by the kind of parallelism: it takes as long on any number of cards.

    Attributes:
        decode: of a decode step, tensor parallel.
        cfg: of a denoising step, as the next ones; see ``ParallelLayout``.
        tp: see ``cfg``.
        ring: see ``cfg``.
        ulysses: see ``cfg``.
    """

    decode: float = 0.0
    cfg: float = 0.0
    tp: float = 0.0
    ring: float = 0.0
    ulysses: float = 0.0

    def decode_step(self, cards: int) -> float:
        """Returns the duration of a decode step over some cards, relative to one card."""
        return _relative(self.decode, cards)

    def denoise_step(self, layout: ParallelLayout) -> float:
        """Returns the relative duration of a denoising step; kinds of parallelism multiply."""
        relative = 1.0
        for member in MEMBERS:
            relative *= _relative(getattr(self, member), getattr(layout, member))
        return relative


def serial_share(cards: int, speedup: float) -> float:
    """Returns the serial share of a step for which two or more cards were measured to gain ``speedup``."""
    return (cards / speedup - 1) / (cards - 1)


def _relative(serial: float, cards: int) -> float:
    return serial + (1 - serial) / cards
