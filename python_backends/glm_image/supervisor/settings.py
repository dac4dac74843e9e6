"""The settings of a server, one dataclass from which ``serve`` takes its flags; and their checks."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glm_image.config.models import ENTRY_MODELS, STAGES
from glm_image.errors import CheckpointError, ConfigurationError, shown
from glm_image.supervisor.api_access import CLOSABLE_APIS, DEFAULT_MAX_REQUEST_BYTES, check_open_apis

MAX_PORT = 65535
REPOSITORY_VARIABLE = "GLM_IMAGE_MODEL_REPOSITORY"

SPIN_VARIABLE, SPIN_COUNT = "GOMP_SPINCOUNT", "5000"
"""Iterations, about 50 us, for which an idle OpenMP thread spins before it sleeps.

OpenMP's default is 3 ms, which is wasted when another process runs on the core of the thread that is waited for. With
the trained tiny checkpoint, on two cores shared with two busy processes, decoding an image took 7 to 32 s with the
default and 3 to 5 s with this value; on an idle machine 1.5 and 1.7 s.
"""


def default_model_repository() -> Path:
    """Returns the repository that GLM_IMAGE_MODEL_REPOSITORY names, else that of the checkout this package is in.

    Raises:
        ConfigurationError: there is neither.
    """
    if path := os.environ.get(REPOSITORY_VARIABLE):
        return Path(path).absolute()
    folder = Path(__file__).resolve().parents[3] / "model_repository"
    if folder.is_dir():
        return folder
    raise ConfigurationError(
        f"no model repository: this package is not in a checkout; give --model-repository or set {REPOSITORY_VARIABLE}"
    )


def flag(
    help_text: str, metavar: str | None = None, parse: Callable[[str], Any] | None = None, **default: Any
) -> dict[str, Any]:
    """Returns the metadata of a field that is a flag of ``serve``; see ``cli.add_flags``.

    Args:
        help_text: the flag's help; ``%(default)s`` is its default.
        metavar: the name of its value; None for a switch.
        parse: converts the value; None = ``str``.
        default: ``default=``, where the flag's default is not the field's.
    """
    return {"help": help_text, "metavar": metavar, "type": parse, **default}


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server; the metadata of each field describes it as a flag of ``serve``.

    Port 0 asks for a free one. Triton waits up to ``drain_seconds`` also for HTTP clients that keep an idle connection
    open.
    """

    checkpoint: Path = field(metadata=flag("folder with model_index.json", "DIR", Path))
    profile: str | None = field(
        default=None, metadata=flag("a file of a model's configs folder, without .pbtxt", "NAME")
    )
    host: str = field(default="127.0.0.1", metadata=flag("address to listen on (default: %(default)s)", "HOST"))
    http_port: int = field(default=0, metadata=flag("default: %(default)s; 0: any free one", "PORT", int, default=8000))
    grpc_port: int = field(default=0, metadata=flag("default: %(default)s; 0: any free one", "PORT", int, default=8001))
    metrics_port: int = field(
        default=0, metadata=flag("default: %(default)s; 0: any free one", "PORT", int, default=8002)
    )
    drain_seconds: int = field(
        default=60, metadata=flag("time limit for requests in flight after a stop (default: %(default)s)", "N", int)
    )
    open_apis: tuple[str, ...] = field(
        default=(),
        metadata=flag(
            f"APIs to open, of {', '.join(CLOSABLE_APIS)} (default: none)",
            "NAME,...",
            lambda names: tuple(names.split(",")),
        ),
    )
    max_request_bytes: int = field(
        default=DEFAULT_MAX_REQUEST_BYTES,
        metadata=flag(
            "largest body of an HTTP request, where Triton has such a limit (default: %(default)s)", "N", int
        ),
    )
    request_log: Path | None = field(
        default=None, metadata=flag("file of the request log (default: standard error, with the log)", "FILE", Path)
    )
    log_prompts: bool = field(
        default=False, metadata=flag("put prompts, and the values that refusals quote, into the request log")
    )
    otlp_traces_endpoint: str | None = field(
        default=None, metadata=flag("OpenTelemetry collector, as http://127.0.0.1:4318/v1/traces", "URL")
    )
    trace_rate: int = field(default=1, metadata=flag("trace one request of every N (default: %(default)s)", "N", int))
    model_repository: Path = field(
        default_factory=default_model_repository, metadata=flag("default: the checkout's model_repository", "DIR", Path)
    )

    def check(self) -> None:
        """Checks everything that can be checked without a server.

        Raises:
            CheckpointError: the checkpoint folder is missing or not a checkpoint.
            ConfigurationError: another setting is invalid.
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
                f"--request-log is {shown(str(self.request_log))}, whose folder does not exist; allowed: a file's path"
            )
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ConfigurationError(f"--otlp-traces-endpoint is {shown(endpoint)}; allowed: http:// or https://")
        if self.trace_rate < 1:
            raise ConfigurationError(f"--trace-rate is {self.trace_rate}; allowed: 1 or more")
        check_open_apis(self.open_apis)
        self._check_ports()

    def _check_ports(self) -> None:
        flags: dict[int, str] = {}
        for name, port in self.ports().items():
            if not 0 <= port <= MAX_PORT:
                raise ConfigurationError(f"{name} is {port}; allowed: 0 (any free one) to {MAX_PORT}")
            if port in flags:
                raise ConfigurationError(f"{name} is {port}, which is also {flags[port]}; allowed: a port of its own")
            if port:
                flags[port] = name
                _check_port_is_free(self.host, port, name)

    def absolute(self) -> ServerSettings:
        """Returns the settings with absolute paths, since models have another working directory."""
        return replace(
            self,
            checkpoint=self.checkpoint.absolute(),
            model_repository=self.model_repository.absolute(),
            request_log=self.request_log and self.request_log.absolute(),
        )

    def model_environment(self) -> dict[str, str]:
        """Returns the environment variables through which the models' processes are configured."""
        optional = {
            "GLM_IMAGE_LOG_PROMPTS": "1" if self.log_prompts else None,
            "GLM_IMAGE_REQUEST_LOG": str(self.request_log) if self.request_log else None,
            "GLM_IMAGE_OTLP_TRACES_ENDPOINT": self.otlp_traces_endpoint,
        }
        return {
            "GLM_IMAGE_CHECKPOINT": str(self.checkpoint),
            SPIN_VARIABLE: os.environ.get(SPIN_VARIABLE, SPIN_COUNT),
            **{name: value for name, value in optional.items() if value},
        }

    def trace_flags(self) -> list[str]:
        """Returns the flags with which Triton sends spans, and forwards their context to the models."""
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
        """Returns the three ports by the flag that sets each."""
        return {"--http-port": self.http_port, "--grpc-port": self.grpc_port, "--metrics-port": self.metrics_port}

    def with_free_ports(self) -> ServerSettings:
        """Returns the settings with every port 0 replaced by a free one."""
        free = free_ports(self.host, 3)
        http, grpc, metrics = (port or free.pop() for port in self.ports().values())
        return replace(self, http_port=http, grpc_port=grpc, metrics_port=metrics)


