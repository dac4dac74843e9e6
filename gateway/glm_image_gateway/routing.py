"""Which member of a pool gets a request: functions of predicted work and of what each member has, without I/O.

``glm_dit`` works on one image at a time, so a request goes to the member that is predicted to be done first: of two
drawn at random, which avoids that several gateways choose the same one. ``glm_ar`` decodes a batch in the time of one
sequence, so a request goes into a batch that runs already, if it does not make that much longer.

Times are seconds of one clock that never goes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from glm_image_gateway.work import WEIGHT_OF_LATEST, SpeedEstimate

PIXELS_PER_TOKEN: Final = 32 * 32
"""Of the AR's tokens."""
PREVIEW_TOKENS: Final = 256
"""Of the preview grid, which precedes the tokens of the image in text to image."""
PIXELS_PER_PATCH: Final = 16 * 16
"""Of the DiT's tokens."""
ATTENTION_PATCHES: Final = 24_576
"""Patches for which attention takes as long as the rest of a block: 6 times its width of 4,096."""

CHEAP: Final = 0.25
"""The share of its own steps by which a sequence may lengthen the batch that it joins."""
FIRST_SECONDS: Final = {"glm_ar": 0.02, "glm_dit": 2e-5}
"""Seconds of a unit of work before any has been measured."""
KEPT_KINDS: Final = 256
LEAST_LEFT: Final = 0.1
REQUESTS_PER_INSTANCE: Final = 2
"""Images that an instance of ``glm_dit`` may have: while it decodes and sends one, it denoises the next."""


@dataclass(frozen=True)
class Work:
    """What a stage has to do for a request.

    Attributes:
        kind: requests of the same kind take the same time.
        units: for ``glm_ar`` decode steps; for ``glm_dit`` images x steps x branches x patches, and their attention.
        images: sequences, or images.
    """

    kind: Hashable
    units: float
    images: int = 1


def ar_work(pixels: int, images: int) -> Work:
    """Returns the work of ``glm_ar`` for images of so many pixels: a step for each token, those of a preview too."""
    return Work(("ar", pixels), pixels // PIXELS_PER_TOKEN + PREVIEW_TOKENS, images)


def dit_work(pixels: int, images: int, steps: int, guidance_scale: float, sources: int = 0) -> Work:
    """Returns the work of ``glm_dit``; it is proportional to the seconds on every device, about.

    Args:
        pixels: of one image.
        images: to render.
        steps: denoising steps.
        guidance_scale: above 1 each step has two branches.
        sources: source images, whose patches the conditional branch reads.
    """
    patches = max(1.0, pixels / PIXELS_PER_PATCH)
    branches = 2 if guidance_scale > 1 else 1
    read = patches * (1 + sources / branches)
    units = images * steps * branches * patches * (1 + read / ATTENTION_PATCHES)
    return Work(("dit", pixels, images, steps, branches, sources), units, images)


class Predictor:
    """Predicts the seconds of work: as the latest work of its kind took, else by its units."""

    def __init__(self, seconds_per_unit: float) -> None:
        self._speed = SpeedEstimate(seconds_per_unit)
        self._kinds: OrderedDict[Hashable, float] = OrderedDict()

    def seconds(self, work: Work) -> float:
        """Returns the predicted seconds of work on one instance that has nothing else to do."""
        known = self._kinds.get(work.kind)
        return self._speed.seconds(work.units) if known is None else known

    def add(self, work: Work, seconds: float) -> None:
        """Adds a measurement: the seconds in which an instance worked on it, without waiting."""
        if work.units <= 0 or seconds <= 0:
            return
        self._speed.add(work.units, seconds)
        before = self._kinds.pop(work.kind, seconds)
        self._kinds[work.kind] = before + WEIGHT_OF_LATEST * (seconds - before)
        if len(self._kinds) > KEPT_KINDS:
            self._kinds.popitem(last=False)


@dataclass(frozen=True)
class MemberLoad:
    """What a member of a pool has.

    Attributes:
        seconds: predicted seconds of its unfinished work, over all its instances.
        images: images, or sequences, that it has.
        most: images that it may have; it is given more only if it has none.
        instances: instances that share its work.
        batch_seconds: for ``glm_ar`` the predicted seconds until its running batch is decoded.
    """

    seconds: float
    images: int
    most: int
    instances: int = 1
    batch_seconds: float = 0.0

    @property
    def wait(self) -> float:
        """The predicted seconds until an instance is free."""
        return self.seconds / self.instances

    def has_room(self, images: int) -> bool:
        return self.images == 0 or self.images + images <= self.most


class Outstanding:
    """The unfinished work of a member, by the predictions with which it was given.

    Args:
        instances: images that the member works on at the same time; further ones wait.
        most: images that it may have.
    """

    def __init__(self, instances: int, most: int) -> None:
        self.instances, self.most = instances, most
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: Hashable, seconds: float, images: int, now: float) -> None:
        """Adds work that the member is given."""
        self._entries[key] = _Entry(seconds, images)
        self._mark_running(now)

    def remove(self, key: Hashable, now: float) -> None:
        """Removes work that has ended."""
        del self._entries[key]
        self._mark_running(now)

    def load(self, now: float) -> MemberLoad:
        """Returns what the member has."""
        left = [entry.left(now) for entry in self._entries.values()]
        images = sum(entry.images for entry in self._entries.values())
        return MemberLoad(sum(left), images, self.most, self.instances, max(left, default=0.0))

    def _mark_running(self, now: float) -> None:
        for entry in islice(self._entries.values(), self.instances):
            if entry.running_since is None:
                entry.running_since = now


