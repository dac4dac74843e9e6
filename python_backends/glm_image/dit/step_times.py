"""How long denoising steps take, by which deadlines, turns and remaining times are estimated."""

from __future__ import annotations

from glm_image.lifecycle.durations import DurationStats, DurationStatsByKey
from glm_image.request.parameters import PaintRequest


class StepTimes:
    """The latest durations of steps by kind of request; a kind without any is estimated by its tokens."""

    def __init__(self) -> None:
        self._kinds = DurationStatsByKey()
        self._token = DurationStats()

    def add(self, request: PaintRequest, seconds: float) -> None:
        self._kinds.of(_kind(request)).add(seconds)
        self._token.add(seconds / _tokens(request))

    def fastest(self, request: PaintRequest) -> float:
        """Returns the least that a step of such a request took, in seconds; 0 if unknown."""
        return self._kinds.of(_kind(request)).fastest

    def step_seconds(self, request: PaintRequest) -> float:
        """Returns the expected seconds of a step; 0 before any step."""
        return self._kinds.of(_kind(request)).mean or self._token.mean * _tokens(request)

    def image_seconds(self, request: PaintRequest) -> float:
        """Returns the expected seconds of all steps of an image; 0 before any step."""
        return request.num_inference_steps * self.step_seconds(request)


def _kind(request: PaintRequest) -> tuple[object, ...]:
    """Returns what the seconds of a step depend on."""
    return request.grid, request.guidance_scale > 1, request.source_grids


def _tokens(request: PaintRequest) -> int:
    """Returns the tokens that a step passes through the blocks."""
    return request.grid.tokens * (2 if request.guidance_scale > 1 else 1)
