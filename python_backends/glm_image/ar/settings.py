"""Settings of the AR engine. Imports no torch: they are read before a stage chooses its devices."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from glm_image.ar.speculation import INT8_MAX_ROWS, MAX_ROWS, MAX_WINDOW, MIN_WINDOW, row_counts
from glm_image.devices.settings import DeviceSettings
from glm_image.errors import ConfigurationError
from glm_image.request.declaration import choice, whole, whole_numbers

logger = logging.getLogger(__name__)

GRAPH_MODES: Final = ("NONE", "FULL_DECODE_ONLY", "FULL")
"""Parts of the AR that are captured as a graph, by vLLM's names."""

WHY_NOT_PIECEWISE: Final = "the decode step has no part that must stay outside a graph, so it is captured whole"


@dataclass(frozen=True)
class ArSettings(DeviceSettings):
    """How the AR engine runs.

    Attributes:
        peer_memory: whether the ranks of an instance write each other's memory where they can.
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
        "the number of concurrent sequences. With `speculation`, the row counts of its steps, one of them at least "
        "`max_num_seqs`; empty: some up to 128.",
    )
    speculation: str = choice(
        "auto",
        ("auto", "none", "jacobi"),
        "`jacobi` guesses tokens and decodes several a step where guesses prove right: the same tokens in fewer steps. "
        "`auto` is `jacobi` on the CPU and `none` elsewhere.",
    )
    speculation_window: int = whole(
        16,
        "The most tokens of a sequence that a step of `jacobi` samples; it takes fewer where guesses prove wrong.",
        low=MIN_WINDOW,
        high=MAX_WINDOW,
    )
    peer_memory: bool = True

    def speculates(self, *, is_host: bool) -> bool:
        """Whether it decodes by ``jacobi``, on the CPU if ``is_host``."""
        return self.speculation == "jacobi" or (self.speculation == "auto" and is_host)

    @property
    def token_settings(self) -> dict[str, str]:
        """The settings that change tokens, as a file's record has them."""
        return {"quantization": self.quantization, "dtype": self.dtype}

    @property
    def int8(self) -> bool:
        return self.quantization == "int8"


def captured_rows(settings: ArSettings, *, is_host: bool) -> tuple[int, ...]:
    """Returns the row counts of steps of Jacobi decoding; () without speculation.

    Raises:
        ConfigurationError: ``graph_capture_sizes`` has a row count that is not allowed, or none for every slot.
    """
    if not settings.speculates(is_host=is_host):
        return ()
    sizes, slots = settings.graph_capture_sizes, settings.max_num_seqs
    most = max(MAX_ROWS, slots)
    if sizes and (min(sizes) < 1 or not slots <= max(sizes) <= most):
        raise ConfigurationError(
            f"graph_capture_sizes is {','.join(map(str, sizes))!r}; allowed with speculation: row counts from 1 to "
            f"{most}, one of them at least {slots}, which is max_num_seqs"
        )
    rows = INT8_MAX_ROWS if settings.int8 and not is_host else MAX_ROWS
    return row_counts(slots, settings.speculation_window, is_host=is_host, captured=sizes, most=rows)


def captured(mode: str, sizes: tuple[int, ...], max_num_seqs: int) -> bool:
    """Returns whether the decode step is captured; sizes () mean ``max_num_seqs``. ``FULL`` is logged.

    Raises:
        ConfigurationError: another mode, or a size other than ``max_num_seqs``.
    """
    if mode not in GRAPH_MODES:
        raise ConfigurationError(f"graph_mode is {mode!r}; allowed: {', '.join(GRAPH_MODES)}")
    if sizes not in {(), (max_num_seqs,)}:
        raise ConfigurationError(
            f"graph_capture_sizes is {','.join(map(str, sizes))!r}; allowed: {max_num_seqs}, which is max_num_seqs, "
            "or left empty: every step runs at that one size, because kernels for other sizes round differently, "
            "and a request's tokens would depend on how many others run"
        )
    if mode == "FULL":
        logger.info("graph_mode FULL runs as FULL_DECODE_ONLY: prompts differ in length, so they are read eagerly")
    return mode != "NONE"
