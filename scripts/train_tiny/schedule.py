"""Which stage is trained when and where: each as soon as what it needs is done and a device is free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

NEEDS: Mapping[str, tuple[str, ...]] = {
    "vision": (),
    "vae": (),
    "painter": ("vae", "vision"),
    "writer": ("vision",),
    "editor": ("painter",),
    "reviser": ("writer",),
}
"""Of each stage, those that are done before; in the order in which they are begun where several can be."""
ATTEMPTS = 2
"""At a stage: it goes on from what was saved, and what made it fail may not come again, as when compiling hangs."""


def train_all(
    train: Callable[[str, str], None], devices: Sequence[str], needs: Mapping[str, tuple[str, ...]] = NEEDS
) -> None:
    """Trains all stages; begins none after one that failed ``ATTEMPTS`` times.

    Its error is raised when those under way have ended.

    Args:
        train: trains a stage on a device, and returns when it is done.
        devices: each trains one stage at a time.
        needs: see ``NEEDS``.
    """
    waiting, done, free = list(needs), set[str](), list(devices)
    running: dict[Future[None], tuple[str, str]] = {}
    begun = Counter[str]()
    with ThreadPoolExecutor(len(devices)) as threads:
        while waiting or running:
            ready = [stage for stage in waiting if done.issuperset(needs[stage])]
            for stage, device in zip(ready, list(free), strict=False):
                waiting.remove(stage)
                free.remove(device)
                begun[stage] += 1
                running[threads.submit(train, stage, device)] = stage, device
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                stage, device = running.pop(ended)
                free.append(device)
                if ended.exception() and begun[stage] < ATTEMPTS:
                    waiting.insert(0, stage)
                else:
                    ended.result()
                    done.add(stage)
