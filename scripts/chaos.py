#!/usr/bin/env python3
"""Breaks a server over and over while clients ask it for everything, and checks what each of them gets.

    chaos.py [--checkpoint DIR] [--seconds 60] [--clients 4] [--seed 0]

Good, bad, late and cancelled requests come over gRPC and HTTP from several clients, while model processes are killed
(SIGKILL) and stopped (SIGSTOP) in turn. Every request must end: with its picture, byte for byte the one made in peace,
with an error, or with a closed connection; with an error that is none of its own only while the server is broken. The
server must be unready within 2 seconds of a kill and 10 of a stop, ready at all other times, and come back by itself.
At the end the pictures are made once more, and memory, /dev/shm and processes must be as they were at the beginning.

Prints the counts as a JSON object; faults go to standard error. The code is 1 when there was any.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.servers import processes, resident_bytes, tiny_checkpoint
from chaos_requests import ENDINGS, GOOD, KINDS, Asked, Server, ask_any, fault_of
from glm_image.supervisor import TritonServer
from glm_image.supervisor.restarts import RestartPolicy, keep_running
from glm_image.supervisor.watchdog import SHARED_MEMORY, children_of

UNREADY_SECONDS = {signal.SIGKILL: 2.0, signal.SIGSTOP: 10.0}
BACK_SECONDS = 120.0
PEACE_SECONDS = (2.0, 6.0)
"""Between the server's return and the next blow."""
LOOK_SECONDS = 0.1
GROWTH = 1.2
GROWTH_BYTES = 64 * 1024 * 1024
"""A process may end larger than it began by that factor and that much: allocators keep what they had."""
POLICY = RestartPolicy(max_restarts=1_000_000, first_seconds=0.2, longest_seconds=0.2)


@dataclass
class State:
    """What a server holds on to.

    Attributes:
        resident: bytes of each process, by its name.
        shared_memory: bytes in /dev/shm, of every server that this process started.
        descriptors: open files of this process.
        children: this process's.
    """

    resident: dict[str, int]
    shared_memory: int
    descriptors: int
    children: int


@dataclass
class Blow:
    """A signal to a model's process, and the seconds until the server was unready and until it was ready again."""

    signal: str
    model: str
    unready_seconds: float
    back_seconds: float


@dataclass
class Report:
    """What happened."""

    blows: list[Blow] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    looks: int = 0

    def counts(self) -> dict[str, Any]:
        """Returns the numbers, for people and programs."""
        endings = Counter((one.kind, one.ending.kind) for one in self.asked)
        return {
            "requests": len(self.asked),
            "endings": {kind: {end: endings[kind, end] for end in ENDINGS if endings[kind, end]} for kind in KINDS},
            "protocols": dict(Counter(one.protocol for one in self.asked)),
            "blows": dict(Counter(f"{blow.signal} {blow.model}" for blow in self.blows)),
            "slowest_unready_seconds": {number.name: round(self._unready(number), 3) for number in UNREADY_SECONDS},
            "slowest_back_seconds": round(max((blow.back_seconds for blow in self.blows), default=0), 3),
            "looks_at_health": self.looks,
            "faults": len(self.faults),
        }

    def _unready(self, number: signal.Signals) -> float:
        return max((blow.unready_seconds for blow in self.blows if blow.signal == number.name), default=0.0)