@dataclass
class _Entry:
    seconds: float
    images: int
    running_since: float | None = None

    def left(self, now: float) -> float:
        """Returns the predicted seconds left; a tenth of its time for work that takes longer than predicted."""
        worked = 0.0 if self.running_since is None else now - self.running_since
        return max(LEAST_LEFT * self.seconds, self.seconds - worked)


def choose_dit(loads: Sequence[MemberLoad], images: int, draw: Callable[[int], int]) -> int | None:
    """Returns the index of the member that renders images: the less loaded of two that have room.

    Args:
        loads: of the members that may be chosen.
        images: to render.
        draw: returns a random number from 0 to below its argument.
    """
    rooms = [index for index, load in enumerate(loads) if load.has_room(images)]
    if not rooms:
        return None
    first = rooms.pop(draw(len(rooms)))
    if not rooms:
        return first
    second = rooms[draw(len(rooms))]
    return min(first, second, key=lambda index: loads[index].wait)


def choose_ar(loads: Sequence[MemberLoad], images: int, seconds: float, draw: Callable[[int], int]) -> int | None:
    """Returns the index of the member that decodes sequences.

    A batch with free slots is filled first, the fullest of those that the sequences lengthen by at most ``CHEAP`` of
    their own steps; then an idle member begins a batch; then the batch that is lengthened least.

    Args:
        loads: of the members that may be chosen.
        images: sequences to decode.
        seconds: predicted for them in a slot.
        draw: returns a random number from 0 to below its argument.
    """
    rooms = [index for index, load in enumerate(loads) if load.has_room(images)]
    cheap = [index for index in rooms if loads[index].images and _added(loads[index], seconds) <= CHEAP * seconds]
    if cheap:
        return max(cheap, key=lambda index: loads[index].images)
    if idle := [index for index in rooms if not loads[index].images]:
        return idle[draw(len(idle))]
    return min(rooms, key=lambda index: _added(loads[index], seconds), default=None)


def _added(load: MemberLoad, seconds: float) -> float:
    """Returns the seconds by which sequences lengthen a member's batch."""
    return max(0.0, seconds - load.batch_seconds)


def share_out(images: int, members: int) -> list[int]:
    """Returns how many of a request's images each of several parts has: at most one part a member, of like sizes."""
    parts = max(1, min(images, members))
    return [images // parts + (index < images % parts) for index in range(parts)]
