"""Nodes of the bus in this process, asked and listened to through their real sockets."""

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
from glm_image.ipc import EventListener, IpcServer, Message, call_all
from glm_image.ipc.protocol import key_of
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.control import REPLY_SECONDS, control
from glm_image.lifecycle.registry import RequestRegistry, RequestState
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters, Sampling
from glm_image.request.stages import Stage

SECONDS = 10.0


class Instance:
    """An instance's requests, and its node."""

    def __init__(self, folder: Path, name: str, outcome: RequestState) -> None:
        self.first_stage = Stage.AR_QUEUE if outcome == RequestState.FORWARDED else Stage.CONDITION
        self.registry = RequestRegistry(outcome)
        self.heard: list[bytes] = []
        self.listened, self.left = threading.Event(), threading.Event()
        self.preview: Future[Message] = Future()
        self.node = IpcServer(
            folder,
            name,
            {
                "cancel": lambda asked: Message({"requests": self.registry.cancel(**_fields(asked))}),
                "status": lambda asked: Message({"requests": self.registry.status(_fields(asked)["request_id"])}),
                "preview": lambda asked: self.preview,
                "fault": lambda asked: Message({"never": 1 / 0}),
            },
            self._on_listener,
        )
        self.registry.publish = self.node.publish

    def start(self, context: RequestContext) -> None:
        context.add_observer(self.registry)
        context.start(self.first_stage)

    def _on_listener(self, key: bytes, listens: bool) -> None:
        (self.registry.watch if listens else self.registry.unwatch)(key)
        (self.listened if listens else self.left).set()


def _fields(asked: Message) -> dict[str, object]:
    return {name: value for name, value in asked.fields.items() if name != "action"}


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[tuple[Instance, Instance]]:
    made = (
        Instance(tmp_path, "glm_ar_0", RequestState.FORWARDED),
        Instance(tmp_path, "glm_dit_0", RequestState.FINISHED),
    )
    yield made
    for stage in made:
        stage.node.close()
    assert list(tmp_path.iterdir()) == []


