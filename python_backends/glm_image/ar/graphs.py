"""How much of the first stage is captured as a graph, in the words that other servers use for it."""

from __future__ import annotations

import logging
from typing import Final

from glm_image.errors import ConfigurationError

logger = logging.getLogger(__name__)

GRAPH_MODES: Final = ("NONE", "FULL_DECODE_ONLY", "FULL")

WHY_NOT_PIECEWISE: Final = "the decode step has no part that must stay outside a graph, so it is captured whole"


def captured(mode: str, sizes: tuple[int, ...], max_num_seqs: int) -> bool:
    """Returns whether the decode step is to be captured, for a batch of ``max_num_seqs``.

    Args:
        mode: one of ``GRAPH_MODES``. ``FULL`` is told to the log to be ``FULL_DECODE_ONLY``.
        sizes: batch sizes to capture; () = max_num_seqs.
        max_num_seqs: sequences that decode together.

    Raises:
        ConfigurationError: another mode, or other sizes than the one of every step.
    """
    if mode not in GRAPH_MODES:
        raise ConfigurationError(f"graph_mode is {mode!r}; allowed: {', '.join(GRAPH_MODES)}")
    if sizes not in {(), (max_num_seqs,)}:
        raise ConfigurationError(
            f"graph_capture_sizes is {','.join(map(str, sizes))!r}; allowed: {max_num_seqs}, which is max_num_seqs, "
            "or left empty: every step runs at that one size, because kernels for other sizes round differently, "
            "and a request's tokens would depend on how many run beside it"
        )
    if mode == "FULL":
        logger.info("graph_mode FULL runs as FULL_DECODE_ONLY: prompts differ in length, so they are read eagerly")
    return mode != "NONE"
