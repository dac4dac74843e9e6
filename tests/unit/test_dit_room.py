"""When an instance of the DiT takes another request out of Triton's queue."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_image.ipc.server import IpcServer
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.dit_load import TOPIC, DitLoadReporter
from glm_image.lifecycle.dit_room import DitRoom
from glm_image.request.stages import Stage

WAIT_SECONDS = 30


class Instance:
    """An instance without an engine."""

    def __init__(self, index: int, instances: int, folder: Path | None, most: int = 3) -> None:
        self.server, name = IpcServer(), f"glm_dit_{index}"
        self.reporter = DitLoadReporter(name, self.server.publish)
        if folder is not None:
            self.server.start(folder, name, {}, lambda topic, is_there: self.reporter.publish_load())
        self.room = DitRoom(most, self.reporter, name, instances, folder)

    def begin(self, images: int = 1) -> RequestContext:
        context = RequestContext(num_images=images, observers=(self.reporter,))
        context.start(Stage.DIT_QUEUE)
        return context

    def close(self) -> None:
        self.room.close()
        self.server.close()


@pytest.fixture
def alone() -> Iterator[Instance]:
    made = Instance(0, 1, None)
    yield made
    made.close()


def test_an_instance_holds_as_many_requests_as_it_may(alone: Instance) -> None:
    contexts = [alone.begin() for _ in range(2)]
    assert alone.room.has_room()
    contexts.append(alone.begin())
    assert not alone.room.has_room()
    waiting = threading.Thread(target=alone.room.wait)
    waiting.start()
    contexts[0].add_seconds(Stage.DENOISE, 1.0)
    assert not alone.room.has_room(), "its images are still to be decoded and encoded"
    contexts[0].finish()
    waiting.join(WAIT_SECONDS)
    assert not waiting.is_alive()


def test_without_ipc_several_instances_denoise_one_request_each() -> None:
    instance = Instance(0, 2, None)
    context = instance.begin()
    assert not instance.room.has_room()
    context.add_seconds(Stage.DENOISE, 1.0)
    assert instance.room.has_room(), "the next request is denoised while this one is encoded"
    instance.close()


def test_an_instance_leaves_requests_to_those_that_have_fewer(tmp_path: Path) -> None:
    first, second = (Instance(index, 2, tmp_path) for index in range(2))
    held = first.begin(images=8)
    assert not first.room.has_room(), "nothing is known of the other instance, or it is idle"
    waiting = threading.Thread(target=first.room.wait)
    waiting.start()
    assert second.room.has_room()
    other = second.begin()
    waiting.join(WAIT_SECONDS)
    assert not waiting.is_alive(), "both have one request"
    more = first.begin()
    assert not first.room.has_room()
    more.finish()
    assert first.room.has_room()
    waiting = threading.Thread(target=second.room.wait)
    waiting.start()
    waiting.join(WAIT_SECONDS)
    other.finish()
    first.room.update({"instance": "glm_dit_1", "requests": []})
    assert not first.room.has_room(), "the other one is idle again"
    held.finish()
    assert first.room.has_room()
    assert TOPIC
    for instance in (first, second):
        instance.close()
