"""Logs whose reader stops, whose disk is full or whose file is none: nothing waits for them, and losses are counted."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from glm_image.errors import InvalidInputError, UnavailableError
from glm_image.lifecycle.context import RequestContext
from glm_image.supervisor.output import Output
from glm_image.telemetry.line_writer import LineWriter
from glm_image.telemetry.metrics import MetricSpec
from glm_image.telemetry.request_log import FILE, LOST_LINES, LogFile, RequestLog
from glm_image.watchdog.log_relay import KNOWN_LINES, MAX_WAITING_BYTES, REPETITIONS, LogRelay, Repetitions

SECONDS = 30
PIPE_BYTES = 64 * 1024


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    readable, writable = os.pipe()
    try:
        yield readable, writable
    finally:
        for descriptor in (readable, writable):
            with contextlib.suppress(OSError):
                os.close(descriptor)


class TestLineWriter:
    def test_lines_that_wait_too_long_are_counted(self) -> None:
        entered, go = threading.Event(), threading.Event()
        written: list[bytes] = []
        lost: list[tuple[int, OSError | None]] = []

        def write(line: bytes) -> None:
            entered.set()
            assert go.wait(SECONDS)
            written.append(line)

        again: list[int] = []
        writer = LineWriter(write, lambda *loss: lost.append(loss), again.append, max_waiting_bytes=2)
        writer.put(b"1")
        assert entered.wait(SECONDS)
        for line in (b"2", b"3", b"4", b"5"):
            writer.put(line)
        assert not writer.flush(0)
        go.set()
        assert writer.flush(SECONDS)
        assert written == [b"1", b"2", b"3"]
        assert lost == [(2, None)]
        assert again == [2]
        writer.close(SECONDS)

    def test_close_does_not_wait_for_a_reader(self) -> None:
        with pipe() as (_, writable):
            writer = LineWriter(lambda line: os.write(writable, line) and None)
            for _ in range(3):
                writer.put(b"x" * PIPE_BYTES)
            writer.close(0.01)


class TestRequestLog:
    @pytest.fixture
    def lost(self) -> list[float]:
        return []

    @pytest.fixture
    def record(self, lost: list[float]) -> object:
        def record(metric: MetricSpec, value: float, times: int = 1, /) -> None:
            assert metric is LOST_LINES
            lost.append(value)

        return record

    def write(self, path: Path, record: object, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(FILE, str(path))
        log = RequestLog("glm_dit_0", is_last=True, record=record)  # type: ignore[arg-type]
        for number in range(lines):
            context = RequestContext(id=f"{number}")
            log.finished(context, UnavailableError("x" * 1000))
        log.close()

    def test_lines_are_complete(self, tmp_path: Path, record: object, monkeypatch: pytest.MonkeyPatch) -> None:
        self.write(tmp_path / "日志 log", record, 3, monkeypatch)
        lines = [json.loads(line) for line in (tmp_path / "日志 log").read_text(encoding="utf-8").splitlines()]
        assert [(line["id"], line["outcome"]) for line in lines] == [(f"{n}", "UNAVAILABLE") for n in range(3)]

    def test_named_pipe_without_a_reader_loses_what_does_not_fit(
        self, tmp_path: Path, record: object, lost: list[float], monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        os.mkfifo(tmp_path / "log")
        self.write(tmp_path / "log", record, 200, monkeypatch)
        assert 100 < sum(lost) < 200
        assert [record.getMessage() for record in caplog.records] == [
            "the request log loses lines: Resource temporarily unavailable"
        ]

    def test_full_disk_gives_one_warning(
        self, record: object, lost: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.write(Path("/dev/full"), record, 5, monkeypatch)
        assert sum(lost) == 5
        (warning,) = caplog.records
        assert warning.getMessage() == "the request log loses lines: No space left on device"

    def test_folder_that_comes_back_is_written_again(
        self, tmp_path: Path, record: object, lost: list[float], monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        monkeypatch.setenv(FILE, str(tmp_path / "logs" / "log"))
        log = RequestLog("glm_dit_0", is_last=True, record=record)  # type: ignore[arg-type]
        log.finished(RequestContext(id="first"), None)
        assert log._writer.flush(SECONDS)
        (tmp_path / "logs").mkdir()
        log.finished(RequestContext(id="second"), InvalidInputError("no"))
        log.close()
        assert json.loads((tmp_path / "logs" / "log").read_text())["id"] == "second"
        assert sum(lost) == 1
        assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
        assert caplog.records[1].getMessage() == "the request log is written again; lines lost: 1"

    def test_line_that_is_cut_off_is_ended(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.write
        file = LogFile(str(tmp_path / "log"))
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:3]))
            with pytest.raises(OSError, match="No space left"):
                file.write(b"first\n")
        file.write(b"second\n")
        file.write(b"third\n")
        assert (tmp_path / "log").read_text() == "fir\nsecond\nthird\n"


class TestLogRelay:
    def test_log_is_read_though_its_owner_does_not_read(self) -> None:
        with pipe() as (source, server), pipe() as (owner, target):
            relay = LogRelay(source, target)
            sent = 0
            while sent < 2 * MAX_WAITING_BYTES:
                sent += os.write(server, b"%07d" % sent + b"x" * 992 + b"\n")
                relay.read()
                relay.write()
            received = self._drain(relay, owner)
            assert "lines of the log were dropped: serve has not read them in time\n" in received
            dropped = int(received.rsplit(" lines of the log", 1)[0].rsplit("\n", 1)[1])
            assert received.count("x\n") + dropped == sent // 1000
            os.write(server, b"later, without an end")
            os.close(server)
            relay.close(SECONDS)
            assert os.read(owner, 100) == b"later, without an end\n"

    def test_watchdogs_own_line_is_kept(self) -> None:
        with pipe() as (source, server), pipe() as (owner, target):
            relay = LogRelay(source, target)
            for _ in range(2 * MAX_WAITING_BYTES // PIPE_BYTES):
                os.write(server, os.urandom(PIPE_BYTES // 2 - 1).hex().encode() + b"\n")
                relay.read()
            relay.put("the reason")
            assert "the reason\n" in self._drain(relay, owner)

    def test_owner_that_has_ended_is_no_fault(self) -> None:
        with pipe() as (source, server), pipe() as (owner, target):
            relay = LogRelay(source, target)
            os.write(server, b"line\n")
            os.close(owner)
            relay.read()
            relay.write()
            assert not relay.has_waiting

    def _drain(self, relay: LogRelay, owner: int) -> str:
        received = b""
        relay.write()
        while relay.has_waiting:
            received += os.read(owner, PIPE_BYTES)
            relay.write()
        return (received + os.read(owner, PIPE_BYTES)).decode()


class TestRepetitions:
    WARNING = b"[warn] Error from accept() call: Too many open files"

    def test_repeated_lines_are_counted(self) -> None:
        now = [0.0]
        repetitions = Repetitions(lambda: now[0])
        assert sum(repetitions.passes(self.WARNING) for _ in range(5000)) == REPETITIONS
        assert repetitions.summaries() == []
        now[0] = 11.0
        assert repetitions.summaries() == [b"repeated 5000 times in 11 s: " + self.WARNING]
        assert repetitions.passes(self.WARNING)

    def test_time_and_thread_of_a_line_do_not_count(self) -> None:
        repetitions = Repetitions()
        lines = [b'I1122 02:09:40.%06d %d http_server.cc:1] "same"' % (n, n) for n in range(1000)]
        assert sum(map(repetitions.passes, lines)) == REPETITIONS
        (summary,) = repetitions.summaries(of_all=True)
        assert summary.endswith(b'http_server.cc:1] "same"')

    def test_different_lines_all_pass(self) -> None:
        repetitions = Repetitions()
        for number in range(5000):
            assert repetitions.passes(b'{"id": "%d"}' % number)
            repetitions.passes(self.WARNING)
        assert len(repetitions._seen) <= KNOWN_LINES + 1
        assert len(repetitions.summaries(of_all=True)) == 1


class TestOutput:
    def test_reader_that_has_stopped_does_not_hold_up(self) -> None:
        with pipe() as (readable, writable), os.fdopen(os.dup(writable), "w") as stream:
            output = Output(stream)
            for number in range(3000):
                output.put(f"{number:06d}" + "x" * 993)
            received = b""
            while b"lines of the log were dropped: its reader had stopped\n" not in received:
                received += os.read(readable, PIPE_BYTES)
                output.put("more")
            assert received.startswith(b"000000x")

    def test_stream_in_memory(self) -> None:
        stream = io.StringIO()
        output = Output(stream)
        output.put("雪")
        output.flush()
        assert stream.getvalue() == "雪\n"

    def test_reader_that_has_gone(self) -> None:
        with pipe() as (readable, writable), os.fdopen(os.dup(writable), "w") as stream:
            os.close(readable)
            output = Output(stream)
            output.put("lost")
            output.flush()
