"""From the ``devices`` parameter of a model's configuration to one instance's device."""

from __future__ import annotations

import importlib.util
import re

import torch

from glm_image.devices.accelerator import CudaDevice, NpuDevice
from glm_image.devices.base import Device
from glm_image.devices.cpu import CpuDevice
from glm_image.errors import ConfigurationError

ENTRY = re.compile(r"cpu|(?:npu|cuda):\d+")
ALLOWED = "auto, or cpu, npu:N, cuda:N, one entry an instance, with ';' between them"


def placement(devices: str, instance: int, *, first: int = 0) -> str:
    """Returns the device of one instance of a model.

    Args:
        devices: the parameter, e.g. ``npu:1;npu:2``, or ``auto``.
        instance: the instance's index.
        first: for ``auto``, the card of instance 0 where there are several; later instances take the next ones.

    Raises:
        ConfigurationError: there is no such entry, or it is not a device.
    """
    if devices.strip() == "auto":
        kind, count = accelerators()
        return f"{kind}:{(first + instance) % count}" if count else "cpu"
    entries = [entry.strip() for entry in devices.split(";")]
    for entry in entries:
        if "," in entry:
            raise ConfigurationError(f"devices has the entry {entry!r}; one instance over several devices comes later")
        if not ENTRY.fullmatch(entry):
            raise ConfigurationError(f"devices has the entry {entry!r}; allowed: {ALLOWED}")
    if entries == ["cpu"]:
        return "cpu"
    if instance >= len(entries):
        raise ConfigurationError(
            f"devices is {devices!r}: {len(entries)} entries, none for instance {instance}; "
            "allowed: as many entries as instance_group counts"
        )
    return entries[instance]


def accelerators() -> tuple[str, int]:
    """Returns the kind of accelerator of this machine and how many there are; ("cpu", 0) without."""
    if importlib.util.find_spec("torch_npu") is not None:
        import torch_npu  # noqa: F401, PLC0415

        if torch.npu.is_available():  # type: ignore[attr-defined]
            return "npu", torch.npu.device_count()  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        return "cuda", torch.cuda.device_count()
    return "cpu", 0


def open_device(name: str) -> Device:
    """Opens a device by name: ``cpu``, ``cuda:0``, ``npu:1``.

    Raises:
        ConfigurationError: the machine has no such device.
    """
    if not ENTRY.fullmatch(name):
        raise ConfigurationError(f"device is {name!r}; allowed: cpu, npu:N, cuda:N")
    if name == "cpu":
        return CpuDevice(torch.device("cpu"))
    kind, count = accelerators()
    wanted_kind, index = name.split(":")
    if wanted_kind != kind or int(index) >= count:
        found = f"{kind}:0 to {kind}:{count - 1}" if count else "cpu only"
        raise ConfigurationError(f"device is {name!r}; found on this machine: {found}")
    return (NpuDevice if kind == "npu" else CudaDevice)(torch.device(name))


def named_dtype(name: str) -> torch.dtype | None:
    """Returns the dtype a configuration names; None for ``auto``, the device's default."""
    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]
