"""The watchdog's view of processes, the heartbeat file that a process shares with it, and its timers."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_image.telemetry.heartbeat import BEAT_SECONDS, Heartbeat
from glm_image.watchdog.heartbeats import (
    HEARTBEAT,
    HeartbeatFile,
    HeartbeatRecord,
    drained_models,
    find_heartbeat,
)
from glm_image.watchdog.processes import (
    MAX_MISSED_CHECKS,
    End,
    Stat,
    WatchedProcess,
    children_of,
)
from glm_image.watchdog.timers import Timers
from glm_image.watchdog.watchdog import CHECK_SECONDS

PAUSED = [sys.executable, "-c", "import signal; signal.pause()"]
TIMEOUT = 30


@pytest.fixture
def paused() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(PAUSED) as process:
        yield process
        process.kill()


@pytest.fixture
def heartbeat(tmp_path: Path) -> Iterator[Heartbeat]:
    heartbeat = Heartbeat("worker_0", 0.01, tmp_path)
    yield heartbeat
    heartbeat.close()


def read(folder: Path, name: str = "worker_0") -> HeartbeatRecord:
    file = HeartbeatFile(folder / f"{name}.heartbeat")
    record = file.read()
    file.close()
    return record


def ended(process: WatchedProcess) -> bool:
    return bool(select.select([process.ended], [], [], TIMEOUT)[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_end_by_a_signal_is_described(paused: subprocess.Popen[bytes], number: signal.Signals) -> None:
    process = WatchedProcess(paused.pid, "worker_0", None)
    assert paused.pid in children_of(os.getpid())
    assert process.check() is None
    os.kill(paused.pid, number)
    assert ended(process)
    assert process.end() == End(f"worker_0 (process {paused.pid}) was killed by {number.name}", by_signal=True)
    assert process.check() is None  # reported through ``ended``
    paused.wait()
    assert process.end() == End(f"worker_0 (process {paused.pid}) ended")
    assert Stat.read(paused.pid) is None


def test_end_with_an_exit_code_is_described() -> None:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"]) as child:
        process = WatchedProcess(child.pid, "worker_0", None)
        assert ended(process)
        assert process.end() == End(f"worker_0 (process {child.pid}) ended with exit code 7")


def test_stopped_process_is_a_fault_after_some_checks(paused: subprocess.Popen[bytes]) -> None:
    process = WatchedProcess(paused.pid, "worker_0", None)
    os.kill(paused.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, paused.pid, os.WSTOPPED | os.WNOWAIT)
    faults = [process.check() for _ in range(MAX_MISSED_CHECKS)]
    assert faults[:-1] == [None] * (MAX_MISSED_CHECKS - 1)
    assert faults[-1] == f"worker_0 (process {paused.pid}) has been stopped for seconds"


def test_process_that_continues_in_time_is_no_fault(paused: subprocess.Popen[bytes]) -> None:
    process = WatchedProcess(paused.pid, "worker_0", None)
    for _ in range(3):
        os.kill(paused.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, paused.pid, os.WSTOPPED | os.WNOWAIT)
        assert [process.check() for _ in range(MAX_MISSED_CHECKS - 1)] == [None] * (MAX_MISSED_CHECKS - 1)
        os.kill(paused.pid, signal.SIGCONT)
        os.waitid(os.P_PID, paused.pid, os.WCONTINUED | os.WNOWAIT)
        assert process.check() is None


def test_heartbeat_without_beats_is_a_hang(heartbeat: Heartbeat, tmp_path: Path) -> None:
    assert find_heartbeat(tmp_path, os.getpid()) is None  # not watched before the start
    heartbeat.start(is_alive=lambda: False)
    process = WatchedProcess(os.getpid(), "worker_0", find_heartbeat(tmp_path, os.getpid()))
    assert process.check() is None
    faults = [process.check() for _ in range(MAX_MISSED_CHECKS)]
    assert faults[-1] is not None
    assert "hangs: it has shown no sign of life" in faults[-1]


def test_beats_are_more_frequent_than_checks(heartbeat: Heartbeat, tmp_path: Path) -> None:
    assert 2 * BEAT_SECONDS <= CHECK_SECONDS
    called = threading.Semaphore(0)
    heartbeat.start(is_alive=lambda: called.release() is None)
    for _ in range(2):
        assert called.acquire(timeout=TIMEOUT)
    record = read(tmp_path)
    assert (record.pid, record.busy_since, record.hang_ns) == (os.getpid(), 0, 10_000_000)
    assert record.beats >= 1


def test_command_longer_than_hang_seconds_is_a_hang(heartbeat: Heartbeat, tmp_path: Path) -> None:
    heartbeat.start()
    process = WatchedProcess(os.getpid(), "worker_0", find_heartbeat(tmp_path, os.getpid()))
    never = threading.Event()
    faults: list[str | None] = []

    def command(_: None) -> None:
        assert not never.wait(0.02)  # longer than allowed
        faults.append(process.check())

    heartbeat.watched(command)(None)
    assert faults[0] is not None
    assert "more than hang_seconds (0.01)" in faults[0]
    assert read(tmp_path).busy_since == 0


def test_oldest_of_several_commands_counts(heartbeat: Heartbeat, tmp_path: Path) -> None:
    with heartbeat.busy():
        first = read(tmp_path).busy_since
        with heartbeat.busy():
            assert read(tmp_path).busy_since == first > 0
    assert read(tmp_path).busy_since == 0


def test_drain_command_runs_its_callback(heartbeat: Heartbeat, tmp_path: Path) -> None:
    drained = threading.Event()
    heartbeat.start(commands={"drain": drained.set})
    file = HeartbeatFile(tmp_path / "worker_0.heartbeat")
    file.send(b"drain\n")
    assert drained.wait(TIMEOUT)


def test_model_is_drained_when_all_its_instances_are(heartbeat: Heartbeat, tmp_path: Path) -> None:
    other = Heartbeat("worker_1", 0.0, tmp_path)
    files = [HeartbeatFile(path) for path in tmp_path.glob("*.heartbeat")]
    assert [file.model for file in files] == ["worker", "worker"]
    assert drained_models(files) == set()
    heartbeat.mark_drained()
    assert drained_models(files) == set()
    other.mark_drained()
    assert drained_models(files) == {"worker"}
    other.close()


def test_heartbeat_of_a_model_that_is_loaded_again_is_its_own(heartbeat: Heartbeat, tmp_path: Path) -> None:
    heartbeat.start()
    former = HeartbeatFile(tmp_path / "worker_0.heartbeat")
    again = Heartbeat("worker_0", 0.0, tmp_path)
    again.start()
    heartbeat.close()
    assert former.read().pid == 0
    assert read(tmp_path).pid == os.getpid()
    again.close()


def test_removed_files_are_no_fault(heartbeat: Heartbeat, tmp_path: Path) -> None:
    """As systemd-tmpfiles removes them from a folder that it cleans."""
    drained = threading.Event()
    heartbeat.start(commands={"drain": drained.set})
    process = WatchedProcess(os.getpid(), "worker_0", find_heartbeat(tmp_path, os.getpid()))
    assert process.heartbeat is not None
    for path in list(tmp_path.iterdir()):
        path.unlink()
    assert process.check() is None
    assert find_heartbeat(tmp_path, os.getpid()) is None
    process.heartbeat.send(b"drain\n")
    assert drained.wait(TIMEOUT)
    heartbeat.mark_drained()
    assert drained_models([process.heartbeat]) == {"worker"}
    process.close()


def test_unload_is_an_end_without_error_after_the_heartbeat() -> None:
    program = """
