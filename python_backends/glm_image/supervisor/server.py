"""One Triton server over one checkpoint: start, readiness, stop."""

from __future__ import annotations

import http.client
import os
import select
from typing import TextIO

from glm_image.errors import GlmImageError
from glm_image.supervisor.addresses import authority
from glm_image.supervisor.api_access import is_loopback
from glm_image.supervisor.host_limits import check_descriptors, limit_warning
from glm_image.supervisor.installation import find_installation
from glm_image.supervisor.output import Output
from glm_image.supervisor.ports import ReservedPorts
from glm_image.supervisor.settings import ServerSettings
from glm_image.supervisor.triton_process import ServerProcess

HEALTH_TIMEOUT_SECONDS = 30
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ServerStartError(GlmImageError):
    """A server did not become ready; if a model failed to load, the message is its error."""


class TritonServer:
    """A Triton that loads every model of a repository over one checkpoint.

    As a context manager it is ready inside the block, and all its processes and shared memory are gone after it. The
    server also ends when this process dies. Its log is written to ``log``, whose reader may stop without consequence.

    Raises:
        CheckpointError: the checkpoint folder is missing or not a checkpoint.
        ConfigurationError: a setting is invalid, or this machine has no Triton that runs on it.
    """

    def __init__(self, settings: ServerSettings, *, log: Output | TextIO | None = None) -> None:
        absolute = settings.absolute()
        absolute.check()
        check_descriptors()
        self._installation = find_installation()
        self._ports = ReservedPorts(absolute.host, absolute.ports())
        self._settings = absolute.with_ports(self._ports.numbers)
        self._log = log if log is None or isinstance(log, Output) else Output(log)
        self._process: ServerProcess | None = None
        self._ready = False
        self._starts = 0
        self.stop_requested = False
        self._stop = os.eventfd(0)

    def __enter__(self) -> TritonServer:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def http_url(self) -> str:
        """``HOST:PORT`` of KServe v2 over HTTP, as ``tritonclient`` expects it."""
        return self._address(self._settings.http_port)

    @property
    def grpc_url(self) -> str:
        return self._address(self._settings.grpc_port)

    @property
    def grpc_scheme(self) -> str:
        """``grpcs`` with TLS, else ``grpc``."""
        return "grpcs" if self._settings.tls.is_used else "grpc"

    @property
    def local_grpc_url(self) -> str:
        """``grpc_url`` as a process of this machine reaches it."""
        return authority(self._local_host, self._settings.grpc_port)

    @property
    def metrics_url(self) -> str:
        return self._address(self._settings.metrics_port)

    @property
    def warnings(self) -> list[str]:
        """What an operator should know: an address that is unsafe to listen on, a limit that is too low."""
        return [warning for warning in (self.exposure, limit_warning()) if warning is not None]

    @property
    def exposure(self) -> str | None:
        """Why the address it listens on is unsafe, or None."""
        if is_loopback(self._settings.host) or not self._installation.is_bundled:
            return None
        return (
            f"{self._settings.host} is not a loopback address, and the Triton of nvidia-pytriton has known "
            "vulnerabilities that allow anyone who can connect to take it over; see SECURITY.md"
        )

    @property
    def shm_prefix(self) -> str:
        """Begins the names of the server's regions in /dev/shm."""
        return self._running().shm_prefix

    @property
    def log_tail(self) -> str:
        return "" if self._process is None else self._process.log_tail

    @property
    def returncode(self) -> int | None:
        """128 + n after signal n; None while the server runs."""
        return None if self._process is None else self._process.returncode

    @property
    def end_reason(self) -> str:
        return self._running().end_reason

    def start(self) -> None:
        """Starts the process and returns; a restart uses the same ports."""
        self._ready = False
        self._process = ServerProcess(self._installation, self._settings, self._log, restarts=self._starts)
        self._starts += 1
        if self.stop_requested:  # by a signal handler, meanwhile
            self._process.request_kill()

    def wait_ready(self) -> None:
        """Waits until all models are loaded and every port answers.

        Raises:
            ServerStartError: a model failed to load, another process took a port, or the server ended.
        """
        if failure := self._running().wait_started():
            self.clean_up()
            raise ServerStartError(failure)
        self._check_health()
        self._running().request_watch()
        self._ready = True

    def request_stop(self) -> None:
        """Requests a stop after the requests in flight; does not block, safe in a signal handler."""
        if self._process is None or not self._ready:  # no request is in flight, and Triton would first load all models
            self.request_kill()
            return
        self.stop_requested = True
        os.eventfd_write(self._stop, 1)
        self._process.request_stop()

    def request_kill(self) -> None:
        """Requests an immediate end; does not block, safe in a signal handler."""
        self.stop_requested = True
        os.eventfd_write(self._stop, 1)
        if self._process is not None:
            self._process.request_kill()

    def wait_for_stop(self, seconds: float) -> bool:
        """Waits until a stop is requested or the time is over; returns whether it is requested."""
        return bool(select.select([self._stop], [], [], seconds)[0])

    def clean_up(self) -> None:
        """Ends what is left of a server that broke or failed to start; it can be started again."""
        self._running().request_kill()
        self._running().wait()

    def stop(self) -> None:
        """Drains and ends the server; it cannot be started again."""
        self.request_stop()
        self.wait()
        self._ports.release()

    def kill(self) -> None:
        self.request_kill()
        self.wait()
        self._ports.release()

    def wait(self) -> int:
        """Waits until the server has ended; returns its exit code, 0 if it was never started."""
        return 0 if self._process is None else self._process.wait()

    def _running(self) -> ServerProcess:
        if self._process is None:
            raise RuntimeError("the server has not been started")
        return self._process

    def _address(self, port: int) -> str:
        return authority(self._settings.host, port)

    @property
    def _local_host(self) -> str:
        return _LOOPBACK_OF.get(self._settings.host, self._settings.host)

    def _check_health(self) -> None:
        connection = http.client.HTTPConnection(
            self._local_host, self._settings.http_port, timeout=HEALTH_TIMEOUT_SECONDS
        )
        try:
            connection.request("GET", "/v2/health/ready")
            result: object = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            result = error
        finally:
            connection.close()
        if result != http.client.OK:
            raise ServerStartError(f"tritonserver has started, but /v2/health/ready returned {result}")
