"""One Triton over one checkpoint: started, waited for, stopped."""

from __future__ import annotations

import http.client
import os
import select
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from glm_image.errors import GlmImageError
from glm_image.supervisor.api_access import is_loopback
from glm_image.supervisor.installation import find_installation
from glm_image.supervisor.settings import ServerSettings, default_model_repository
from glm_image.supervisor.triton_process import ServerProcess

PORT_ATTEMPTS = 3
HEALTH_TIMEOUT_SECONDS = 30
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ServerStartError(GlmImageError):
    """A server did not become ready; the message is the model's own error where a model failed to load."""


class TritonServer:
    """A Triton that loads every model of a repository over one checkpoint.

    As a context manager it is ready inside and gone outside, with all its processes and shared memory. Should this
    process die, the server does too.

    Args:
        checkpoint: the folder with ``model_index.json``; models see it as GLM_IMAGE_CHECKPOINT.
        profile: the name of a file in a model's ``configs`` folder, or None.
        host: the address to listen on.
        http_port: 0 takes a free one, as do ``grpc_port`` and ``metrics_port``.
        grpc_port: see ``http_port``.
        metrics_port: see ``http_port``.
        drain_seconds: how long requests in flight may go on when the server is stopped. Triton waits as long for an
            HTTP client that keeps an idle connection open.
        model_repository: when None, the one GLM_IMAGE_MODEL_REPOSITORY names, else the checkout's.
        open_apis: those of ``access.CLOSABLE_APIS`` that are not to be closed; None: all are.
        max_request_bytes: the largest body of an HTTP request, where the server has such a limit.
        request_log: the file of request lines; None: they join the server's log.
        log_prompts: whether these lines hold prompts.
        otlp_traces_endpoint: the URL of an OpenTelemetry collector that takes OTLP over HTTP, or None.
        trace_rate: one request of so many is traced.
        log: where the server's log is passed on to; its tail is kept in any case.

    Raises:
        CheckpointError: the checkpoint folder is missing or not a checkpoint.
        ConfigurationError: a setting is not usable, or this machine has no Triton that runs on it.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        profile: str | None = None,
        host: str = ServerSettings.host,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        drain_seconds: int = ServerSettings.drain_seconds,
        model_repository: Path | str | None = None,
        open_apis: Sequence[str] | None = None,
        max_request_bytes: int = ServerSettings.max_request_bytes,
        request_log: Path | str | None = None,
        log_prompts: bool = False,
        otlp_traces_endpoint: str | None = None,
        trace_rate: int = ServerSettings.trace_rate,
        log: TextIO | None = None,
    ) -> None:
        repository = default_model_repository() if model_repository is None else Path(model_repository).absolute()
        self._asked = ServerSettings(
            Path(checkpoint).absolute(),
            repository,
            profile,
            host,
            http_port,
            grpc_port,
            metrics_port,
            drain_seconds,
            tuple(open_apis or ()),
            max_request_bytes,
            None if request_log is None else Path(request_log).absolute(),
            log_prompts,
            otlp_traces_endpoint,
            trace_rate,
        )
        self._asked.check()
        self._installation = find_installation()
        self._settings = self._asked
        self._log = log
        self._process: ServerProcess | None = None
        self._ready = False
        self._starts = 0
        self._stop_requested = False
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
        """``HOST:PORT`` of KServe v2 over HTTP, as ``tritonclient`` takes it."""
        return self._address(self._settings.http_port)

    @property
    def grpc_url(self) -> str:
        """``HOST:PORT`` of KServe v2 over gRPC."""
        return self._address(self._settings.grpc_port)

    @property
    def metrics_url(self) -> str:
        """``HOST:PORT`` of the Prometheus metrics."""
        return self._address(self._settings.metrics_port)

    @property
    def exposure(self) -> str | None:
        """What is unsafe about the address it listens on, or None."""
        if is_loopback(self._settings.host) or not self._installation.is_bundled:
            return None
        return (
            f"{self._settings.host} is not a loopback address, and the Triton of nvidia-pytriton has known "
            "vulnerabilities: whoever reaches it may take it over; see SECURITY.md"
        )

    @property
    def shm_prefix(self) -> str:
        """What the names of the started server's regions in /dev/shm begin with."""
        return self._running().shm_prefix

    @property
    def log_tail(self) -> str:
        """The last lines of the server's log."""
        return "" if self._process is None else self._process.log_tail

    @property
    def returncode(self) -> int | None:
        """The server's exit code, 128 + n when signal n ended it, None while it runs."""
        return None if self._process is None else self._process.returncode

    @property
    def stop_requested(self) -> bool:
        """Whether the server was asked to end."""
        return self._stop_requested

    @property
    def end_reason(self) -> str:
        """Why a server that has ended did so unasked."""
        return self._running().end_reason

    def start(self) -> None:
        """Starts the process and returns at once; after the first time, on the same ports as before."""
        self._ready = False
        if not self._starts:
            self._settings = self._asked.with_free_ports()
        self._process = ServerProcess(self._installation, self._settings, self._log, restarts=self._starts)
        self._starts += 1
        if self._stop_requested:  # by a signal, meanwhile
            self._process.request_kill()

    def wait_ready(self) -> None:
        """Waits until all models are loaded and every port answers.

        Raises:
            ServerStartError: a model failed to load, a port was lost to another process, or the server ended.
        """
        chooses_ports = 0 in self._asked.ports().values()
        for attempt in range(1, PORT_ATTEMPTS + 1):
            failure = self._running().wait_started()
            if failure is None:
                self._check_health()
                self._running().request_watch()
                self._ready = True
                return
            self.clear_away()
            may_choose = chooses_ports and self._starts == 1
            if not (failure.port_lost and may_choose) or attempt == PORT_ATTEMPTS or self._stop_requested:
                raise ServerStartError(failure.message)
            self._starts = 0
            self.start()

    def request_stop(self) -> None:
        """Asks the server to finish what is in flight and end; returns at once, safe in a signal handler."""
        self._stop_requested = True
        os.eventfd_write(self._stop, 1)
        if self._process is not None and self._ready:
            self._process.request_stop()
        elif self._process is not None:  # nothing is in flight, and Triton would load all models first
            self._process.request_kill()

    def request_kill(self) -> None:
        """Asks the server to end now; returns at once, safe in a signal handler."""
        self._stop_requested = True
        os.eventfd_write(self._stop, 1)
        if self._process is not None:
            self._process.request_kill()

    def wait_for_stop(self, seconds: float) -> bool:
        """Waits until the server is asked to end (True), or the time is over."""
        return bool(select.select([self._stop], [], [], seconds)[0])

    def clear_away(self) -> None:
        """Ends and removes what is left of a server that broke or could not be started; it can be started again."""
        self._running().request_kill()
        self._running().wait()

    def stop(self) -> None:
        """Drains, ends and removes the server; nothing happens when it is gone already."""
        self.request_stop()
        self.wait()

    def kill(self) -> None:
        """Ends and removes the server at once."""
        self.request_kill()
        self.wait()

    def wait(self) -> int:
        """Waits for the server's end, whoever brings it about; returns its exit code, 0 if it was never started."""
        return 0 if self._process is None else self._process.wait()

    def _running(self) -> ServerProcess:
        if self._process is None:
            raise RuntimeError("the server has not been started")
        return self._process

    def _address(self, port: int) -> str:
        host = self._settings.host
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _check_health(self) -> None:
        host = _LOOPBACK_OF.get(self._settings.host, self._settings.host)
        connection = http.client.HTTPConnection(host, self._settings.http_port, timeout=HEALTH_TIMEOUT_SECONDS)
        try:
            connection.request("GET", "/v2/health/ready")
            answer: object = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            answer = error
        finally:
            connection.close()
        if answer != http.client.OK:
            raise ServerStartError(f"tritonserver started, and answered {answer} to /v2/health/ready")
