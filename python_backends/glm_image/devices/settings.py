"""Settings of an engine that concern its device. Imports no torch: they are read before a stage chooses its devices."""

from __future__ import annotations

from dataclasses import dataclass, field

from glm_image.request.declaration import choice, share


@dataclass(frozen=True)
class DeviceSettings:
    """How an engine uses its device; the metadata of each field says what it means."""

    dtype: str = field(
        default="auto",
        metadata=choice(
            "Data type of weights and activations. `auto` is bfloat16 on accelerators and float32 on the CPU.",
            "auto",
            "float32",
            "bfloat16",
        ),
    )
    memory_utilization: float = field(
        default=0.9,
        metadata=share(
            "Share of a device's memory that the stage may use. A stage that needs more is refused before it is "
            "loaded, with the parameters to lower. Stages on the same device share 1."
        ),
    )
