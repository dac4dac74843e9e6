#!/usr/bin/env python3
"""Breaks a server repeatedly while clients send requests of every kind, and checks the outcome of each.

    chaos.py [--checkpoint DIR] [--seconds 60] [--failures N] [--calm 6] [--clients 4] [--seed 0]

Several clients send good, bad, late and cancelled requests over gRPC and HTTP while model processes are alternately
killed (SIGKILL) and stopped (SIGSTOP), until the time is over or each signal was sent the given number of times. Every
request must end: with its image, equal byte for byte to the image of the undisturbed server, with an error, or with a
closed connection. An error that the request itself did not cause is allowed only while the server is broken. The server
must be unready within 2 seconds of a kill and 10 seconds of a stop, ready at all other times, and recover by itself. At
the end the images are generated once more, and memory, /dev/shm and processes must be as they were at the beginning.

Prints the counts as a JSON object, and faults to standard error. The exit code is 1 if there was a fault.
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
from chaos_requests import GOOD, KINDS, OUTCOMES, RequestRecord, Server, fault_of, send_any
from glm_image.supervisor import ServerSettings, TritonServer
from glm_image.supervisor.restarts import RestartPolicy, keep_running
from glm_image.watchdog.leftovers import SHARED_MEMORY
from glm_image.watchdog.processes import children_of

UNREADY_SECONDS = {signal.SIGKILL: 2.0, signal.SIGSTOP: 10.0}
RECOVERY_SECONDS = 120.0
POLL_SECONDS = 0.1
RETRY_SECONDS = 1.0
"""Between a closed connection and a client's next request."""
SETTLE_SECONDS = 20.0
"""For connections of ended requests to close; a leak stays."""

CONCURRENT = 8
"""Requests in flight when all images are generated again: as many as the AR decodes in one batch."""

GROWTH = 1.2
GROWTH_BYTES = 64 * 1024 * 1024
"""A process may grow by this factor plus these bytes: allocators keep memory."""
POLICY = RestartPolicy(max_restarts=1_000_000, first_seconds=0.2, longest_seconds=0.2)


@dataclass
class State:
    """The resources that a server and this process hold.

    Attributes:
        resident: bytes of each process, by its name.
        shared_memory: bytes in /dev/shm of all servers that this process has started.
        descriptors: the number of this process's open files.
        children: the number of this process's children.
    """

    resident: dict[str, int]
    shared_memory: int
    descriptors: int
    children: int


@dataclass
class Failure:
    """A signal sent to a model's process, and the seconds until the server was unready and ready again."""

    signal: str
    model: str
    unready_seconds: float
    recovery_seconds: float


@dataclass(frozen=True)
class Plan:
    """The length of a run.

    Attributes:
        seconds: the longest time of the failures.
        failures: of each signal, after which the run ends earlier; None = no limit.
        calm_seconds: the longest time between the server's recovery and the next failure; the shortest is a third.
        clients: the number of concurrent requests.
    """

    seconds: float
    failures: int | None
    calm_seconds: float
    clients: int

    def is_complete(self, failures: int) -> bool:
        """Returns whether each signal was sent often enough."""
        return self.failures is not None and failures >= self.failures * len(UNREADY_SECONDS)


@dataclass
class Report:
    """The results of a run."""

    failures: list[Failure] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    requests: list[RequestRecord] = field(default_factory=list)
    polls: int = 0

    def counts(self) -> dict[str, Any]:
        """Returns the results as plain numbers."""
        outcomes = Counter((request.kind, request.outcome.kind) for request in self.requests)
        return {
            "requests": len(self.requests),
            "outcomes": {kind: {end: outcomes[kind, end] for end in OUTCOMES if outcomes[kind, end]} for kind in KINDS},
            "protocols": dict(Counter(request.protocol for request in self.requests)),
            "failures": dict(Counter(f"{failure.signal} {failure.model}" for failure in self.failures)),
            "slowest_unready_seconds": {number.name: round(self._unready(number), 3) for number in UNREADY_SECONDS},
            "slowest_recovery_seconds": round(
                max((failure.recovery_seconds for failure in self.failures), default=0), 3
            ),
            "health_polls": self.polls,
            "faults": len(self.faults),
        }

    def _unready(self, number: signal.Signals) -> float:
        return max((failure.unready_seconds for failure in self.failures if failure.signal == number.name), default=0.0)


