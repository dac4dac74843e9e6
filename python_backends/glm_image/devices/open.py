"""Opens devices by name."""

from __future__ import annotations

import importlib.util

import torch

from glm_image.devices.accelerator import CudaDevice, NpuDevice
from glm_image.devices.base import Device
from glm_image.devices.cpu import CpuDevice
from glm_image.devices.discovery import find_accelerators
from glm_image.devices.placement import DEVICE, assign_devices
from glm_image.errors import ConfigurationError


def instance_device(devices: str, instance: int) -> str:
    """Returns the first device of an instance, in a process that sees all devices."""
    entries = assign_devices(devices, max(instance + 1, devices.count(";") + 1), find_accelerators())
    return entries[instance][0]


def count_accelerators() -> tuple[str, int]:
    """Returns the kind and number of accelerators that torch finds; ("cpu", 0) if none."""
    if importlib.util.find_spec("torch_npu") is not None:
        import torch_npu  # noqa: F401, PLC0415

        if torch.npu.is_available():  # type: ignore[attr-defined]
            return "npu", torch.npu.device_count()  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        return "cuda", torch.cuda.device_count()
    return "cpu", 0


def open_device(name: str, display_name: str | None = None) -> Device:
    """Opens the device of a name in this process, such as ``cpu``, ``cpu:1`` or ``cuda:0``.

    Messages name it ``display_name``, for a process that does not see all devices.

    Raises:
        ConfigurationError: the machine has no such device.
    """
    if not DEVICE.fullmatch(name):
        raise ConfigurationError(f"device is {name!r}; allowed: cpu, cpu:N, npu:N, cuda:N")
    if name.startswith("cpu"):
        return CpuDevice(torch.device("cpu"), display_name or name)
    kind, count = count_accelerators()
    named_kind, index = name.split(":")
    if named_kind != kind or int(index) >= count:
        found = f"{kind}:0 to {kind}:{count - 1}" if count else "cpu only"
        raise ConfigurationError(f"device is {name!r}; found on this machine: {found}")
    return (NpuDevice if kind == "npu" else CudaDevice)(torch.device(name), display_name)


def named_dtype(name: str) -> torch.dtype | None:
    """Returns the dtype of the parameter ``dtype``; None for ``auto``, the device's default."""
    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[name]
