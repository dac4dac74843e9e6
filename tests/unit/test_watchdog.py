"""The guard's reading of processes, and the page that a process shares with it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_image.supervisor.watchdog import LOOK_SECONDS, PAGE, SILENT_LOOKS, Stat, WatchedProcess, children_of, read_page
from glm_image.telemetry.heartbeat import BEAT_SECONDS, Heartbeat

PAUSED = [sys.executable, "-c", "import signal; signal.pause()"]
TIMEOUT = 30


@pytest.fixture
def paused() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(PAUSED) as process:
        yield process
        process.kill()


@pytest.fixture
def pulse(tmp_path: Path) -> Iterator[Heartbeat]:
    pulse = Heartbeat("worker_0", 0.01, tmp_path)
    yield pulse
    pulse.close()


def ended(watched: WatchedProcess) -> bool:
    return bool(select.select([watched.ended], [], [], TIMEOUT)[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_by_a_signal(paused: subprocess.Popen[bytes], number: signal.Signals) -> None:
    watched = WatchedProcess(paused.pid, "worker_0", None)
    assert paused.pid in children_of(os.getpid())
    assert watched.fault() is None
    os.kill(paused.pid, number)
    assert ended(watched)
    assert watched.end() == (f"worker_0 (process {paused.pid}) was killed by {number.name}", True)
    assert watched.fault() is None  # which is not for this to tell
    paused.wait()
    assert watched.end() == (f"worker_0 (process {paused.pid}) ended", False)
    assert Stat.read(paused.pid) is None


def test_the_end_with_a_code() -> None:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"]) as process:
        watched = WatchedProcess(process.pid, "worker_0", None)
        assert ended(watched)
        assert watched.end() == (f"worker_0 (process {process.pid}) ended with exit code 7", False)


def test_a_stopped_process_is_given_up_after_some_looks(paused: subprocess.Popen[bytes]) -> None:
    watched = WatchedProcess(paused.pid, "worker_0", None)
    os.kill(paused.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, paused.pid, os.WSTOPPED | os.WNOWAIT)
    looks = [watched.fault() for _ in range(SILENT_LOOKS)]
    assert looks[:-1] == [None] * (SILENT_LOOKS - 1)
    assert looks[-1] == f"worker_0 (process {paused.pid}) has been stopped for seconds"


def test_one_that_goes_on_in_time_is_not(paused: subprocess.Popen[bytes]) -> None:
    watched = WatchedProcess(paused.pid, "worker_0", None)
    for _ in range(3):
        os.kill(paused.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, paused.pid, os.WSTOPPED | os.WNOWAIT)
        assert [watched.fault() for _ in range(SILENT_LOOKS - 1)] == [None] * (SILENT_LOOKS - 1)
        os.kill(paused.pid, signal.SIGCONT)
        os.waitid(os.P_PID, paused.pid, os.WCONTINUED | os.WNOWAIT)
        assert watched.fault() is None


def test_a_page_without_beats_is_a_hang(pulse: Heartbeat, tmp_path: Path) -> None:
    page = tmp_path / "worker_0.page"
    assert read_page(page)[0] == 0  # not to be looked at before the start
    pulse.start(is_alive=lambda: False)
    watched = WatchedProcess(os.getpid(), "worker_0", page)
    assert watched.fault() is None
    told = [watched.fault() for _ in range(SILENT_LOOKS)]
    assert told[-1] is not None
    assert "hangs: it has shown no sign of life" in told[-1]


def test_beats_come_faster_than_looks(pulse: Heartbeat, tmp_path: Path) -> None:
    assert 2 * BEAT_SECONDS <= LOOK_SECONDS
    asked = threading.Semaphore(0)
    pulse.start(is_alive=lambda: asked.release() is None)
    for _ in range(2):
        assert asked.acquire(timeout=TIMEOUT)
    pid, beats, busy_since, may_last = read_page(tmp_path / "worker_0.page")
    assert (pid, busy_since, may_last) == (os.getpid(), 0, 10_000_000)
    assert beats >= 1


def test_a_command_that_lasts_too_long_is_a_hang(pulse: Heartbeat, tmp_path: Path) -> None:
    pulse.start()
    watched = WatchedProcess(os.getpid(), "worker_0", tmp_path / "worker_0.page")
    over = threading.Event()
    told: list[str | None] = []

    def command(_: None) -> None:
        assert not over.wait(0.02)  # longer than it may
        told.append(watched.fault())

    pulse.watched(command)(None)
    assert told[0] is not None
    assert "more than hang_seconds (0.01)" in told[0]
    assert read_page(tmp_path / "worker_0.page")[2] == 0


def test_the_oldest_of_several_commands_counts(pulse: Heartbeat, tmp_path: Path) -> None:
    page = tmp_path / "worker_0.page"
    with pulse.busy():
        first = read_page(page)[2]
        with pulse.busy():
            assert read_page(page)[2] == first > 0
    assert read_page(page)[2] == 0


def test_an_order_to_drain_arrives(pulse: Heartbeat, tmp_path: Path) -> None:
    drained = threading.Event()
    pulse.start(commands={"drain": drained.set})
    (tmp_path / "worker_0.orders").write_text("drain\n")
    assert drained.wait(TIMEOUT)


def test_a_closed_pulse_is_not_looked_at(tmp_path: Path) -> None:
    pulse = Heartbeat("worker_0", 0.0, tmp_path)
    pulse.start()
    pulse.close()
    assert read_page(tmp_path / "worker_0.page")[0] == 0


def test_a_page_that_is_just_being_made(tmp_path: Path) -> None:
    (tmp_path / "x.page").write_bytes(b"\0" * (PAGE.size - 1))
    assert read_page(tmp_path / "x.page") == (0, 0, 0, 0)


def test_without_a_server_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLM_IMAGE_RUN_DIRECTORY", raising=False)
    pulse = Heartbeat("worker_0", 1.0)
    pulse.start()
    with pulse.busy():
        pass
    pulse.close()
