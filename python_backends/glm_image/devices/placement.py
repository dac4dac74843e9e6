"""Assigns devices to instances, by the parameter ``devices``, and hides the others from a process; without torch."""

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
    """The devices of one instance, such as ``npu:2``.

    In a process that has set the variables of ``environment`` before importing torch, their names are ``local_names``,
    such as ``npu:0``.
    """

    devices: Entry
    local_names: Entry
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return ",".join(self.devices)


def parse_devices(devices: str) -> tuple[Entry, ...]:
    """Parses ``devices``: ``npu:0,npu:1;npu:2`` is one instance on two devices and one on a third.

    Raises:
        ConfigurationError: an entry names no device, or one twice.
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
    devices: str, instances: int, accelerators: Accelerators, *, reserve_first: bool = False
) -> tuple[Entry, ...]:
    """Returns the devices of every instance of a model.

    ``auto`` assigns the accelerators of this machine round-robin, or the CPU if there are none; with ``reserve_first``
    it leaves the first of several to the other stage. A single ``cpu`` is shared by all instances.

    Raises:
        ConfigurationError: an entry is not on this machine, or the number of entries is not ``instances``.
    """
    if devices.strip() == "auto":
        first = int(reserve_first and len(accelerators.ids) > 1)
        usable = range(first, len(accelerators.ids))
        chosen = (
            f"{accelerators.kind}:{usable[index % len(usable)]}" if usable else "cpu" for index in range(instances)
        )
        return tuple((device,) for device in chosen)
    present = f"found on this machine: {accelerators}"
    entries = parse_devices(devices)
    for entry in entries:
        text = ",".join(entry)
        if not all(map(accelerators.has, entry)):
            raise ConfigurationError(f"devices has the entry {shown(text)!r}; {present}")
        if len({device.partition(":")[0] for device in entry}) > 1:
            raise ConfigurationError(
                f"devices has the entry {shown(text)!r}; allowed: devices of one kind in an entry; {present}"
            )
    if entries == (("cpu",),):
        return entries * instances
    if len(entries) != instances:
        raise ConfigurationError(
            f"devices is {shown(devices)!r}: {len(entries)} for {instances} instances; "
            f"allowed: as many entries as instance_group counts; {present}"
        )
    return entries


def check_memory_shares(entries: tuple[Entry, ...], memory_utilization: float, accelerators: Accelerators) -> None:
    """Raises ConfigurationError if the instances of a model would use more than the memory of an accelerator."""
    instances = Counter(device for entry in entries for device in entry if not device.startswith("cpu"))
    for device, count in instances.items():
        if count * memory_utilization > 1:
            raise ConfigurationError(
                f"devices has {device!r} for {count} instances, whose memory_utilization of {memory_utilization:g} "
                f"each comes to {count * memory_utilization:g} of its memory; allowed: at most 1 in all; "
                f"found on this machine: {accelerators}"
            )


def place_instance(
    entries: tuple[Entry, ...], instance: int, accelerators: Accelerators, environment: Mapping[str, str] = os.environ
) -> Placement:
    """Returns the placement of one of the instances of ``assign_devices``; its process sees no other accelerator.

    Of the process's ``environment`` the visible devices are narrowed; other variables that are set are kept.
    """
    devices = entries[instance]
    kind = devices[0].partition(":")[0]
    if kind == "cpu":
        return Placement(devices, devices, _cpu_environment(entries, devices, accelerators, environment))
    # The Ascend runtime requires ascending order; devices are numbered by their position.
    indices = sorted(int(device.partition(":")[2]) for device in devices)
    local_names = tuple(f"{kind}:{indices.index(int(device.partition(':')[2]))}" for device in devices)
    variables = {VISIBLE_VARIABLES[kind]: ",".join(accelerators.ids[index] for index in indices)}
    if kind == "cuda" and VISIBLE_VARIABLES[kind] not in environment:
        variables["CUDA_DEVICE_ORDER"] = environment.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi order
    return Placement(devices, local_names, variables)


def _cpu_environment(
    entries: tuple[Entry, ...], devices: Entry, accelerators: Accelerators, environment: Mapping[str, str]
) -> dict[str, str]:
    variables = {VISIBLE_VARIABLES["cuda"]: ""} if accelerators.kind == "cuda" else {}
    if devices == ("cpu",) or THREADS_VARIABLE in environment:
        return variables
    processes = len({device for entry in entries for device in entry if device.startswith("cpu:")})
    cores = len(os.sched_getaffinity(0))
    # Every device of an entry has a process of its own, which inherits the variable.
    return {**variables, THREADS_VARIABLE: str(max(1, cores // processes))}
