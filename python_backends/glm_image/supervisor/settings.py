"""What a server is started with, and the refusals that need no server."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

from glm_image.config.models import ENTRY_MODELS, STAGES
from glm_image.errors import CheckpointError, ConfigurationError, shown
from glm_image.supervisor.api_access import DEFAULT_MAX_REQUEST_BYTES, check_open_apis

LARGEST_PORT = 65535
REPOSITORY_VARIABLE = "GLM_IMAGE_MODEL_REPOSITORY"

SPIN_VARIABLE, SPINS = "GOMP_SPINCOUNT", "5000"
"""How long the threads of a step on the host wait for each other awake, about 50 us: a step is many small pieces.

Unless told, they do so for 3 ms, in vain where other work has the core of the one they wait for: with the trained tiny
checkpoint, on two cores beside two busy processes, decoding a picture took 7 to 32 s so and 3 to 5 s with this; 1.5 and
1.7 s on a quiet machine.
"""


@dataclass(frozen=True)
class ServerSettings:
    """The flags of ``serve``.

    Port 0 asks for a free one; ``profile`` names a file of a model's ``configs`` folder; ``open_apis`` are those of
    ``access.CLOSABLE_APIS`` that are not to be closed; ``max_request_bytes`` is the largest body of an HTTP request,
    where the server has such a limit; ``request_log`` is the file of request lines, None the server's own log; with
    ``log_prompts`` these lines hold prompts; ``otlp_traces_endpoint`` takes OpenTelemetry spans, of one request in
    ``trace_rate``.
    """

    checkpoint: Path
    model_repository: Path
    profile: str | None = None
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    drain_seconds: int = 60
    open_apis: tuple[str, ...] = ()
    max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES
    request_log: Path | None = None
    log_prompts: bool = False
    otlp_traces_endpoint: str | None = None
    trace_rate: int = 1

    def check(self) -> None:
        """Refuses what a server could not be started with.

        Raises:
            CheckpointError: the checkpoint folder is missing or not a checkpoint.
            ConfigurationError: the repository, the profile, a port or another flag is not usable.
        """
        _check_checkpoint(self.checkpoint)
        models = model_folders(self.model_repository)
        if not models:
            raise ConfigurationError(
                f"the model repository is {shown(str(self.model_repository))}; allowed: "
                "a folder that holds a folder with a config.pbtxt for each model"
            )
        if self.profile is not None:
            _check_profile(self.profile, known_profiles(models))
        if self.drain_seconds < 0:
            raise ConfigurationError(f"--drain-seconds is {self.drain_seconds}; allowed: 0 or more")
        if self.max_request_bytes < 1:
            raise ConfigurationError(f"--max-request-bytes is {self.max_request_bytes}; allowed: 1 or more")
        if self.request_log is not None and not self.request_log.parent.is_dir():
            raise ConfigurationError(
                f"--request-log is {shown(str(self.request_log))}, whose folder is not there; allowed: a file's path"
            )
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ConfigurationError(f"--otlp-traces-endpoint is {shown(endpoint)}; allowed: http:// or https://")
        if self.trace_rate < 1:
            raise ConfigurationError(f"--trace-rate is {self.trace_rate}; allowed: 1 or more")
        check_open_apis(self.open_apis)
        self._check_ports()

    def _check_ports(self) -> None:
        taken: dict[int, str] = {}
        for flag, port in self.ports().items():
            if not 0 <= port <= LARGEST_PORT:
                raise ConfigurationError(f"{flag} is {port}; allowed: 0 (any free one) to {LARGEST_PORT}")
            if port in taken:
                raise ConfigurationError(f"{flag} is {port}, which is also {taken[port]}; allowed: a port of its own")
            if port:
                taken[port] = flag
                _check_port_is_free(self.host, port, flag)

    def model_environment(self) -> dict[str, str]:
        """What the models' processes find in their environment."""
        prompts = {"GLM_IMAGE_LOG_PROMPTS": "1"} if self.log_prompts else {}
        lines = {"GLM_IMAGE_REQUEST_LOG": str(self.request_log)} if self.request_log else {}
        endpoint = self.otlp_traces_endpoint
        traces = {"GLM_IMAGE_OTLP_TRACES_ENDPOINT": endpoint} if endpoint else {}
        spins = {SPIN_VARIABLE: os.environ.get(SPIN_VARIABLE, SPINS)}
        return {"GLM_IMAGE_CHECKPOINT": str(self.checkpoint), **lines, **prompts, **traces, **spins}

    def trace_flags(self) -> list[str]:
        """The flags with which Triton sends spans, and hands their context on to the models."""
        if self.otlp_traces_endpoint is None:
            return []
        return [
            f"--trace-config={setting}"
            for setting in (
                "mode=opentelemetry",
                "level=TIMESTAMPS",
                f"rate={self.trace_rate}",
                f"opentelemetry,url={self.otlp_traces_endpoint}",
                "opentelemetry,resource=service.name=glm-image-triton",
            )
        ]

    def ports(self) -> dict[str, int]:
        """The three ports by the flag that sets each."""
        return {"--http-port": self.http_port, "--grpc-port": self.grpc_port, "--metrics-port": self.metrics_port}

    def with_free_ports(self) -> ServerSettings:
        """The same settings with every port 0 replaced by one that is free now."""
        free = free_ports(self.host, 3)
        http, grpc, metrics = (port or free.pop() for port in self.ports().values())
        return replace(self, http_port=http, grpc_port=grpc, metrics_port=metrics)


