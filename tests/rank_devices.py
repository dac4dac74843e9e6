"""The devices of the ranks of a test: GPUs where there are any, otherwise the CPU."""

from __future__ import annotations

import pytest
import torch


def rank_devices(ranks: int) -> tuple[str, ...]:
    """Returns a device for each rank; skips the test where there are GPUs, but fewer than ranks.

    NCCL takes no two ranks of a group on one GPU.
    """
    if not torch.cuda.is_available():
        return ("cpu",) * ranks
    require_gpus(ranks)
    return tuple(f"cuda:{rank}" for rank in range(ranks))


def require_gpus(count: int) -> None:
    """Skips the test where there are fewer GPUs."""
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs, one for each rank; this machine has {torch.cuda.device_count()}")
