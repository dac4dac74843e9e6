"""Measures the memory of live tensors, for tests of the memory model."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def allocated_peak(run: Callable[[], object]) -> int:
    """Returns the highest number of bytes that the CPU's allocator holds while ``run`` runs, beyond those before.

    Unlike ``LiveBytes`` it includes workspaces that operators allocate.
    """
    gc.collect()  # a collection meanwhile would count as memory freed by it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    recorded = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators return, as long as they are alive.

    On the meta device it measures the published sizes without memory or computation.

    Attributes:
        peak: the highest number of bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(returned):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in self._live:
                self._live[key] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self._live.pop, key)
        self.peak = max(self.peak, sum(self._live.values()))
        return returned
