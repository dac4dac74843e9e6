"""Whether what a stage is about to allocate fits its share of a device; asked before anything is loaded."""

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
    """Refuses a stage that does not fit.

    Args:
        stage: the model's name.
        fixed: bytes that its weights take, by what they are of.
        scaled: bytes that its parameters decide on, by what they are for.
        memory: of the device, before the stage is loaded.
        utilization: the share of the device that the stage may use.
        device: its name.
        lower: the parameters on which ``scaled`` depends.

    Raises:
        ConfigurationError: says what is needed, what is there, and what to lower.
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
    parts = ", ".join(f"{shown(size)} for {of}" for of, size in {**fixed, **scaled}.items())
    raise ConfigurationError(
        f"{stage} needs {shown(needed)}: {parts}; "
        f"{device} has {shown(memory.free)} free of {shown(memory.total)}, of which "
        f"memory_utilization {utilization:g} allows {shown(allowed)}: {', or '.join(remedies)}"
    )


def shown(size: int) -> str:
    """Returns a size in bytes as people say it."""
    return f"{size / GIGABYTE:.1f} GB" if size >= GIGABYTE else f"{size / MEGABYTE:.1f} MB"
