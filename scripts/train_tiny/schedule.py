"""Which stage is trained when and where: each as soon as what it needs is done and a device is free."""

from __future__ import annotations

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


def train_all(
    train: Callable[[str, str], None], devices: Sequence[str], needs: Mapping[str, tuple[str, ...]] = NEEDS
) -> None:
    """Trains all stages; begins none after one that failed, whose error it raises when those under way have ended.

    Args:
        train: trains a stage on a device, and returns when it is done.
        devices: each trains one stage at a time.
        needs: see ``NEEDS``.
    """
    waiting, done, free = list(needs), set[str](), list(devices)
    running: dict[Future[None], tuple[str, str]] = {}
    with ThreadPoolExecutor(len(devices)) as threads:
        while waiting or running:
            ready = [stage for stage in waiting if done.issuperset(needs[stage])]
            for stage, device in zip(ready, list(free), strict=False):
                waiting.remove(stage)
                free.remove(device)
                running[threads.submit(train, stage, device)] = stage, device
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                stage, device = running.pop(ended)
                ended.result()
                done.add(stage)
                free.append(device)
