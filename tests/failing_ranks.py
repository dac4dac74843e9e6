"""Ranks that do not come to be, each at another point of loading; the others wait for them in a collective."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

from glm_image.devices.base import Device
from glm_image.parallel.process_group import INTERFACES, Ranks
from glm_image.parallel.worker import RankExecutor


class _Meets:
    def __init__(self, ranks: Ranks) -> None:
        ranks.world.all_reduce_sum(torch.ones(1))

    def run(self, command: Any, /) -> Any:
        return command

    def close(self) -> None:
        pass


class _EndsBadly(_Meets):
    def __init__(self, ranks: Ranks) -> None:
        super().__init__(ranks)
        self._ranks = ranks

    def run(self, command: Any, /) -> Any:
        """The other rank stays in a sum until this one closes."""
        if self._ranks.world.rank:
            self._ranks.world.all_reduce_sum(torch.ones(1))
        return command

    def close(self) -> None:
        ENDS.append(self._ranks.world.all_reduce_sum(torch.ones(1)).item())
        raise RuntimeError("this rank does not end well")


ENDS: list[float] = []
"""What the sums at the end of ``ends_badly`` were."""


def ends_badly(device: Device, ranks: Ranks) -> RankExecutor:
    """Has something under way that ends with the others alone, and then raises."""
    return _EndsBadly(ranks)


def meets(_: object, device: Device, ranks: Ranks) -> RankExecutor:
    """Loads, once all ranks are there."""
    return _Meets(ranks)


def ends(device: Device, ranks: Ranks) -> RankExecutor:
    """Is killed on rank 1."""
    if ranks.world.rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return _Meets(ranks)


def fails(device: Device, ranks: Ranks) -> RankExecutor:
    """Raises on rank 1."""
    if ranks.world.rank:
        raise ValueError("this rank cannot load")
    return _Meets(ranks)


def hangs(device: Device, ranks: Ranks) -> RankExecutor:
    """Never ends on rank 1."""
    if ranks.world.rank:
        signal.pause()
    return _Meets(ranks)


class EndsWhenRead:
    """Kills the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _end, ()


class HidesTheNetwork:
    """Names an interface that does not exist to the process that unpickles it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _hide, ()


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hide() -> None:
    os.environ.update(dict.fromkeys(INTERFACES, "no.such.net"))
