"""How the first stage runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ArSettings:
    """How the first stage runs.

    Attributes:
        dtype: None = the device's default.
        max_num_seqs: sequences that decode together.
        max_sequence_tokens: prompt and image tokens of one sequence.
        max_queue: requests that may wait.
        graph_mode: ``NONE``, ``FULL_DECODE_ONLY``, or ``FULL``, which runs as the latter.
        graph_capture_sizes: sequences of the captured step; () = max_num_seqs, the only size there is.
        memory_utilization: share of the device's memory this stage may use.
        peer_memory: whether the ranks of an instance on several devices write each other's memory, where these can.
        int8: whether the decoder's linear layers keep int8 weights.
    """

    dtype: torch.dtype | None = None
    max_num_seqs: int = 8
    max_sequence_tokens: int = 8192
    max_queue: int = 64
    graph_mode: str = "FULL_DECODE_ONLY"
    graph_capture_sizes: tuple[int, ...] = ()
    memory_utilization: float = 0.9
    peer_memory: bool = True
    int8: bool = False