class Chaos:
    """A supervised server, its clients, and the failures."""

    def __init__(self, checkpoint: Path, seed: int) -> None:
        self._server = TritonServer(ServerSettings(checkpoint, drain_seconds=30))
        self._random = random.Random(seed)
        self._ready = threading.Semaphore(0)
        self._broken: list[list[float]] = []  # from a failure until the recovery
        self._prefixes: set[str] = set()
        self._lines: list[str] = []
        self._thread = threading.Thread(target=self._supervise, name="server")
        self.report = Report()

    def _supervise(self) -> None:
        keep_running(self._server, POLICY, self._ready.release, self._lines.append)

    def run(self, plan: Plan) -> Report:
        """Starts the server, breaks it as planned, and stops it."""
        self._thread.start()
        try:
            self._wait_ready()
            self._address = Server(self._server.http_url, self._server.grpc_url)
            expected = self._generate_all()
            idle = self._state()
            # Now every buffer has its final size.
            if self._generate_all(CONCURRENT) != expected:
                self._fault("the images generated concurrently differ from those generated one by one")
            before = self._settled_state(idle)
            self._break_repeatedly(plan, expected)
            if self._generate_all(CONCURRENT) != expected:
                self._fault("the images after the failures differ from those before")
            self._generate_all(CONCURRENT)
            self._compare(before, self._settled_state(before))
        finally:
            self._server.request_stop()
            self._thread.join()
        self._check_gone()
        return self.report

    def _fault(self, message: str) -> None:
        self.report.faults.append(message)
        print(message, file=sys.stderr, flush=True)

    def _wait_ready(self) -> None:
        if not self._ready.acquire(timeout=RECOVERY_SECONDS):
            raise RuntimeError(f"the server is not ready after {RECOVERY_SECONDS:g} s: {self._server.log_tail}")
        self._prefixes.add(self._server.shm_prefix)

    def _generate_all(self, concurrent: int = 1) -> dict[str, tuple[bytes, ...]]:
        """Generates every good request's image over both protocols, which must agree, so many at the same time."""
        protocols = ("grpc", "http")
        with ThreadPoolExecutor(concurrent) as pool:
            sent = [[pool.submit(self._address.send, protocol, values) for protocol in protocols] for values in GOOD]
        images = {}
        for values, futures in zip(GOOD, sent, strict=True):
            outcomes = [future.result() for future in futures]
            if outcomes[0] != outcomes[1] or outcomes[0].kind != "image":
                self._fault(
                    f"undisturbed, {dict(values)}: {outcomes[0].kind} and {outcomes[1].kind} {outcomes[1].message}"
                )
            images[values["prompt"]] = outcomes[0].files
        return images

    def _state(self) -> State:
        return State(
            {name: resident_bytes(pid) for name, pid in processes(self._server).items()},
            sum(region.stat().st_blocks * 512 for region in self._regions()),
            len(list(Path("/proc/self/fd").iterdir())),
            len(children_of(os.getpid())),
        )

    def _settled_state(self, before: State) -> State:
        """Returns the state when this process's own resources are back: gRPC closes connections in its own threads."""
        end = time.monotonic() + SETTLE_SECONDS
        while True:
            state = self._state()
            if (state.descriptors, state.children) == (before.descriptors, before.children) or time.monotonic() > end:
                return state
            time.sleep(POLL_SECONDS)

    def _regions(self) -> list[Path]:
        return [region for prefix in self._prefixes for region in SHARED_MEMORY.glob(f"{prefix}*")]

    def _break_repeatedly(self, plan: Plan, expected: dict[str, tuple[bytes, ...]]) -> None:
        failures, finished = self.report.failures, threading.Event()
        signals = list(UNREADY_SECONDS)
        with ThreadPoolExecutor(plan.clients) as pool:
            futures = [
                pool.submit(self._client, random.Random(self._random.random()), finished) for _ in range(plan.clients)
            ]
            try:
                end = time.monotonic() + plan.seconds
                # Every kind of failure occurs, however short the run, and none that would end after it.
                while len(failures) < len(signals) or (
                    time.monotonic() + self._longest_cycle(plan) < end and not plan.is_complete(len(failures))
                ):
                    self._watch_health(self._random.uniform(plan.calm_seconds / 3, plan.calm_seconds))
                    self._inject(signals[len(failures) % len(signals)])
            finally:
                finished.set()
            for future in futures:
                self.report.requests += future.result()
        for request in self.report.requests:
            was_broken = any(request.began <= end and request.ended >= start for start, end in self._broken)
            if fault := fault_of(request, expected, was_broken):
                self._fault(fault)

    def _longest_cycle(self, plan: Plan) -> float:
        """Returns the longest that the next failure and the calm before it may take, judging by the earlier ones."""
        return plan.calm_seconds + max((failure.recovery_seconds for failure in self.report.failures), default=0.0)

    def _client(self, rng: random.Random, finished: threading.Event) -> list[RequestRecord]:
        requests = []
        while not finished.is_set():
            requests.append(send_any(self._address, rng))
            if requests[-1].outcome.kind == "closed":
                finished.wait(RETRY_SECONDS)
        return requests

    def _is_ready(self) -> bool:
        self.report.polls += 1
        with contextlib.closing(http.client.HTTPConnection(self._address.http_url, timeout=1)) as connection:
            try:
                connection.request("GET", "/v2/health/ready")
                return connection.getresponse().status == http.client.OK
            except OSError:
                return False

    def _watch_health(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self._is_ready():
                self._fault("the server is unready without a failure")
                return
            time.sleep(POLL_SECONDS)

    def _inject(self, number: signal.Signals) -> None:
        stubs = {name: pid for name, pid in processes(self._server).items() if name != "tritonserver"}
        model = self._random.choice(sorted(stubs))
        began = time.monotonic()
        self._broken.append([began, began + RECOVERY_SECONDS])
        os.kill(stubs[model], number)
        limit = UNREADY_SECONDS[number]
        while self._is_ready() and time.monotonic() - began <= limit:
            time.sleep(POLL_SECONDS)
        unready = time.monotonic() - began
        if unready > limit:
            self._fault(f"the server was ready {unready:.1f} s after {number.name} to {model}")
        self._wait_ready()
        self._broken[-1][1] = time.monotonic()
        self.report.failures.append(Failure(number.name, model, unready, time.monotonic() - began))

    def _compare(self, before: State, after: State) -> None:
        for name, size in after.resident.items():
            if size > before.resident.get(name, 0) * GROWTH + GROWTH_BYTES:
                self._fault(f"{name} holds {size} bytes, and held {before.resident.get(name, 0)}")
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
    parser = argparse.ArgumentParser(description="Breaks a server repeatedly and checks the outcome of every request.")
    parser.add_argument("--checkpoint", type=Path, help="default: a tiny one of random weights")
    parser.add_argument("--seconds", type=float, default=60.0, help="duration of the failures (default: %(default)g)")
    parser.add_argument("--failures", type=int, help="end earlier, after so many of each signal (default: no limit)")
    parser.add_argument("--calm", type=float, default=6.0, help="most seconds between failures (default: %(default)g)")
    parser.add_argument("--clients", type=int, default=4, help="concurrent requests (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_checkpoint(Path(folder)) if flags.checkpoint is None else flags.checkpoint
        plan = Plan(flags.seconds, flags.failures, flags.calm, flags.clients)
        report = Chaos(checkpoint, flags.seed).run(plan)
    print(json.dumps(report.counts(), indent=2))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
