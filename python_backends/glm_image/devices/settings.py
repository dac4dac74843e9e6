"""Settings of an engine that concern its device. Imports no torch: they are read before a stage chooses its devices."""

from __future__ import annotations

from dataclasses import dataclass

from glm_image.request.declaration import choice, share


@dataclass(frozen=True)
class DeviceSettings:
    """How an engine uses its device."""

    dtype: str = choice(
        "auto",
        ("auto", "float32", "bfloat16"),
        "Data type of weights and activations. `auto` is bfloat16 on accelerators and float32 on the CPU.",
    )
    memory_utilization: float = share(
        0.9,
        "Share of a device's memory that the stage may use. A stage that needs more is refused before it is loaded, "
        "with the parameters to lower. The shares of stages on the same device add up to at most 1.",
    )