def unloading_of(repository: Path) -> tuple[frozenset[str], frozenset[str]]:
    """The models of a repository that take whole requests and hand them to others, and these others."""
    models = frozenset(model.name for model in model_folders(repository))
    return models.intersection(ENTRY_MODELS), models.intersection(STAGES)


def default_model_repository() -> Path:
    """The repository named by GLM_IMAGE_MODEL_REPOSITORY, else the one of the checkout this package lies in.

    Raises:
        ConfigurationError: neither is there.
    """
    if named := os.environ.get(REPOSITORY_VARIABLE):
        return Path(named).absolute()
    folder = Path(__file__).resolve().parents[3] / "model_repository"
    if folder.is_dir():
        return folder
    raise ConfigurationError(
        "no model repository: this package does not lie in a checkout; "
        f"give --model-repository or set {REPOSITORY_VARIABLE}"
    )


def model_folders(repository: Path) -> list[Path]:
    """The models of a repository: its folders that hold a ``config.pbtxt``."""
    return sorted(config.parent for config in repository.glob("*/config.pbtxt"))


def known_profiles(models: list[Path]) -> list[str]:
    """The names of the profiles that at least one of the models has."""
    return sorted({profile.stem for model in models for profile in model.glob("configs/*.pbtxt")})


def free_ports(host: str, count: int) -> list[int]:
    """Returns ``count`` different ports of ``host`` on which nobody listens now."""
    sockets = [_bound_socket(host, 0) for _ in range(count)]
    ports = [int(bound.getsockname()[1]) for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


def _check_checkpoint(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        raise CheckpointError(f"--checkpoint is {shown(str(checkpoint))}, which is not a folder; allowed: a checkpoint")
    if not (checkpoint / "model_index.json").is_file():
        raise CheckpointError(
            f"--checkpoint is {shown(str(checkpoint))}, which has no model_index.json; allowed: a checkpoint folder"
        )


def _check_profile(profile: str, known: list[str]) -> None:
    if profile not in known:
        raise ConfigurationError(
            f"--profile is {shown(profile)}; allowed: {', '.join(known) or 'none, no model has any'}"
        )


def _check_port_is_free(host: str, port: int, flag: str) -> None:
    try:
        _bound_socket(host, port).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"{flag} is {port}, on which {host} already listens; allowed: a free port, or 0"
            ) from None
        if error.errno == errno.EACCES:
            raise ConfigurationError(
                f"{flag} is {port}, which this user may not listen on; allowed: 1024 and up"
            ) from None
        raise


def _bound_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    # As a server binds it: a port whose last connections are still closing down is free.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise ConfigurationError(f"--host is {shown(host)}; allowed: an address of this machine") from None
        raise
    return bound
