"""Checks before loading that a stage fits its share of a device."""

from __future__ import annotations

from collections.abc import Mapping

from glm_image.devices.base import Memory
from glm_image.errors import ConfigurationError

GIGABYTE = 10**9
MEGABYTE = 10**6


def check_budget(
    stage: str,
    fixed: Mapping[str, int],
    scaled: Mapping[str, int],
    memory: Memory,
    utilization: float,
    device: str,
    lower: str = "",
) -> None:
    """Checks that a stage fits its share of a device and the device's free memory.

    ``fixed`` has the bytes of its weights, by part; ``scaled`` the bytes that depend on the parameters ``lower``, by
    purpose. ``memory`` is that of the device before the stage is loaded, ``utilization`` the share.

    Raises:
        ConfigurationError: the stage does not fit; the message lists needs, free memory and remedies.
    """
    share = int(memory.total * utilization)
    allowed = min(memory.free, share)
    weights = sum(fixed.values())
    needed = weights + sum(scaled.values())
    if needed <= allowed:
        return
    remedies = [f"lower {lower}"] if weights < allowed and lower else []
    if share < memory.free and utilization < 1:
        remedies.append("raise memory_utilization")
    remedies.append("give the stage another device")
    parts = ", ".join(f"{format_bytes(size)} for {purpose}" for purpose, size in {**fixed, **scaled}.items())
    raise ConfigurationError(
        f"{stage} needs {format_bytes(needed)}: {parts}; "
        f"{device} has {format_bytes(memory.free)} free of {format_bytes(memory.total)}, of which "
        f"memory_utilization {utilization:g} allows {format_bytes(allowed)}: {', or '.join(remedies)}"
    )


def format_bytes(size: int) -> str:
    """Returns bytes as GB or MB."""
    return f"{size / GIGABYTE:.1f} GB" if size >= GIGABYTE else f"{size / MEGABYTE:.1f} MB"