class Chaos:
    """A server that is kept running, its clients, and who breaks it."""

    def __init__(self, checkpoint: Path, seed: int) -> None:
        self._server = TritonServer(checkpoint, drain_seconds=30)
        self._dice = random.Random(seed)
        self._ready = threading.Semaphore(0)
        self._broken: list[list[float]] = []  # from a blow until the server is back
        self._prefixes: set[str] = set()
        self._lines: list[str] = []
        self._thread = threading.Thread(target=self._keep, name="server")
        self.report = Report()

    def _keep(self) -> None:
        keep_running(self._server, POLICY, self._ready.release, self._lines.append)

    def run(self, seconds: float, clients: int) -> Report:
        """Starts the server, breaks it for ``seconds``, and ends it."""
        self._thread.start()
        try:
            self._wait_ready()
            self._address = Server(self._server.http_url, self._server.grpc_url)
            expected = self._peace()
            self._peace()  # by now every buffer has its size
            before = self._state()
            self._trouble(seconds, clients, expected)
            if self._peace() != expected:
                self._fault("the pictures after the trouble are others than before")
            self._peace()
            self._compare(before, self._state())
        finally:
            self._server.request_stop()
            self._thread.join()
        self._check_gone()
        return self.report

    def _fault(self, words: str) -> None:
        self.report.faults.append(words)
        print(words, file=sys.stderr, flush=True)

    def _wait_ready(self) -> None:
        if not self._ready.acquire(timeout=BACK_SECONDS):
            raise RuntimeError(f"the server is not ready after {BACK_SECONDS:g} s: {self._server.log_tail}")
        self._prefixes.add(self._server.shm_prefix)

    def _peace(self) -> dict[str, tuple[bytes, ...]]:
        """Asks for every good picture, one after the other over both protocols; they must be the same."""
        made = {}
        for values in GOOD:
            answers = [self._address.ask(protocol, values) for protocol in ("grpc", "http")]
            if answers[0] != answers[1] or answers[0].kind != "picture":
                self._fault(f"in peace, {dict(values)}: {answers[0].kind} and {answers[1].kind} {answers[1].words}")
            made[values["prompt"]] = answers[0].files
        return made

    def _state(self) -> State:
        return State(
            {name: resident_bytes(pid) for name, pid in processes(self._server).items()},
            sum(region.stat().st_blocks * 512 for region in self._regions()),
            len(list(Path("/proc/self/fd").iterdir())),
            len(children_of(os.getpid())),
        )

    def _regions(self) -> list[Path]:
        return [region for prefix in self._prefixes for region in SHARED_MEMORY.glob(f"{prefix}*")]

    def _trouble(self, seconds: float, clients: int, expected: dict[str, tuple[bytes, ...]]) -> None:
        over = threading.Event()
        with ThreadPoolExecutor(clients) as pool:
            futures = [pool.submit(self._client, random.Random(self._dice.random()), over) for _ in range(clients)]
            try:
                end = time.monotonic() + seconds
                # Each kind of blow comes, however short the time, and none that would end after it.
                while time.monotonic() + self._longest() < end or len(self.report.blows) < len(UNREADY_SECONDS):
                    self._watch_peace(self._dice.uniform(*PEACE_SECONDS))
                    self._strike(list(UNREADY_SECONDS)[len(self.report.blows) % 2])
            finally:
                over.set()
            for future in futures:
                self.report.asked += future.result()
        for asked in self.report.asked:
            was_broken = any(asked.began <= back and asked.ended >= blow for blow, back in self._broken)
            if words := fault_of(asked, expected, was_broken):
                self._fault(words)

    def _longest(self) -> float:
        """How long the next blow and the peace before it may take, by those that came."""
        return PEACE_SECONDS[1] + max((blow.back_seconds for blow in self.report.blows), default=0.0)

    def _client(self, dice: random.Random, over: threading.Event) -> list[Asked]:
        asked = []
        while not over.is_set():
            asked.append(ask_any(self._address, dice))
            if asked[-1].ending.kind == "closed":
                over.wait(0.2)  # as a client does before it comes again
        return asked

    def _is_ready(self) -> bool:
        self.report.looks += 1
        with contextlib.closing(http.client.HTTPConnection(self._address.http_url, timeout=1)) as connection:
            try:
                connection.request("GET", "/v2/health/ready")
                return connection.getresponse().status == http.client.OK
            except OSError:
                return False

    def _watch_peace(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self._is_ready():
                self._fault("the server is not ready, and nobody has broken it")
                return
            time.sleep(LOOK_SECONDS)

    def _strike(self, number: signal.Signals) -> None:
        found = {name: pid for name, pid in processes(self._server).items() if name != "tritonserver"}
        model = self._dice.choice(sorted(found))
        began = time.monotonic()
        self._broken.append([began, began + BACK_SECONDS])
        os.kill(found[model], number)
        allowed = UNREADY_SECONDS[number]
        while self._is_ready() and time.monotonic() - began <= allowed:
            time.sleep(LOOK_SECONDS)
        unready = time.monotonic() - began
        if unready > allowed:
            self._fault(f"the server was ready {unready:.1f} s after {number.name} to {model}")
        self._wait_ready()
        self._broken[-1][1] = time.monotonic()
        self.report.blows.append(Blow(number.name, model, unready, time.monotonic() - began))

    def _compare(self, before: State, after: State) -> None:
        for name, grown in after.resident.items():
            if grown > before.resident.get(name, 0) * GROWTH + GROWTH_BYTES:
                self._fault(f"{name} holds {grown} bytes, and held {before.resident.get(name, 0)}")
        if set(before.resident) != set(after.resident):
            self._fault(f"the processes are {sorted(after.resident)}, and were {sorted(before.resident)}")
        if after.shared_memory > before.shared_memory * GROWTH:
            self._fault(f"/dev/shm holds {after.shared_memory} bytes, and held {before.shared_memory}")
        if (after.descriptors, after.children) != (before.descriptors, before.children):
            self._fault(f"this process had {before} and has {after}")

    def _check_gone(self) -> None:
        if self._server.returncode != 0:
            self._fault(f"the server ended with code {self._server.returncode}")
        if regions := self._regions():
            self._fault(f"/dev/shm still has {regions}")
        if processes(self._server) or children_of(os.getpid()):
            self._fault(f"processes are left: {processes(self._server)}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Breaks a server over and over and checks what its clients get.")
    parser.add_argument("--checkpoint", type=Path, help="default: a tiny one of random weights")
    parser.add_argument("--seconds", type=float, default=60.0, help="of trouble (default: %(default)g)")
    parser.add_argument("--clients", type=int, default=4, help="requests at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = flags.checkpoint or tiny_checkpoint(Path(folder))
        report = Chaos(checkpoint, flags.seed).run(flags.seconds, flags.clients)
    print(json.dumps(report.counts(), indent=2))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
