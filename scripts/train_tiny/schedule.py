"""Which stage is trained when and where: each as soon as what it needs is done and a device is free."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

NEEDS: Mapping[str, tuple[str, ...]] = {
    "vision": (),
    "vae": (),
    "painter": ("vae", "vision"),
    "writer": ("vision",),
    "editor": ("painter",),
}
"""Of each stage, those that are done before; in the order in which they are begun where several can be."""


class Schedule:
    """Deals stages out to devices.

    Args:
        train: trains a stage on a device, and returns when it is done.
        needs: see ``NEEDS``.
    """

    def __init__(self, train: Callable[[str, str], None], needs: Mapping[str, tuple[str, ...]] = NEEDS) -> None:
        self._train, self._needs = train, needs
        self._waiting, self._done = list(needs), set[str]()
        self._failed = False
        self._changed = threading.Condition()

    def run(self, devices: Sequence[str]) -> None:
        """Returns when all stages are done; begins none after one that failed, whose error it raises."""
        with ThreadPoolExecutor(len(devices)) as threads:
            for ended in [threads.submit(self._work, device) for device in devices]:
                ended.result()

    def _work(self, device: str) -> None:
        while (stage := self._next()) is not None:
            try:
                self._train(stage, device)
            except BaseException:
                with self._changed:
                    self._failed = True
                    self._changed.notify_all()
                raise
            with self._changed:
                self._done.add(stage)
                self._changed.notify_all()

    def _next(self) -> str | None:
        with self._changed:
            while self._waiting and not self._failed:
                ready = [stage for stage in self._waiting if self._done.issuperset(self._needs[stage])]
                if ready:
                    self._waiting.remove(ready[0])
                    return ready[0]
                self._changed.wait()
            return None
