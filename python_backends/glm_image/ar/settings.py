"""Settings of the AR engine. Imports no torch: they are read before a stage chooses its devices."""

from __future__ import annotations

from dataclasses import dataclass

from glm_image.ar.graphs import GRAPH_MODES, WHY_NOT_PIECEWISE
from glm_image.devices.settings import DeviceSettings
from glm_image.request.declaration import choice, whole, whole_numbers


@dataclass(frozen=True)
class ArSettings(DeviceSettings):
    """How the AR engine runs.

    Attributes:
        peer_memory: whether the ranks of an instance on several devices write each other's memory where they can.
    """

    quantization: str = choice("none", ("none", "int8"), "`int8` stores the decoder's linear layers as int8 weights.")
    max_num_seqs: int = whole(8, "Sequences that decode together; each image is one sequence.", low=1)
    max_sequence_tokens: int = whole(8192, "Prompt, source and image tokens of a sequence.", low=1)
    max_queue: int = whole(64, "Requests that may wait for a slot; further requests get UNAVAILABLE.", low=1)
    graph_mode: str = choice(
        "FULL_DECODE_ONLY",
        GRAPH_MODES,
        "Whether the decode step is captured as a device graph at load; the CPU has no graphs and runs the same step. "
        "`FULL` runs as `FULL_DECODE_ONLY`: prompts differ in length, so prefill is eager.",
        {"PIECEWISE": WHY_NOT_PIECEWISE},
    )
    graph_capture_sizes: tuple[int, ...] = whole_numbers(
        (),
        "Batch sizes to capture: empty or `max_num_seqs`. Other sizes are refused: a request's tokens would depend on "
        "the number of concurrent sequences.",
    )
    peer_memory: bool = True

    @property
    def int8(self) -> bool:
        """Whether the decoder's linear layers have int8 weights."""
        return self.quantization == "int8"
