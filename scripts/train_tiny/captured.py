"""Training steps as captured CUDA graphs.

At these sizes a step is thousands of launches, which take longer than the computation. Batches of one kind use the same
kernels and memory, so each kind is captured once and replayed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RUNS_BEFORE = 2
"""Uncaptured runs of each kind, which compile and allocate persistent state."""


class Captured:
    """A computation that is captured and replayed on a GPU, and run directly elsewhere.

    Args:
        compute: computes a step for a kind of batch on the device, without host data or synchronization, updating
            state in place. Each replay uses new random numbers.
        device: the device; calls are made within ``own_stream``.
    """

    def __init__(self, compute: Callable[[Hashable], Tensor], device: torch.device) -> None:
        self._compute, self._device, self._captures = compute, device, device.type == "cuda"
        self._runs: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # Replays are sequential, so all graphs share one memory pool.
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None

    def __call__(self, kind: Hashable) -> Tensor:
        """Computes a step; the result is valid until the next."""
        if kind not in self._graphs:
            self._runs[kind] += 1
            if not self._captures or self._runs[kind] <= RUNS_BEFORE:
                return self._compute(kind)
            self._graphs[kind] = self._captured(kind)
        graph, result = self._graphs[kind]
        graph.replay()
        return result

    def _captured(self, kind: Hashable) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # A capture needs as much memory as the runs before it, whose cached blocks are in another pool. They are freed
        # only if the free memory is smaller, since the next runs allocate them again.
        if torch.cuda.mem_get_info(self._device)[0] < torch.cuda.memory_reserved(self._device):
            torch.cuda.empty_cache()
        graph.capture_begin(pool=self._pool)
        try:
            result = self._compute(kind)
        finally:
            graph.capture_end()
        return graph, result


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Runs the block on a capturable stream: gradients are tied to the stream on which they were first computed."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
    torch.cuda.synchronize(device)
