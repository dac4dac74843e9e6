"""From the ``devices`` parameter to the devices of one instance, and the environment of its process; no framework."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from glm_image.devices.discovery import VISIBLE_VARIABLES, Accelerators
from glm_image.errors import ConfigurationError, shown

DEVICE = re.compile(r"cpu(?::\d{1,4})?|(?:npu|cuda):\d{1,4}")
ALLOWED = "auto, or cpu, npu:N, cuda:N, cpu:N, one entry an instance, with ';' between them"
THREADS_VARIABLE = "OMP_NUM_THREADS"

Entry = tuple[str, ...]
"""The devices of one instance."""


@dataclass(frozen=True)
class Placement:
    """Where an instance runs.

    Attributes:
        devices: as the configuration has them, e.g. ``npu:2``.
        local_names: what they are called in a process with ``environment``, e.g. ``npu:0``.
        environment: variables to set before the framework is imported.
    """

    devices: Entry
    local_names: Entry
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return ",".join(self.devices)


def parse_devices(devices: str) -> tuple[Entry, ...]:
    """Reads the parameter: ``npu:0,npu:1;npu:2`` is an instance on two devices and one on a third.

    Raises:
        ConfigurationError: names what is no device.
    """
    entries = tuple(tuple(device.strip() for device in entry.split(",")) for entry in devices.split(";"))
    for entry in entries:
        text = ",".join(entry)
        if not all(DEVICE.fullmatch(device) for device in entry):
            raise ConfigurationError(f"devices has the entry {shown(text)!r}; allowed: {ALLOWED}")
        if len(set(entry)) < len(entry):
            raise ConfigurationError(f"devices has the entry {shown(text)!r}; allowed: each device once in an entry")
    return entries


def assign_devices(
    devices: str, instances: int, cards: Accelerators, *, reserve_first: bool = False
) -> tuple[Entry, ...]:
    """Returns the devices of every instance of a model.

    Args:
        devices: the parameter. ``auto`` takes the cards in turn, or the CPU where there are none; ``cpu`` alone serves
            for all instances.
        instances: how many ``instance_group`` counts.
        cards: what this machine has.
        reserve_first: for ``auto``, whether the first card is left to the other stage where there are several.

    Raises:
        ConfigurationError: an entry is no device of this machine, or there is not one for each instance.
    """
    if devices.strip() == "auto":
        first = int(reserve_first and len(cards.ids) > 1)
        own = range(first, len(cards.ids))
        chosen = [f"{cards.kind}:{own[instance % len(own)]}" if own else "cpu" for instance in range(instances)]
        return tuple((device,) for device in chosen)
    found = f"found on this machine: {cards}"
    entries = parse_devices(devices)
    for entry in entries:
        text = ",".join(entry)
        if not all(map(cards.has, entry)):
            raise ConfigurationError(f"devices has the entry {shown(text)!r}; {found}")
        if len({device.partition(":")[0] for device in entry}) > 1:
            raise ConfigurationError(
                f"devices has the entry {shown(text)!r}; allowed: devices of one kind in an entry; {found}"
            )
    if entries == (("cpu",),):
        return entries * instances
    if len(entries) != instances:
        raise ConfigurationError(
            f"devices is {shown(devices)!r}: {len(entries)} for {instances} instances; "
            f"allowed: as many entries as instance_group counts; {found}"
        )
    return entries


def check_memory_shares(entries: tuple[Entry, ...], memory_utilization: float, cards: Accelerators) -> None:
    """Refuses instances of a model that would take more than all the memory of a card together.

    Raises:
        ConfigurationError: names the entry.
    """
    taken = Counter(device for entry in entries for device in entry if not device.startswith("cpu"))
    for device, count in taken.items():
        if count * memory_utilization > 1:
            raise ConfigurationError(
                f"devices has {device!r} for {count} instances, whose memory_utilization of {memory_utilization:g} "
                f"each comes to {count * memory_utilization:g} of its memory; allowed: at most 1 in all; "
                f"found on this machine: {cards}"
            )


def place_instance(
    entries: tuple[Entry, ...], instance: int, cards: Accelerators, environment: Mapping[str, str] = os.environ
) -> Placement:
    """Returns where one instance runs, and how its process is to see no other card.

    Args:
        entries: of all instances, from ``assign_devices``.
        instance: which one.
        cards: what this machine has.
        environment: what holds so far; a variable that is set there is narrowed, or left alone.
    """
    devices = entries[instance]
    kind = devices[0].partition(":")[0]
    if kind == "cpu":
        return Placement(devices, devices, _cpu_environment(entries, devices, cards, environment))
    # The Ascend runtime wants its list in ascending order; devices are then numbered by their place in it.
    indices = sorted(int(device.partition(":")[2]) for device in devices)
    local_names = tuple(f"{kind}:{indices.index(int(device.partition(':')[2]))}" for device in devices)
    variables = {VISIBLE_VARIABLES[kind]: ",".join(cards.ids[index] for index in indices)}
    if kind == "cuda" and VISIBLE_VARIABLES[kind] not in environment:
        variables["CUDA_DEVICE_ORDER"] = environment.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi order
    return Placement(devices, local_names, variables)


def _cpu_environment(
    entries: tuple[Entry, ...], devices: Entry, cards: Accelerators, environment: Mapping[str, str]
) -> dict[str, str]:
    variables = {VISIBLE_VARIABLES["cuda"]: ""} if cards.kind == "cuda" else {}
    if devices == ("cpu",) or THREADS_VARIABLE in environment:
        return variables
    shares = len({device for entry in entries for device in entry if device.startswith("cpu:")})
    cores = len(os.sched_getaffinity(0))
    # Every device of an entry has a process of its own, which inherits this.
    return {**variables, THREADS_VARIABLE: str(max(1, cores // shares))}
