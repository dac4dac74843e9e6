"""Memory of the instances of a profile, for the published sizes in bf16, and the shares of devices they may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from glm_image.ar.settings import ArSettings, captured_rows
from glm_image.config.profiles import Profile
from glm_image.devices.placement import Entry
from glm_image.dit.settings import DitSettings
from glm_image.request.declaration import read
from glm_image.request.geometry import Size
from glm_image.sizing.memory import PUBLISHED, StageMemory, ar_memory, dit_memory

DTYPE: Final = "bfloat16"


@dataclass(frozen=True)
class InstanceMemory:
    """An instance of a stage in a profile: the memory it needs on each device, and the share of it that it may use."""

    devices: Entry
    memory: StageMemory
    share: float

    def fits(self, gigabytes: float) -> bool:
        """Returns whether devices of that many GB (10^9 bytes) have enough."""
        return self.memory.total <= self.share * gigabytes * 1e9


def profile_memory(profile: Profile, size: Size) -> list[InstanceMemory]:
    """Returns the memory of every instance of a profile that generates images of a size."""
    ar, dit = read(ArSettings, profile.ar.values()), read(DitSettings, profile.dit.values())
    slots, positions = ar.max_num_seqs, ar.max_sequence_tokens
    rows = max(captured_rows(ar, is_host=profile.ar.entries[0][0].partition(":")[0] == "cpu"), default=0)
    instances = []
    for entry in profile.ar.entries:
        memory = ar_memory(PUBLISHED, DTYPE, slots, positions, int8=ar.int8, ranks=len(entry), rows=rows)
        instances.append(InstanceMemory(entry, memory, ar.memory_utilization))
    memory = dit_memory(PUBLISHED, DTYPE, size, quantized=dit.quantization != "none")
    return [*instances, *(InstanceMemory(entry, memory, dit.memory_utilization) for entry in profile.dit.entries)]


def device_bytes(profile: Profile, size: Size) -> dict[str, int]:
    """Returns the memory that all instances of a profile need on each of its devices."""
    needed = dict.fromkeys(profile.devices, 0)
    for instance in profile_memory(profile, size):
        for device in instance.devices:
            needed[device] += instance.memory.total
    return needed
