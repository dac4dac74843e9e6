"""Where tensors live and steps run: one interface, with the CPU, CUDA and Ascend NPUs behind it."""

from glm_image.devices.base import Device, Mark, Memory
from glm_image.devices.budget import check_budget
from glm_image.devices.exhaustion import Lack, within_memory
from glm_image.devices.select import named_dtype, open_device, placement

__all__ = [
    "Device",
    "Lack",
    "Mark",
    "Memory",
    "check_budget",
    "named_dtype",
    "open_device",
    "placement",
    "within_memory",
]
