"""Profiles: layouts of both stages over a machine's devices, selected by ``serve --profile NAME``.

``glm_image.config.pbtxt`` writes them into ``configs/NAME.pbtxt`` of both stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from glm_image.devices.placement import Entry, parse_devices

HOUR_MS: Final = 3_600_000


@dataclass(frozen=True)
class StageLayout:
    """A stage in a profile.

    Attributes:
        devices: the parameter ``devices``; each entry is one instance.
        parameters: other parameters that differ from their defaults.
        max_timeout_ms: the parameter of that name. An hour is several times what a full queue of usual requests takes.
    """

    devices: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    max_timeout_ms: int = HOUR_MS

    @property
    def entries(self) -> tuple[Entry, ...]:
        return parse_devices(self.devices)

    def values(self) -> dict[str, str]:
        """Returns the parameters that differ from their defaults, ``devices`` first."""
        return {"devices": self.devices, "max_timeout_ms": str(self.max_timeout_ms), **self.parameters}


@dataclass(frozen=True)
class Profile:
    """A layout of both stages, with one line for people.

    ``card_gigabytes`` is the memory, in 10^9 bytes, of the smallest common card on which 1024 x 1024 fits; 0 = host
    memory.
    """

    name: str
    meaning: str
    card_gigabytes: int
    ar: StageLayout
    dit: StageLayout

    @property
    def devices(self) -> tuple[str, ...]:
        """Every device of the profile, once."""
        entries = (*self.ar.entries, *self.dit.entries)
        return tuple(dict.fromkeys(device for entry in entries for device in entry))

    @property
    def is_quantized(self) -> bool:
        return any(layout.parameters.get("quantization", "none") != "none" for layout in (self.ar, self.dit))


def _devices(kind: str, first: int, last: int, separator: str) -> str:
    return separator.join(f"{kind}:{index}" for index in range(first, last + 1))


def _multi_card(kind: str) -> tuple[Profile, ...]:
    first, seven = StageLayout(f"{kind}:0"), StageLayout(_devices(kind, 1, 7, ";"))
    ar = StageLayout(_devices(kind, 0, 3, ","))
    dit = StageLayout(_devices(kind, 4, 7, ","), {"parallel": "cfg=2,ulysses=2"})
    return (
        Profile(f"{kind}-2", "one card for each stage", 32, first, StageLayout(f"{kind}:1")),
        Profile(f"{kind}-8", "one AR instance feeds seven DiT instances: highest throughput", 32, first, seven),
        Profile(f"{kind}-8-latency", "each stage on four cards: lowest latency of a single image", 32, ar, dit),
    )


def _one_card(name: str, meaning: str, gigabytes: int, ar: Mapping[str, str], dit: Mapping[str, str]) -> Profile:
    device = f"{name.partition('-')[0]}:0"
    gathered = {**ar, "admission": "gathered"}  # the stages compete for the card: batches of the AR cost the DiT less
    return Profile(name, meaning, gigabytes, StageLayout(device, gathered), StageLayout(device, dit))


def _shares(ar: str, dit: str) -> tuple[dict[str, str], dict[str, str]]:
    return {"memory_utilization": ar}, {"memory_utilization": dit}


_INT8 = {"quantization": "int8"}

_HOST = StageLayout("cpu", max_timeout_ms=24 * HOUR_MS)  # the published model takes hours there

PROFILES: Final = {
    profile.name: profile
    for profile in (
        Profile("cpu", "both stages on the host's cores", 0, _HOST, _HOST),
        _one_card(
            "npu-1x32g",
            "both stages on one card, with int8 weights, fewer and shorter sequences",
            32,
            {"memory_utilization": "0.45", "max_num_seqs": "4", "max_sequence_tokens": "4096", **_INT8},
            {"memory_utilization": "0.49", **_INT8},
        ),
        _one_card("npu-1x64g", "both stages on one card", 64, *_shares("0.4", "0.5")),
        *_multi_card("npu"),
        _one_card("cuda-1x80g", "both stages on one card", 80, *_shares("0.35", "0.55")),
        *_multi_card("cuda"),
    )
}
