from __future__ import annotations

from server.conftest import same_threads, tiny_checkpoint, triton

__all__ = ["same_threads", "tiny_checkpoint", "triton"]
