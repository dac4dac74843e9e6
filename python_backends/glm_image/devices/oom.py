"""What happens when an allocation on a device fails: the request that wanted it ends, and nothing of it is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from glm_image.devices.base import Device
from glm_image.devices.budget import shown
from glm_image.errors import DeviceMemoryError

T = TypeVar("T")


class OomReport(NamedTuple):
    """What the memory was not there for.

    Attributes:
        wanted: what was to be computed.
        beside: what else is held.
        lower: what to lower.
    """

    wanted: str
    beside: str
    lower: str


def run_or_oom(device: Device, work: Callable[[], T], lack: Callable[[], OomReport]) -> T:
    """Does work that may need more memory than the device has.

    Args:
        device: where the work allocates.
        work: what to do.
        lack: says what it was, should it fail.

    Raises:
        DeviceMemoryError: an allocation failed. It does not lead to the failed one, whose frames hold tensors.
    """
    try:
        return work()
    except Exception as error:
        if not device.is_out_of_memory(error):
            raise
        free, total = device.memory()
    # After the clause, where the error and its frames are gone.
    wanted, beside, lower = lack()
    device.release_unused()
    raise DeviceMemoryError(
        f"{device} has not the memory for {wanted}: {shown(free)} of {shown(total)} were free, {beside}; lower {lower}"
    )