def test_a_request_is_followed_from_stage_to_stage(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    ar, dit = stages
    states = []

    def note() -> None:
        told = control(tmp_path, "mine", "status")
        states.append((told["state"], *(one["stage"] for one in told["requests"])))

    job = RequestContext(id="mine")
    note()
    ar.start(job)
    note()
    job.report(Stage.DECODE, 3, 9)
    note()
    job.finish(None)
    note()
    painted = RequestContext(id="mine", arrived_ns=job.arrived_ns)
    dit.start(painted)
    painted.report(Stage.DENOISE, 1, 4, 0.5)
    note()
    assert control(tmp_path, "mine", "status")["requests"][0]["sigma"] == 0.5
    painted.finish(None)
    note()
    assert states == [
        ("unknown",),
        ("queued", "ar_queue"),
        ("running", "decode"),
        ("queued", "dit_queue"),
        ("running", "denoise"),
        ("finished", "denoise"),
    ]
    assert control(tmp_path, "mine", "cancel")["state"] == "finished"


def test_a_cancel_between_the_stages_is_kept_for_the_second(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    ar, dit = stages
    job = RequestContext(id="mine")
    ar.start(job)
    job.finish(None)
    assert control(tmp_path, "mine", "cancel")["cancelled"] == 1
    assert control(tmp_path, "mine", "status")["state"] == "cancelled"
    assert control(tmp_path, "mine", "cancel")["state"] == "already_cancelled"
    late, reused = RequestContext(id="mine", arrived_ns=job.arrived_ns), RequestContext(id="mine")
    dit.start(reused)
    with pytest.raises(Exception, match="request mine was cancelled") as ended:
        dit.start(late)
    late.finish(ended.value)
    reused.check()
    told = control(tmp_path, "mine", "status")
    assert [one["state"] for one in told["requests"]] == ["cancelled", "running"]
    assert told["state"] == "running"


def test_who_listens_hears_of_one_request_from_where_it_is(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    ar, _ = stages
    job, other = RequestContext(id="mine"), RequestContext(id="mine too")
    for one in (job, other):
        ar.start(one)
        one.report(Stage.DECODE, 1, 3)  # nobody listens yet
    with EventListener(tmp_path, "mine") as listener:
        assert ar.listened.wait(SECONDS)
        other.report(Stage.DECODE, 2, 3)
        job.report(Stage.DECODE, 2, 3)
        job.finish(None)
        heard = []
        while not heard or heard[-1]["state"] != "forwarded":
            heard += list(listener.events(SECONDS))
    assert [(event["stage"], event["done"]) for event in heard] == [("decode", 1), ("decode", 2), ("decode", 2)]


def test_nothing_is_made_for_nobody(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    ar, _ = stages

    def make() -> dict[str, object]:
        raise AssertionError("an event that nobody wants")

    ar.node.publish(key_of("mine"), make)
    with EventListener(tmp_path, "another"):
        assert ar.listened.wait(SECONDS)
        ar.node.publish(key_of("mine"), make)


def test_an_event_is_made_away_from_who_publishes_and_a_faulty_one_is_left_out(
    stages: tuple[Instance, Instance], tmp_path: Path
) -> None:
    ar, _ = stages
    with EventListener(tmp_path, "mine") as listener:
        assert ar.listened.wait(SECONDS)
        ar.node.publish(key_of("mine"), lambda: {"never": 1 / 0})
        ar.node.publish(key_of("mine"), lambda: {"made_in": threading.current_thread().name})
        assert next(listener.events(SECONDS)) == {"made_in": "bus"}


def test_an_engine_is_never_kept_waiting(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    """Whoever listens and takes nothing loses events; the engine and other questions go on."""
    ar, _ = stages
    with EventListener(tmp_path, "mine"):
        assert ar.listened.wait(SECONDS)
        job = RequestContext(id="mine")
        ar.start(job)
        for done in range(30_000):
            job.report(Stage.DECODE, done, 30_000)
        assert control(tmp_path, "mine", "status")["requests"][0]["done"] == 29_999


def test_an_answer_may_take_its_time_and_carry_bytes(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    _, dit = stages
    threading.Timer(0.05, lambda: dit.preview.set_result(Message({"size": [1, 2]}, [b"\0pixels"]))).start()
    (answer,) = call_all(tmp_path, Message({"action": "preview"}, [b"tokens"]), SECONDS, "glm_dit").answers.values()
    assert (answer.fields, answer.parts) == ({"size": [1, 2]}, [b"\0pixels"])


@pytest.mark.parametrize("action", ["fault", "no such"])
def test_a_fault_is_answered_and_the_node_goes_on(
    stages: tuple[Instance, Instance], tmp_path: Path, action: str
) -> None:
    answers = call_all(tmp_path, Message({"action": action}), SECONDS).answers
    assert {name: bool(answer.fields["error"]) for name, answer in answers.items()} == {
        "glm_ar_0": True,
        "glm_dit_0": True,
    }
    assert control(tmp_path, "mine", "status")["state"] == "unknown"


def test_a_node_that_was_killed_is_named_and_replaced(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib; from glm_image.ipc import IpcServer; "
        "IpcServer(pathlib.Path(sys.argv[1]), 'glm_dit_1', {}); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    assert (tmp_path / "glm_dit_1.control").exists()
    began = time.monotonic()
    assert control(tmp_path, "mine", "status")["silent"] == ["glm_dit_1"]
    assert time.monotonic() - began < REPLY_SECONDS
    again = Instance(tmp_path, "glm_dit_1", RequestState.FINISHED)
    assert "silent" not in control(tmp_path, "mine", "status")
    again.node.close()


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no socket at"):
        IpcServer(tmp_path / ("x" * 120), "glm_ar_0", {})


@pytest.mark.parametrize(("request_id", "action"), [("", "cancel"), ("mine", "stop")])
def test_a_wrong_question_is_refused(tmp_path: Path, request_id: str, action: str) -> None:
    with pytest.raises(InvalidInputError):
        control(tmp_path, request_id, action)


def test_progress_that_nobody_watches_costs_next_to_nothing(stages: tuple[Instance, Instance], tmp_path: Path) -> None:
    ar, _ = stages
    asked = GenerationParameters("a fox", height=256, width=256, seed=1)
    resolved = asked.resolve(Limits(), Sampling(0.9, 0.75, 16384))
    running = [Running(Request(RequestContext(id=str(slot)), (), resolved, 0.0), 0, 9, 0.0) for slot in range(8)]
    for one in running:
        ar.start(one.request.context)
        one.request.context.progress = one.request.drawn.progress
    count = 5_000
    fastest = min(_seconds(lambda: report_progress(running), count) for _ in range(5))
    assert fastest / count < 0.0005 * 0.0063  # of a decode step of 6.3 ms
    with EventListener(tmp_path, "3") as listener:
        assert ar.listened.wait(SECONDS)
        running[3].request.drawn.done = 7
        report_progress(running)
        while (heard := next(listener.events(SECONDS)))["done"] != 7:
            pass
        assert (heard["stage"], heard["total"]) == ("decode", running[3].request.drawn.total)
    assert ar.left.wait(SECONDS)
    assert [one.request.context.is_watched for one in running] == [False] * 8


def _seconds(call: Callable[[], None], count: int) -> float:
    """The processor's time, so that a busy machine does not count."""
    began = time.thread_time()
    for _ in range(count):
        call()
    return time.thread_time() - began
