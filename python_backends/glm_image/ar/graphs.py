"""Which part of the AR is captured as a graph; the modes have vLLM's names."""

from __future__ import annotations

import logging
from typing import Final

from glm_image.errors import ConfigurationError

logger = logging.getLogger(__name__)

GRAPH_MODES: Final = ("NONE", "FULL_DECODE_ONLY", "FULL")

WHY_NOT_PIECEWISE: Final = "the decode step has no part that must stay outside a graph, so it is captured whole"


def captured(mode: str, sizes: tuple[int, ...], max_num_seqs: int) -> bool:
    """Returns whether the decode step is captured, for a batch of ``max_num_seqs``.

    Args:
        mode: one of ``GRAPH_MODES``. ``FULL`` means ``FULL_DECODE_ONLY``, which is logged.
        sizes: batch sizes to capture; () = max_num_seqs.
        max_num_seqs: sequences that decode together.

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