import os, sys, pathlib
from glm_image.telemetry.heartbeat import Heartbeat
heartbeat = Heartbeat("worker_0", 0.0, pathlib.Path(sys.argv[1]))
heartbeat.start()
print(flush=True)
sys.stdin.read()
if sys.argv[2] == "close":
    heartbeat.close()
os._exit(int(sys.argv[3]))
"""
    for closes, code, is_unload in (("close", 0, True), ("keep", 0, False), ("close", 1, False)):
        with (
            tempfile.TemporaryDirectory() as folder,
            subprocess.Popen(
                [sys.executable, "-c", program, folder, closes, str(code)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            ) as child,
        ):
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdout.readline()
            process = WatchedProcess(child.pid, "worker_0", find_heartbeat(Path(folder), child.pid))
            child.stdin.close()
            assert ended(process)
            assert process.end().is_unload == is_unload
            process.close()


def test_closed_heartbeat_is_not_watched(tmp_path: Path) -> None:
    heartbeat = Heartbeat("worker_0", 0.0, tmp_path)
    heartbeat.start()
    heartbeat.close()
    assert read(tmp_path).pid == 0


def test_incomplete_heartbeat_file_reads_as_zeros(tmp_path: Path) -> None:
    (tmp_path / "x.heartbeat").write_bytes(b"\1" * (HEARTBEAT.size - 1))
    assert read(tmp_path, "x") == (0, 0, 0, 0, 0)


def test_heartbeat_without_a_server_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLM_IMAGE_RUN_DIRECTORY", raising=False)
    heartbeat = Heartbeat("worker_0", 1.0)
    heartbeat.start()
    with heartbeat.busy():
        pass
    heartbeat.close()


def test_timers_run_what_is_due_and_keep_the_rest() -> None:
    timers, runs = Timers(), []

    def first() -> None:
        runs.append("first")
        timers.start(first, 3600)

    def second() -> None:
        runs.append("second")

    timers.start(first, 0)
    timers.start(second, 3600)
    assert timers.seconds_left() == 0
    timers.run_due()
    assert runs == ["first"]
    assert timers.is_running(first)
    timers.start_at_most(second, 7200)
    assert 3500 < timers.seconds_left() <= 3600
    timers.start_at_most(second, 0)
    timers.cancel(first)
    timers.run_due()
    assert runs == ["first", "second"]
    assert not timers.is_running(second)
