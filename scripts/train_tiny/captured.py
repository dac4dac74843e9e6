"""Training steps as captured CUDA graphs.

At these sizes a step is thousands of launches, which take the host longer than their work takes the GPU. Batches of one
kind do the same to the same memory, so that they are captured once and replayed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

RUNS_BEFORE = 2
"""Of a kind, before it is captured: they compile, and make what is kept from step to step."""


class Captured:
    """A computation that is replayed on a GPU, and run as it is elsewhere.

    Args:
        compute: does a step for a kind of batch, on the device alone: it takes nothing from the host, waits for
            nothing, and keeps what it keeps in place. Random numbers are new ones in each replay.
        device: where it is computed, within ``own_stream``.
    """

    def __init__(self, compute: Callable[[Hashable], Tensor], device: torch.device) -> None:
        self._compute, self._device, self._captures = compute, device, device.type == "cuda"
        self._runs: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        # Replays follow one another, so that all graphs can work in the same memory.
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None

    def __call__(self, kind: Hashable) -> Tensor:
        """Does a step; what it returns holds until the next."""
        if kind not in self._graphs:
            self._runs[kind] += 1
            if not self._captures or self._runs[kind] <= RUNS_BEFORE:
                return self._compute(kind)
            self._graphs[kind] = self._captured(kind)
        graph, made = self._graphs[kind]
        graph.replay()
        return made

    def _captured(self, kind: Hashable) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # A capture takes no more than the runs before it did. What they left in the allocator's other pool is not to be
        # had for the graphs' own; it is given back where less is free, not always, as the next runs take it again.
        if torch.cuda.mem_get_info(self._device)[0] < torch.cuda.memory_reserved(self._device):
            torch.cuda.empty_cache()
        graph.capture_begin(pool=self._pool)
        try:
            made = self._compute(kind)
        finally:
            graph.capture_end()
        return graph, made


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Works on a stream on which graphs can be captured: gradients remember the stream that they were first made on."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
    torch.cuda.synchronize(device)
