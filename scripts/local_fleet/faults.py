"""Disturbances of a running fleet: each is one call, which returns when the fleet is whole again."""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.servers import STUB, descendants
from local_fleet.fleet import POOLS, LocalFleet, Member
from local_fleet.namespaces import NetworkNamespace
from local_fleet.state import POLL_SECONDS, WHOLE_SECONDS, FleetIsBrokenError, active_members, wait_until, wait_whole
from local_fleet.traffic import Traffic

BUSY_SECONDS: Final = 120.0
"""The longest time until a member has a request."""
CUT_SECONDS: Final = 15.0
"""Longer than Envoy's pings take to notice it."""
SERVER: Final = "tritonserver"


@dataclass(frozen=True)
class Disturbance:
    """What was done, and the seconds until the fleet was whole again."""

    kind: str
    detail: str
    seconds: float


class Faults:
    """Disturbs a fleet.

    Args:
        fleet: a running one.
        traffic: its clients, which learn when the gateway is disturbed.
        seed: of the choices.
        namespaces: of members that can be cut off, by name.
    """

    def __init__(
        self, fleet: LocalFleet, traffic: Traffic, seed: int, namespaces: dict[str, NetworkNamespace] | None = None
    ) -> None:
        self._fleet, self._traffic, self._random = fleet, traffic, random.Random(seed)
        self._namespaces = namespaces or {}

    @property
    def kinds(self) -> dict[str, Callable[[], str]]:
        """The disturbances that are possible, by name."""
        kinds = {
            "kill dit": lambda: self._signal_server("dit", signal.SIGKILL),
            "kill ar": lambda: self._signal_server("ar", signal.SIGKILL),
            "stop dit": lambda: self._signal_server("dit", signal.SIGSTOP),
            "add and drain dit": self._add_and_drain,
            "kill envoy": lambda: self._end(self._fleet.envoy.name, signal.SIGKILL),
            "end gateway": lambda: self._end(self._fleet.gateway.name, signal.SIGTERM),
            "kill gateway": lambda: self._end(self._fleet.gateway.name, signal.SIGKILL),
        }
        return kinds | ({"cut off dit": self._cut_off} if self._namespaces else {})

    def disturb(self, kind: str) -> Disturbance:
        """Waits until the fleet works on requests, disturbs it, and waits until it is whole.

        Raises:
            FleetIsBrokenError: it does not become whole.
        """
        began = time.monotonic()
        servers = self._servers()
        detail = self.inject(kind)
        if kind.startswith(("kill dit", "kill ar", "stop")):  # until then the old one is believed to be ready
            wait_until(self._fleet, lambda: self._servers() - servers and len(self._servers()) == len(servers), kind)
        wait_whole(self._fleet, f"{kind}: {detail}")
        return Disturbance(kind, detail, time.monotonic() - began)

    def inject(self, kind: str) -> str:
        """Waits until the fleet works on requests and disturbs it; returns what was done."""
        return self.kinds[kind]()

    def _servers(self) -> set[int]:
        """Returns the process ids of the members' Tritons."""
        members = self._fleet.members.values()
        return {pid for member in members for pid in descendants(member.process.pid) if name_of(pid) == SERVER}

    def _signal_server(self, pool: str, number: signal.Signals) -> str:
        member = self._busy_member(pool)
        processes = {model_of(pid) or name_of(pid): pid for pid in descendants(member.process.pid)}
        choices = {name: processes[name] for name in (SERVER, POOLS[pool])}
        if number == signal.SIGKILL:  # a stopped `serve` alone disturbs nothing
            choices["serve"] = member.process.pid
        name = self._random.choice(sorted(choices))
        os.kill(choices[name], number)
        self._wait_gone(choices[name])
        return f"{number.name} to {name} of {member.name}"

    def _add_and_drain(self) -> str:
        added = self._fleet.add("dit")
        # A member that can be cut off stays.
        names = [name for name in self._fleet.members if name not in {added.name, *self._namespaces}]
        member = self._busy_member("dit", names)
        self._fleet.drain(member.name)
        return f"{added.name} added, {member.name} drained"

    def _end(self, name: str, number: signal.Signals) -> str:
        process = self._fleet.gateway if name == "gateway" else self._fleet.envoy
        self._busy_member("dit")
        starts = process.starts
        self._traffic.expect_closed_connections(process is self._fleet.gateway)
        process.restart() if number == signal.SIGTERM else process.send(number)
        process.wait_restarted(starts)
        self._traffic.expect_closed_connections(False)
        return f"{number.name} to {name}"

    def _cut_off(self) -> str:
        name = self._random.choice(sorted(self._namespaces))
        self._busy_member("dit", [name])
        self._namespaces[name].cut()
        try:
            time.sleep(CUT_SECONDS)
        finally:
            self._namespaces[name].join()
        return f"{name} for {CUT_SECONDS:g} s"

    def _busy_member(self, pool: str, names: Sequence[str] | None = None) -> Member:
        """Waits until a member of a pool has a request, and returns one that has."""
        end = time.monotonic() + BUSY_SECONDS
        places = {
            member.address: member
            for member in self._fleet.members.values()
            if member.pool == pool and (names is None or member.name in names)
        }
        before: set[str] = set()
        while time.monotonic() < end:
            # A question whether a member is ready is active for a moment too, a request for longer.
            active = active_members(self._fleet, pool) & set(places)
            if both := sorted(active & before):
                return places[self._random.choice(both)]
            before = active
            time.sleep(POLL_SECONDS)
        raise FleetIsBrokenError(f"no member of {pool} got a request within {BUSY_SECONDS:g} s")

    @staticmethod
    def _wait_gone(pid: int) -> None:
        """Waits until a process that got a signal has ended; a stopped one is ended by its watchdog."""
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                select.select([descriptor], [], [], WHOLE_SECONDS)
            finally:
                os.close(descriptor)


def name_of(pid: int) -> str:
    """Returns the name of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def model_of(pid: int) -> str | None:
    """Returns the model that a process serves; None if it is no model's process."""
    try:
        program, *arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return None
    return Path(arguments[0]).parents[1].name if program.endswith(f"/{STUB}") else None
