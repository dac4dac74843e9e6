"""IPC servers in this process, called and subscribed to through their real sockets."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from glm_image.ar.sequence import Request, Running, report_progress
from glm_image.errors import InvalidInputError
from glm_image.ipc.client import EventListener, call
from glm_image.ipc.protocol import Message, instance_sockets, key_of
from glm_image.ipc.server import IpcServer
from glm_image.lifecycle.context import NANOSECONDS, RequestContext
from glm_image.lifecycle.control import control
from glm_image.lifecycle.registry import RequestRegistry, RequestState
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, Sampling
from glm_image.request.stages import Stage

SECONDS = 10.0


class Instance:
    """A model instance: its request registry and its IPC server."""

    def __init__(self, folder: Path, name: str, outcome: RequestState) -> None:
        self.first_stage = Stage.AR_QUEUE if outcome == RequestState.FORWARDED else Stage.CONDITION
        self.server = IpcServer()
        self.registry = RequestRegistry(outcome, self.server.publish)
        self.listened, self.left = threading.Event(), threading.Event()
        self.preview: Future[Message] = Future()
        self.server.start(
            folder,
            name,
            {
                "cancel": lambda request: Message({"requests": self.registry.cancel(**_fields(request))}),
                "status": lambda request: Message({"requests": self.registry.status(_fields(request)["request_id"])}),
                "preview": lambda request: self.preview,
                "fault": lambda request: Message({"never": 1 / 0}),
            },
            self._on_listener,
        )

    def start(self, context: RequestContext) -> None:
        context.add_observer(self.registry)
        context.start(self.first_stage)

    def _on_listener(self, key: bytes, listens: bool) -> None:
        (self.registry.watch if listens else self.registry.unwatch)(key)
        (self.listened if listens else self.left).set()


def _fields(request: Message) -> dict[str, object]:
    return {name: value for name, value in request.fields.items() if name != "action"}


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[tuple[Instance, Instance]]:
    instances = (
        Instance(tmp_path, "glm_ar_0", RequestState.FORWARDED),
        Instance(tmp_path, "glm_dit_0", RequestState.FINISHED),
    )
    yield instances
    for stage in instances:
        stage.server.close()
    assert list(tmp_path.iterdir()) == []


def test_status_follows_a_request_from_stage_to_stage(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    ar, dit = stages
    states = []

    def record() -> None:
        reply = control(tmp_path, "mine", "status")
        states.append((reply["state"], *(entry["stage"] for entry in reply["requests"])))

    context = RequestContext(id="mine")
    record()
    ar.start(context)
    record()
    context.report(Stage.DECODE, 3, 9)
    record()
    context.finish(None)
    record()
    dit_context = RequestContext(id="mine", arrived_ns=context.arrived_ns)
    dit.start(dit_context)
    dit_context.report(Stage.DENOISE, 1, 4, 0.5)
    record()
    assert control(tmp_path, "mine", "status")["requests"][0]["sigma"] == 0.5
    dit_context.finish(None)
    record()
    assert states == [
        ("unknown",),
        ("queued", "ar_queue"),
        ("running", "decode"),
        ("queued", "dit_queue"),
        ("running", "denoise"),
        ("finished", "denoise"),
    ]
    assert control(tmp_path, "mine", "cancel")["state"] == "finished"


def test_seconds_of_a_request_between_the_stages_go_on(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    ar, _ = stages
    context = RequestContext(id="mine")
    ar.start(context)
    context.finish(None)
    finished = time.monotonic_ns()
    while time.monotonic_ns() < finished + 5_000_000:
        pass
    (request,) = control(tmp_path, "mine", "status")["requests"]
    assert request["stage"] == "dit_queue"
    assert request["seconds"] >= round((finished + 5_000_000 - context.arrived_ns) / NANOSECONDS, 3)


def test_sockets_of_an_instance_that_is_loaded_again_stay(tmp_path: Path) -> None:
    former, again = IpcServer(), IpcServer()
    former.start(tmp_path, "glm_ar_0", {})
    again.start(tmp_path, "glm_ar_0", {"ask": lambda _: Message({"answer": "here"})})
    former.close()
    replies = call(instance_sockets(tmp_path), Message({"action": "ask"}), 30)
    assert replies.replies["glm_ar_0"].fields == {"answer": "here"}
    again.close()
    assert list(tmp_path.iterdir()) == []


def test_cancel_between_the_stages_reaches_the_second(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    ar, dit = stages
    context = RequestContext(id="mine")
    ar.start(context)
    context.finish(None)
    assert control(tmp_path, "mine", "cancel")["cancelled"] == 1
    assert control(tmp_path, "mine", "status")["state"] == "cancelled"
    assert control(tmp_path, "mine", "cancel")["state"] == "already_cancelled"
    late, reused = RequestContext(id="mine", arrived_ns=context.arrived_ns), RequestContext(id="mine")
    dit.start(reused)
    with pytest.raises(Exception, match="request mine was cancelled") as ended:
        dit.start(late)
    late.finish(ended.value)
    reused.check()
    reply = control(tmp_path, "mine", "status")
    assert [entry["state"] for entry in reply["requests"]] == ["cancelled", "running"]
    assert reply["state"] == "running"


def test_listener_receives_the_events_of_one_request_from_its_present_state(
    stages: tuple[Instance, Instance], tmp_path: Path
) -> None:
    ar, _ = stages
    context, other = RequestContext(id="mine"), RequestContext(id="mine too")
    for started in (context, other):
        ar.start(started)
        started.report(Stage.DECODE, 1, 3)  # before anyone listens
    with EventListener(tmp_path, "mine") as listener:
        assert ar.listened.wait(SECONDS)
        other.report(Stage.DECODE, 2, 3)
        context.report(Stage.DECODE, 2, 3)
        context.finish(None)
        events = []
        while not events or events[-1]["state"] != "forwarded":
            events += list(listener.events(SECONDS))
    assert [(event["stage"], event["done"]) for event in events] == [("decode", 1), ("decode", 2), ("decode", 2)]


def test_publish_without_subscriber_builds_no_event(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    ar, _ = stages

    def make() -> dict[str, object]:
        raise AssertionError("an event without a subscriber")

    ar.server.publish(key_of("mine"), make)
    with EventListener(tmp_path, "another"):
        assert ar.listened.wait(SECONDS)
        ar.server.publish(key_of("mine"), make)


def test_event_is_built_in_the_servers_thread_and_a_faulty_one_is_dropped(
    stages: tuple[Instance, Instance], tmp_path: Path
) -> None:
    ar, _ = stages
    with EventListener(tmp_path, "mine") as listener:
        assert ar.listened.wait(SECONDS)
        ar.server.publish(key_of("mine"), lambda: {"never": 1 / 0})
        ar.server.publish(key_of("mine"), lambda: {"made_in": threading.current_thread().name})
        assert next(listener.events(SECONDS)) == {"made_in": "ipc"}


def test_slow_listener_delays_neither_engine_nor_calls(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    """A listener that does not read loses events."""
    ar, _ = stages
    with EventListener(tmp_path, "mine"):
        assert ar.listened.wait(SECONDS)
        context = RequestContext(id="mine")
        ar.start(context)
        for done in range(30_000):
            context.report(Stage.DECODE, done, 30_000)
        assert control(tmp_path, "mine", "status")["requests"][0]["done"] == 29_999


def test_reply_may_come_later_and_carry_bytes(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    _, dit = stages
    threading.Timer(0.05, lambda: dit.preview.set_result(Message({"size": [1, 2]}, [b"\0pixels"]))).start()
    sockets = instance_sockets(tmp_path, "glm_dit")
    (reply,) = call(sockets, Message({"action": "preview"}, [b"tokens"]), SECONDS).replies.values()
    assert (reply.fields, reply.parts) == ({"size": [1, 2]}, [b"\0pixels"])


@pytest.mark.parametrize("action", ["fault", "no such"])
def test_handler_error_is_the_reply_and_the_server_goes_on(
    stages: tuple[Instance, Instance], tmp_path: Path, action: str
) -> None:
    replies = call(instance_sockets(tmp_path), Message({"action": action}), SECONDS).replies
    assert {name: bool(reply.fields["error"]) for name, reply in replies.items()} == {
        "glm_ar_0": True,
        "glm_dit_0": True,
    }
    assert control(tmp_path, "mine", "status")["state"] == "unknown"


def test_killed_instance_is_reported_and_can_be_replaced(
    stages: tuple[Instance, Instance], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import os, sys, pathlib; from glm_image.ipc.server import IpcServer; "
        "IpcServer().start(pathlib.Path(sys.argv[1]), 'glm_dit_1', {}); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    assert (tmp_path / "glm_dit_1.control").exists()
    monkeypatch.setattr("glm_image.lifecycle.control.REPLY_SECONDS", 3600.0)  # it is not waited for
    assert control(tmp_path, "mine", "status")["silent"] == ["glm_dit_1"]
    again = Instance(tmp_path, "glm_dit_1", RequestState.FINISHED)
    assert "silent" not in control(tmp_path, "mine", "status")
    again.server.close()


def test_unusable_folder_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no socket at"):
        IpcServer().start(tmp_path / ("x" * 120), "glm_ar_0", {})


@pytest.mark.parametrize(("request_id", "action"), [("", "cancel"), ("mine", "stop")])
def test_invalid_call_is_refused(tmp_path: Path, request_id: str, action: str) -> None:
    with pytest.raises(InvalidInputError):
        control(tmp_path, request_id, action)


def test_progress_without_listener_costs_almost_nothing(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    ar, _ = stages
    parameters = GenerationParameters("a fox", height=256, width=256, seed=1)
    resolved = parameters.resolve(Limits(), Sampling(0.9, 0.75, 16384))
    running = [Running(Request(RequestContext(id=str(slot)), (), resolved, 0.0), 0, 9, 0.0) for slot in range(8)]
    for slot in running:
        ar.start(slot.request.context)
        slot.request.context.progress = slot.request.sampled.progress
    count = 5_000
    fastest = min(_seconds(lambda: report_progress(running), count) for _ in range(5))
    assert fastest / count < 0.0005 * 0.0063  # of a decode step of 6.3 ms
    with EventListener(tmp_path, "3") as listener:
        assert ar.listened.wait(SECONDS)
        running[3].request.sampled.done = 7
        report_progress(running)
        while (events := next(listener.events(SECONDS)))["done"] != 7:
            pass
        assert (events["stage"], events["total"]) == ("decode", running[3].request.sampled.total)
    assert ar.left.wait(SECONDS)
    assert [slot.request.context.is_watched for slot in running] == [False] * 8


def _seconds(call: Callable[[], None], count: int) -> float:
    """CPU time of the thread, so that other load does not count."""
    began = time.thread_time()
    for _ in range(count):
        call()
    return time.thread_time() - began
