"""Layouts of both stages over a machine's devices, each declared once: ``serve --profile NAME`` takes one.

``configs.py`` writes them into ``configs/NAME.pbtxt`` of both stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from glm_image.devices.placement import Entry, parse_devices


@dataclass(frozen=True)
class StageLayout:
    """A stage in a profile.

    Attributes:
        devices: the parameter; there are as many instances as it has entries.
        parameters: others that differ from their defaults.
    """

    devices: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The devices of each instance."""
        return parse_devices(self.devices)

    def values(self) -> dict[str, str]:
        """Returns the parameters that differ from their defaults, ``devices`` first."""
        return {"devices": self.devices, **self.parameters}


@dataclass(frozen=True)
class Profile:
    """A layout of both stages.

    Attributes:
        name: what ``--profile`` takes.
        meaning: a line about it.
        card_gigabytes: the smallest usual card (10^9 bytes) on which 1024 x 1024 fits; 0 for the host's memory.
        ar: the first stage.
        dit: the second stage.
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
    def processes(self) -> int:
        """How many processes hold a model: one a device of an instance."""
        return sum(map(len, (*self.ar.entries, *self.dit.entries)))

    @property
    def is_quantized(self) -> bool:
        """Whether a stage keeps its weights in fewer bits."""
        return any(layout.parameters.get("quantization", "none") != "none" for layout in (self.ar, self.dit))


def _every(kind: str, first: int, last: int, between: str) -> str:
    return between.join(f"{kind}:{index}" for index in range(first, last + 1))


def _of_several_cards(kind: str) -> tuple[Profile, ...]:
    return (
        Profile(
            f"{kind}-2", "a stage a card", 32, StageLayout(f"{kind}:0"), StageLayout(f"{kind}:1")
        ),
        Profile(
            f"{kind}-8",
            "one first stage feeds seven second ones: most pictures a second",
            32,
            StageLayout(f"{kind}:0"),
            StageLayout(_every(kind, 1, 7, ";")),
        ),
        Profile(
            f"{kind}-8-latency",
            "each stage over four cards: soonest done with one picture",
            32,
            StageLayout(_every(kind, 0, 3, ",")),
            StageLayout(_every(kind, 4, 7, ","), {"parallel": "cfg=2,ulysses=2"}),
        ),
    )  # fmt: skip


def _one_card(name: str, meaning: str, gigabytes: int, ar: Mapping[str, str], dit: Mapping[str, str]) -> Profile:
    device = f"{name.partition('-')[0]}:0"
    gathered = {**ar, "admission": "gathered"}  # what the first stage takes of the card the second has not
    return Profile(name, meaning, gigabytes, StageLayout(device, gathered), StageLayout(device, dit))


def _shares(ar: str, dit: str) -> tuple[dict[str, str], dict[str, str]]:
    return {"memory_utilization": ar}, {"memory_utilization": dit}


_INT8 = {"quantization": "int8"}

PROFILES: Final = {
    profile.name: profile
    for profile in (
        Profile("cpu", "both stages on the host's cores", 0, StageLayout("cpu"), StageLayout("cpu")),
        _one_card(
            "npu-1x32g",
            "both stages on one card, with int8 weights and fewer sequences at once",
            32,
            {"memory_utilization": "0.49", "max_num_seqs": "4", **_INT8},
            {"memory_utilization": "0.45", **_INT8},
        ),
        _one_card("npu-1x64g", "both stages on one card", 64, *_shares("0.4", "0.5")),
        *_of_several_cards("npu"),
        _one_card("cuda-1x80g", "both stages on one card", 80, *_shares("0.35", "0.55")),
        *_of_several_cards("cuda"),
    )
}
"""Every profile by its name."""
