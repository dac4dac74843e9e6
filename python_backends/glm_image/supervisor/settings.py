"""The settings of a server and their checks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from glm_image.config.models import ENTRY_MODELS, POOL_MODELS, SERVED_VARIABLE, STAGE_STREAMS, STAGES
from glm_image.errors import CheckpointError, ConfigurationError, shown
from glm_image.supervisor.addresses import numeric_address
from glm_image.supervisor.api_access import CLOSABLE_APIS, DEFAULT_MAX_REQUEST_BYTES, check_open_apis
from glm_image.supervisor.flags import flag
from glm_image.supervisor.paths import check_log_file, folder_fault
from glm_image.supervisor.ports import ReservedPorts
from glm_image.supervisor.python_environment import Plain
from glm_image.supervisor.run_directory import is_plain
from glm_image.supervisor.tls import TlsFiles

MAX_PORT = 65535
REPOSITORY_VARIABLE = "GLM_IMAGE_MODEL_REPOSITORY"
PORT_HELP = "default: %(default)s; 0: any free one"

SPIN_VARIABLE, SPIN_COUNT = "GOMP_SPINCOUNT", "5000"
"""Iterations, about 50 us, for which an idle OpenMP thread spins before it sleeps.

OpenMP's default is 3 ms, which is wasted when another process runs on the core of the thread that is waited for. With
the trained tiny checkpoint, on two cores shared with two busy processes, decoding an image took 7 to 32 s with the
default and 3 to 5 s with this value; on an idle machine 1.5 and 1.7 s.
"""


def default_model_repository() -> Path:
    """Returns the repository that GLM_IMAGE_MODEL_REPOSITORY names, else that of the wheel or the checkout.

    Raises:
        ConfigurationError: there is neither.
    """
    if path := os.environ.get(REPOSITORY_VARIABLE):
        return Path(path).absolute()
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "model_repository", package.parents[1] / "model_repository"):
        if folder.is_dir():
            return folder
    raise ConfigurationError(
        f"no model repository: {package} has none and is not in a checkout; give --model-repository or set "
        f"{REPOSITORY_VARIABLE}"
    )


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server, each a flag of ``serve``.

    Triton waits up to ``drain_seconds`` also for HTTP clients that keep an idle connection open.
    """

    checkpoint: Path = flag("folder with model_index.json", "DIR", Path)
    profile: str | None = flag("a file of a model's configs folder, without .pbtxt", "NAME", default=None)
    models: tuple[str, ...] = flag(
        f"stages to serve, of {', '.join(POOL_MODELS)}, as a member of a pool (default: all models)",
        "NAME,...",
        lambda names: tuple(dict.fromkeys(names.split(","))),
        default=(),
    )
    host: str = flag("address to listen on (default: %(default)s)", "HOST", default="127.0.0.1")
    http_port: int = flag(PORT_HELP, "PORT", int, default=0, flag_default=8000)
    grpc_port: int = flag(PORT_HELP, "PORT", int, default=0, flag_default=8001)
    metrics_port: int = flag(PORT_HELP, "PORT", int, default=0, flag_default=8002)
    drain_seconds: int = flag(
        "time limit for requests in flight after a stop (default: %(default)s)", "N", int, default=60
    )
    open_apis: tuple[str, ...] = flag(
        f"APIs to open, of {', '.join(CLOSABLE_APIS)} (default: none)",
        "NAME,...",
        lambda names: tuple(names.split(",")),
        default=(),
    )
    max_request_bytes: int = flag(
        "largest body of an HTTP request, where Triton has such a limit (default: %(default)s)",
        "N",
        int,
        default=DEFAULT_MAX_REQUEST_BYTES,
    )
    grpc_server_cert: Path | None = flag(
        "certificate in PEM format, for TLS of the gRPC port (default: none, no TLS)", "FILE", Path, default=None
    )
    grpc_server_key: Path | None = flag("private key of the certificate (default: none)", "FILE", Path, default=None)
    grpc_root_cert: Path | None = flag(
        "certificates of the authorities of clients, which then need a certificate (default: none)",
        "FILE",
        Path,
        default=None,
    )
    request_log: Path | None = flag(
        "file of the request log (default: standard error, with the log)", "FILE", Path, default=None
    )
    log_prompts: bool = flag("put prompts, and the values that refusals quote, into the request log", default=False)
    otlp_traces_endpoint: str | None = flag(
        "OpenTelemetry collector, as http://127.0.0.1:4318/v1/traces", "URL", default=None
    )
    trace_rate: int = flag("trace one request of every N (default: %(default)s)", "N", int, default=1)
    model_repository: Path = flag(
        "default: the one of this package", "DIR", Path, default_factory=default_model_repository
    )

    @property
    def tls(self) -> TlsFiles:
        """The files of the gRPC port's TLS."""
        return TlsFiles(self.grpc_server_cert, self.grpc_server_key, self.grpc_root_cert)

    def check(self) -> None:
        """Raises CheckpointError for an invalid checkpoint folder, ConfigurationError for another invalid setting."""
        fault = folder_fault(self.checkpoint, "model_index.json")
        if fault is not None:
            shown_path = shown(str(self.checkpoint))
            raise CheckpointError(f"--checkpoint is {shown_path}, which {fault}; allowed: a checkpoint folder")
        models = _checked_models(self.model_repository)
        self._check_stages({model.name for model in models})
        profiles = sorted({profile.stem for model in models for profile in model.glob("configs/*.pbtxt")})
        if self.profile is not None and self.profile not in profiles:
            allowed = ", ".join(profiles) or "none, no model has any"
            raise ConfigurationError(f"--profile is {shown(self.profile)}; allowed: {allowed}")
        for name, lowest in (("drain_seconds", 0), ("max_request_bytes", 1), ("trace_rate", 1)):
            if getattr(self, name) < lowest:
                flag_name = name.replace("_", "-")
                raise ConfigurationError(f"--{flag_name} is {getattr(self, name)}; allowed: {lowest} or more")
        if self.request_log is not None:
            check_log_file("--request-log", self.request_log)
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ConfigurationError(f"--otlp-traces-endpoint is {shown(endpoint)}; allowed: http:// or https://")
        check_open_apis(self.open_apis)
        self.tls.check()
        self._check_ports()

    def _check_stages(self, present: set[str]) -> None:
        for stage in self.models:
            if stage not in POOL_MODELS:
                raise ConfigurationError(f"--models has {shown(stage)}; allowed: {', '.join(POOL_MODELS)}")
        if missing := sorted({model for stage in self.models for model in POOL_MODELS[stage]} - present):
            repository = shown(str(self.model_repository))
            raise ConfigurationError(
                f"--models needs {', '.join(missing)}, which the model repository {repository} lacks; allowed: a "
                "repository that has them"
            )

    def _check_ports(self) -> None:
        flags: dict[int, str] = {}
        for name, port in self.ports().items():
            if not 0 <= port <= MAX_PORT:
                raise ConfigurationError(f"{name} is {port}; allowed: 0 (any free one) to {MAX_PORT}")
            if port in flags:
                raise ConfigurationError(f"{name} is {port}, which is also {flags[port]}; allowed: a port of its own")
            if port:
                flags[port] = name
        ReservedPorts(self.host, self.ports()).release()

    def absolute(self) -> ServerSettings:
        """Returns the settings with absolute paths, since models have another working directory, and a numeric host.

        Raises:
            ConfigurationError: a path is relative, and the working directory has been removed; or the host is unknown.
        """
        try:
            return replace(
                self,
                host=numeric_address(self.host),
                checkpoint=self.checkpoint.absolute(),
                model_repository=self.model_repository.absolute(),
                request_log=self.request_log and self.request_log.absolute(),
                grpc_server_cert=self.grpc_server_cert and self.grpc_server_cert.absolute(),
                grpc_server_key=self.grpc_server_key and self.grpc_server_key.absolute(),
                grpc_root_cert=self.grpc_root_cert and self.grpc_root_cert.absolute(),
            )
        except OSError as error:
            raise ConfigurationError(
                f"a relative path is given, and the working directory cannot be used: {error.strerror}; "
                "allowed: an absolute path, or another working directory"
            ) from None

    def model_environment(self, plain: Plain) -> dict[str, str]:
        """Returns the environment variables through which the models' processes are configured."""
        optional = {
            SERVED_VARIABLE: ",".join(self.models),
            "GLM_IMAGE_LOG_PROMPTS": "1" if self.log_prompts else None,
            "GLM_IMAGE_REQUEST_LOG": plain(self.request_log, "requests") if self.request_log else None,
            "GLM_IMAGE_OTLP_TRACES_ENDPOINT": self.otlp_traces_endpoint,
        }
        return {
            "GLM_IMAGE_CHECKPOINT": plain(self.checkpoint, "checkpoint"),
            SPIN_VARIABLE: os.environ.get(SPIN_VARIABLE, SPIN_COUNT),
            **{name: value for name, value in optional.items() if value},
        }

    def trace_flags(self) -> list[str]:
        """Returns the flags with which Triton sends spans and forwards their context to the models."""
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

    def with_ports(self, ports: Mapping[str, int]) -> ServerSettings:
        """Returns the settings with other ports, given by the flag that sets each."""
        return replace(
            self,
            http_port=ports["--http-port"],
            grpc_port=ports["--grpc-port"],
            metrics_port=ports["--metrics-port"],
        )

    def loaded_models(self) -> list[str]:
        """Returns the names of the models that the server loads."""
        if self.models:
            return sorted({model for stage in self.models for model in POOL_MODELS[stage]})
        return [model.name for model in _model_folders(self.model_repository) if model.name not in STAGE_STREAMS]


def models_by_role(models: Iterable[str]) -> tuple[frozenset[str], frozenset[str]]:
    """Returns the entry models, which forward requests to others, and the stages among the models."""
    names = frozenset(models)
    return names.intersection(ENTRY_MODELS), names.intersection(STAGES)


def _checked_models(repository: Path) -> list[Path]:
    fault = folder_fault(repository)
    models = [] if fault else _model_folders(repository)
    if not models:
        raise ConfigurationError(
            f"the model repository is {shown(str(repository))}{f', which {fault}' if fault else ''}; allowed: "
            "a folder that holds a folder with a config.pbtxt for each model"
        )
    for model in models:
        if not is_plain(model.name):
            allowed = "letters and digits of ASCII, and _ . + @ = -"
            raise ConfigurationError(f"the model repository has the model {shown(model.name)}; allowed: {allowed}")
    return models


def _model_folders(repository: Path) -> list[Path]:
    return sorted(config.parent for config in repository.glob("*/config.pbtxt"))
