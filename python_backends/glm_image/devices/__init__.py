"""Where tensors live and steps run: one interface, with the CPU, CUDA and Ascend NPUs behind it."""

from glm_image.devices.base import Device, Mark
from glm_image.devices.select import named_dtype, open_device, placement

__all__ = ["Device", "Mark", "named_dtype", "open_device", "placement"]
