"""Whether an instance of the DiT takes another request out of Triton's queue."""

from __future__ import annotations

import threading
from pathlib import Path

from glm_image.ipc.protocol import Event
from glm_image.ipc.subscriber import Subscriber
from glm_image.lifecycle.dit_load import INSTANCES, TOPIC, DitLoadReporter


class DitRoom:
    """The requests that an instance may hold: at most ``most``, and none that another instance could begin sooner.

    Triton gives a waiting request to any instance that asks for one. So an instance that has images to denoise asks for
    another request only while every other instance has as many requests as itself. Without IPC it does not know the
    others, and holds one request at a time.

    Args:
        reporter: of this instance.
        name: of this instance.
        instances: how many instances the model has.
        folder: of the IPC sockets; None = there are none.
    """

    def __init__(self, most: int, reporter: DitLoadReporter, name: str, instances: int, folder: Path | None) -> None:
        self._most, self._reporter, self._name, self._others = most, reporter, name, instances - 1
        self._changed = threading.Condition()
        self._requests_of_others: dict[str, int] = {}
        reporter.when_changed(self._wake)
        self._subscriber = None
        if self._others and folder is not None:
            self._subscriber = Subscriber(folder, INSTANCES, TOPIC, self.update)

    def update(self, statement: Event) -> None:
        """Takes the statement of an instance about its load."""
        if statement["instance"] != self._name:
            with self._changed:
                self._requests_of_others[statement["instance"]] = sum(left > 0 for _, left in statement["requests"])
                self._changed.notify_all()

    def wait(self) -> None:
        """Blocks until the instance may take another request."""
        if self._subscriber is not None:
            self._subscriber.discover()
        with self._changed:
            self._changed.wait_for(self.has_room)

    def has_room(self) -> bool:
        images_left = self._reporter.images_left()
        if len(images_left) >= self._most:
            return False
        own = sum(left > 0 for left in images_left)
        if not own or not self._others:
            return True
        others = self._requests_of_others.values()
        return len(others) == self._others and min(others) >= own

    def close(self) -> None:
        if self._subscriber is not None:
            self._subscriber.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
