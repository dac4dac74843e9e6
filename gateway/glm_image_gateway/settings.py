"""The settings of a gateway: each is a flag, and an environment variable that has the flag's name."""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from glm_image_client.errors import BadArgumentError
from glm_image_client.transport import Endpoint

VARIABLE_PREFIX: Final = "GLM_IMAGE_GATEWAY_"
DEFAULT_PORT: Final = 8080
MAX_PORT: Final = 65535
DEFAULT_ALIASES: Final = ("glm-image", "zai-org/GLM-Image", "gpt-image-1")
MEBIBYTE: Final = 1 << 20


class SettingsError(Exception):
    """A setting is not allowed; the message is one sentence."""


def _flag(help_text: str, metavar: str | None, parse: Callable[[str], Any] = str, **default: Any) -> Any:
    return field(**default, metadata={"help": help_text, "metavar": metavar, "parse": parse})


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@dataclass(frozen=True)
class GatewaySettings:
    """The settings of a gateway.

    Raises:
        SettingsError: a setting is not allowed.
    """

    url: str = _flag("Triton's gRPC address", "URL", default="grpc://127.0.0.1:8001")
    ar: tuple[str, ...] = _flag(
        "members of the pool of glm_ar, with --dit in place of --url; a name stands for all its addresses",
        "URL,...",
        _names,
        default=(),
    )
    dit: tuple[str, ...] = _flag("members of the pool of glm_dit", "URL,...", _names, default=())
    proxy: str | None = _flag(
        "send calls to this address, with the member's in the header x-glm-image-member", "URL", default=None
    )
    tls_ca: Path | None = _flag(
        "certificates of authorities that sign those of grpcs:// members; default: the system's",
        "FILE",
        Path,
        default=None,
    )
    tls_cert: Path | None = _flag("certificate shown to grpcs:// members", "FILE", Path, default=None)
    tls_key: Path | None = _flag("its private key", "FILE", Path, default=None)
    max_retries: int = _flag("times that a call may fail at members of a pool and be sent again", "N", int, default=5)
    lost_seconds: float = _flag(
        "seconds without an answer after which calls of a member are sent to others", "N", float, default=15.0
    )
    host: str = _flag("address to listen on; others than loopback need --api-keys", "HOST", default="127.0.0.1")
    port: int = _flag("port to listen on; 0: any free one", "PORT", int, default=DEFAULT_PORT)
    grpc_port: int | None = _flag(
        "with pools: port of KServe's protocol over gRPC; 0: any free one", "PORT", int, default=None
    )
    api_keys: Path | None = _flag("file of API keys; without one every caller is admitted", "FILE", Path, default=None)
    store: str | None = _flag(
        "folder or fsspec URL of results; default: a folder of the user's state", "DIR_OR_URL", default=None
    )
    state: Path | None = _flag(
        "folder of the database of jobs and files; default: the store, if it is a folder", "DIR", Path, default=None
    )
    model_alias: tuple[str, ...] = _flag("names of the model", "NAME,...", _names, default=DEFAULT_ALIASES)
    strict: bool = _flag("refuse unknown fields of requests; otherwise `warnings` names them", None, default=False)
    cors_origins: tuple[str, ...] = _flag(
        "origins whose pages may send requests; * = all", "ORIGIN,...", _names, default=()
    )
    public_url: str | None = _flag(
        "address of the gateway in `url` results; default: the request's", "URL", default=None
    )
    max_body_bytes: int = _flag("largest body of a request", "N", int, default=64 * MEBIBYTE)
    request_seconds: float = _flag("deadline of a request", "N", float, default=600.0)
    file_hours: float = _flag("hours after which results are deleted", "N", float, default=24.0)
    store_bytes: int = _flag("size of all results above which the oldest are deleted", "N", int, default=10 << 30)
    max_running: int = _flag("with keys: requests that Triton has at the same time", "N", int, default=8)
    window_seconds: float = _flag(
        "with keys: predicted seconds of work that Triton has at the same time", "N", float, default=30.0
    )
    max_queue: int = _flag(
        "requests that wait in the gateway (with keys), and jobs that have not ended", "N", int, default=256
    )
    webhook_hosts: tuple[str, ...] = _flag(
        "hosts that jobs may name in `webhook`; default: none", "HOST,...", _names, default=()
    )
    stop_at_eof: bool = _flag("stop when standard input ends, as when a parent process dies", None, default=False)
    drain_seconds: int = _flag("time limit for requests in flight after a stop", "N", int, default=60)

    def __post_init__(self) -> None:
        self._check_addresses()
        for name in (
            "max_body_bytes",
            "request_seconds",
            "lost_seconds",
            "file_hours",
            "store_bytes",
            "max_running",
            "window_seconds",
        ):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{_flag_name(name)} is {getattr(self, name)}; allowed: above 0")
        for name in ("max_queue", "max_retries", "drain_seconds"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{_flag_name(name)} is {getattr(self, name)}; allowed: 0 or more")
        if not self.model_alias:
            raise SettingsError("--model-alias is empty; allowed: one name or more, separated by commas")
        if self.state is None and self.store is not None and "://" in self.store:
            raise SettingsError(f"--store is {self.store!r}, no folder; allowed: together with --state DIR")

    def _check_addresses(self) -> None:
        for flag, urls in (("--url", (self.url,)), ("--ar", self.ar), ("--dit", self.dit), ("--proxy", self._proxies)):
            for url in urls:
                grpc_endpoint(flag, url)
        if bool(self.ar) != bool(self.dit):
            given, missing = ("--ar", "--dit") if self.ar else ("--dit", "--ar")
            raise SettingsError(f"{given} is given without {missing}; allowed: both, or neither")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("of --tls-cert and --tls-key one is given; allowed: both, or neither")
        for flag, port in (("--port", self.port), ("--grpc-port", self.grpc_port or 0)):
            if not 0 <= port <= MAX_PORT:
                raise SettingsError(f"{flag} is {port}; allowed: 0 (any free one) to {MAX_PORT}")
        if self.grpc_port is not None and not self.ar:
            raise SettingsError("--grpc-port is given without --ar and --dit; allowed: with both")
        if self.api_keys is None and not is_loopback(self.host):
            raise SettingsError(
                f"--host is {self.host!r}; allowed without --api-keys: 127.0.0.1, ::1 or another loopback address"
            )
        if self.public_url is not None and urlsplit(self.public_url).scheme not in {"http", "https"}:
            raise SettingsError(f"--public-url is {self.public_url!r}; allowed: http:// or https://")

    @property
    def server(self) -> str:
        """The addresses of the server, or of the members of the pools."""
        return ",".join((*self.ar, *self.dit)) or self.url

    @property
    def _proxies(self) -> tuple[str, ...]:
        return () if self.proxy is None else (self.proxy,)

    @property
    def state_folder(self) -> Path:
        """The folder of the database."""
        if self.state is not None:
            return self.state
        return Path(self.store) if self.store is not None else self._default_folder()

    @property
    def store_url(self) -> str:
        return self.store if self.store is not None else str(self.state_folder / "files")

    def _default_folder(self) -> Path:
        # One for each port, since two gateways may not share a database.
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return Path(base) / "glm-image-gateway" / str(self.port)


def grpc_endpoint(flag: str, url: str) -> Endpoint:
    """Returns the endpoint of a gRPC address; raises ``SettingsError`` if it is none."""
    try:
        endpoint = Endpoint.parse(url)
    except BadArgumentError:
        endpoint = None
    if endpoint is None or endpoint.protocol != "grpc":
        raise SettingsError(f"{flag} is {url!r}; allowed: grpc://HOST:PORT or grpcs://HOST:PORT")
    return endpoint


def is_loopback(host: str) -> bool:
    """Whether ``host`` is ``localhost`` or a loopback address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_settings(
    arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ
) -> GatewaySettings:
    """Returns the settings of a command line; a flag that is not given has the value of its variable.

    Raises:
        SettingsError: a setting is not allowed. An unknown flag ends the process with code 2.
    """
    parser = argparse.ArgumentParser(
        prog="gateway", description="Serves OpenAI's image API in front of a GLM-Image server."
    )
    for declared in fields(GatewaySettings):
        name, help_text = _flag_name(declared.name), declared.metadata["help"]
        if declared.metadata["metavar"] is None:
            parser.add_argument(name, action="store_const", const="1", help=help_text)
        else:
            parser.add_argument(
                name, metavar=declared.metadata["metavar"], help=f"{help_text} ({_shown_default(declared)})"
            )
    given = vars(parser.parse_args(arguments))
    values: dict[str, Any] = {}
    for declared in fields(GatewaySettings):
        text = given[declared.name]
        if text is None:
            text = environment.get(VARIABLE_PREFIX + declared.name.upper())
        if text is not None and text != "":
            values[declared.name] = _parsed(declared.name, text, declared.metadata)
    return GatewaySettings(**values)


def _parsed(name: str, text: str, metadata: Mapping[str, Any]) -> Any:
    if metadata["metavar"] is None:
        if text not in {"0", "1"}:
            raise SettingsError(f"{VARIABLE_PREFIX}{name.upper()} is {text!r}; allowed: 0 or 1")
        return text == "1"
    try:
        return metadata["parse"](text)
    except ValueError:
        raise SettingsError(f"{_flag_name(name)} is {text!r}; allowed: a number") from None


def _flag_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown_default(declared: Any) -> str:
    default = declared.default
    shown = ",".join(default) if isinstance(default, tuple) else default
    return "default: none" if shown is None or shown == "" else f"default: {shown}"
