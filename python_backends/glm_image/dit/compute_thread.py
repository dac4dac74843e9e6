"""The thread in which the DiT computes: requests have threads of their own, and only this one works on the device."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from glm_image.dit.commands import Decode
from glm_image.parallel.commands import Command

P = ParamSpec("P")
R = TypeVar("R")


class ComputeThread:
    """Runs calls one after the other, each caller waiting for its own.

    On a host, every thread that computes keeps a pool of threads for it (see ``Device.is_host``). On an accelerator the
    libraries keep a workspace for each.

    Args:
        is_host: whether this thread decodes too; otherwise the caller's thread does, concurrently with denoising.
    """

    def __init__(self, is_host: bool) -> None:
        self._is_host = is_host
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="dit-compute")

    def call(self, function: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        return self._thread.submit(function, *args, **options).result()

    def running(self, run: Callable[[Any], Any]) -> Callable[[Command[R]], R]:
        """Returns ``run``, which runs a command, in this thread."""

        def run_here(command: Command[R]) -> R:
            if isinstance(command, Decode) and not self._is_host:
                result: R = run(command)
            else:
                result = self.call(run, command)
            return result

        return run_here

    def close(self) -> None:
        self._thread.shutdown(wait=True)
