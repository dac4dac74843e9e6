"""Executors that fail at different points of loading, while the other ranks wait for them in a collective."""

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
        """Rank 1 stays in an all-reduce until rank 0 closes."""
        if self._ranks.world.rank:
            self._ranks.world.all_reduce_sum(torch.ones(1))
        return command

    def close(self) -> None:
        ENDS.append(self._ranks.world.all_reduce_sum(torch.ones(1)).item())
        raise RuntimeError("this rank fails to close")


ENDS: list[float] = []
"""The all-reduced sums at the close of ``ends_badly``."""


def ends_badly(device: Device, ranks: Ranks) -> RankExecutor:
    """An executor that needs the other ranks to close, and then raises."""
    return _EndsBadly(ranks)


def meets(_: object, device: Device, ranks: Ranks) -> RankExecutor:
    """Loads when all ranks have joined."""
    return _Meets(ranks)


def ends(device: Device, ranks: Ranks) -> RankExecutor:
    """Kills itself on rank 1."""
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
