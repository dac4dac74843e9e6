"""Memory of the instances of a profile, for the published sizes in bf16, and the shares of devices they may use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from glm_image.config.profiles import Profile, StageLayout
from glm_image.config.schema import AR_PARAMETERS, DIT_PARAMETERS, ParameterSpec
from glm_image.devices.placement import Entry
from glm_image.request.geometry import Size
from glm_image.sizing.memory import PUBLISHED, StageMemory, ar_memory, dit_memory

DTYPE: Final = "bfloat16"


@dataclass(frozen=True)
class InstanceMemory:
    """An instance of a stage in a profile.

    Attributes:
        devices: those that it spans.
        memory: needed on each of them.
        share: the share of each device that the instance may use (``memory_utilization``).
    """

    devices: Entry
    memory: StageMemory
    share: float

    def fits(self, gigabytes: float) -> bool:
        """Returns whether devices of that many GB (10^9 bytes) leave the instance enough with its share."""
        return self.memory.total <= self.share * gigabytes * 1e9


def profile_memory(profile: Profile, size: Size) -> list[InstanceMemory]:
    """Returns the memory of every instance of a profile that generates images of a size."""
    return [*_instances(profile.ar, AR_PARAMETERS, size), *_instances(profile.dit, DIT_PARAMETERS, size)]


def device_bytes(profile: Profile, size: Size) -> dict[str, int]:
    """Returns the memory that all instances of a profile need on each of its devices."""
    needed = dict.fromkeys(profile.devices, 0)
    for instance in profile_memory(profile, size):
        for device in instance.devices:
            needed[device] += instance.memory.total
    return needed


def _instances(layout: StageLayout, specs: tuple[ParameterSpec, ...], size: Size) -> Iterator[InstanceMemory]:
    values = {spec.name: spec.default for spec in specs} | layout.values()
    quantized = values["quantization"] != "none"
    for entry in layout.entries:
        if specs is AR_PARAMETERS:
            slots, positions = int(values["max_num_seqs"]), int(values["max_sequence_tokens"])
            memory = ar_memory(PUBLISHED, DTYPE, slots, positions, int8=quantized, ranks=len(entry))
        else:
            memory = dit_memory(PUBLISHED, DTYPE, size, quantized=quantized)
        yield InstanceMemory(entry, memory, float(values["memory_utilization"]))