def models_by_role(repository: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Returns a repository's entry models, which forward requests to others, and its stages."""
    models = frozenset(model.name for model in model_folders(repository))
    return models.intersection(ENTRY_MODELS), models.intersection(STAGES)


def model_folders(repository: Path) -> list[Path]:
    """Returns the models of a repository: its folders that hold a ``config.pbtxt``."""
    return sorted(config.parent for config in repository.glob("*/config.pbtxt"))


def known_profiles(models: list[Path]) -> list[str]:
    """Returns the names of the profiles that at least one of the models has."""
    return sorted({profile.stem for model in models for profile in model.glob("configs/*.pbtxt")})


def free_ports(host: str, count: int) -> list[int]:
    """Returns ``count`` different free ports of ``host``."""
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


def _check_port_is_free(host: str, port: int, name: str) -> None:
    try:
        _bound_socket(host, port).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"{name} is {port}, on which {host} already listens; allowed: a free port, or 0"
            ) from None
        if error.errno == errno.EACCES:
            raise ConfigurationError(
                f"{name} is {port}, which this user may not listen on; allowed: 1024 and up"
            ) from None
        raise


def _bound_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    # As a server binds it: a port whose last connections are in TIME_WAIT is free.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise ConfigurationError(f"--host is {shown(host)}; allowed: an address of this machine") from None
        raise
    return bound
