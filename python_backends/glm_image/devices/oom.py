"""Turns a failed allocation on a device into an error of the request, which keeps nothing of the failed work."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from glm_image.devices.base import Device
from glm_image.devices.budget import GIGABYTE
from glm_image.errors import DeviceMemoryError

T = TypeVar("T")


class OomReport(NamedTuple):
    """The parts of an out-of-memory message that the engine knows.

    Attributes:
        operation: what was being computed, e.g. ``a decode step``.
        in_use: what holds memory besides, e.g. ``3 of 8 slots in use``.
        setting: what the operator or the client can lower.
    """

    operation: str
    in_use: str
    setting: str


def run_or_oom(device: Device, work: Callable[[], T], report: Callable[[], OomReport]) -> T:
    """Runs ``work``, which may need more memory than the device has; ``report`` describes a failed allocation.

    Raises:
        DeviceMemoryError: an allocation failed. The error does not reference the failed one, whose frames hold tensors.
    """
    try:
        return work()
    except Exception as error:
        if not device.is_out_of_memory(error):
            raise
        free, total = device.memory()
    # After the except clause, which has dropped the error and its frames.
    operation, in_use, setting = report()
    device.release_unused()
    raise DeviceMemoryError(
        f"out of memory on {device} during {operation}: "
        f"{free / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB free, {in_use}; lower {setting}"
    )
