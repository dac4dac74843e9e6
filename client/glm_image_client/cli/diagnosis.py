"""What answers at an address where no GLM-Image server does: nothing, one that is loading, another port or service."""

from __future__ import annotations

import http.client
import json
import os
import socket
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from glm_image_client.calls import ENSEMBLE
from glm_image_client.errors import reason_of
from glm_image_client.transport import Endpoint

CONNECT_SECONDS: Final = 2.0
LOOPBACK_HOSTS: Final = {"127.0.0.1", "localhost", "::1"}
SERVE_HINT: Final = "start one with `glm-image serve --checkpoint DIR`, or wait for one that is starting with --wait"

Service = Literal["kserve", "metrics", "http", "grpc", "unknown"]


class Fault(NamedTuple):
    """Why no GLM-Image server answers; ``may_pass`` = waiting may help."""

    message: str
    may_pass: bool


def diagnose(endpoint: Endpoint) -> Fault | None:
    """Returns why no GLM-Image server answers at an endpoint; None if a service of the right protocol does."""
    address = endpoint.address
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        if host in LOOPBACK_HOSTS and _is_starting(port):
            return Fault(f"the server at {address} is loading its models; wait for it with --wait", may_pass=True)
        hint = f"; {SERVE_HINT}" if host in LOOPBACK_HOSTS else "; it may be starting: wait for it with --wait"
        return Fault(f"no server answers at {address}: {reason_of(error)}{hint}", may_pass=True)
    if endpoint.tls:
        return None
    return _wrong_service(endpoint, service_at(host, port))


def _wrong_service(endpoint: Endpoint, service: Service) -> Fault | None:
    address = endpoint.address
    if service == "metrics":
        return Fault(f"{address} is a port of metrics; use one that the server prints when it is ready", False)
    if service == "kserve" and endpoint.protocol == "grpc":
        return Fault(f"{address} speaks HTTP, not gRPC; use --url http://{address}", False)
    if service == "grpc" and endpoint.protocol == "http":
        return Fault(f"{address} speaks gRPC, not HTTP; use --url grpc://{address}", False)
    if service in ("http", "unknown"):
        return Fault(f"the service at {address} is not a GLM-Image server; check --url", False)
    if service == "kserve" and _lacks_model(*_host_and_port(address)):
        return Fault(f"the Triton server at {address} does not serve {ENSEMBLE}; check --url", False)
    return None


def service_at(host: str, port: int) -> Service:
    """Returns the kind of service behind a port."""
    try:
        with closing(http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)) as connection:
            connection.request("GET", "/v2")
            answer = connection.getresponse().read()
    except http.client.BadStatusLine as error:
        # The first frame of HTTP/2, SETTINGS, begins with its length; http.client takes it for a status line.
        return "grpc" if str(error).startswith(("\0", "'\\x00")) else "unknown"
    except (OSError, http.client.HTTPException):
        return "unknown"
    with suppress(ValueError):
        if "extensions" in json.loads(answer):
            return "kserve"
    return "metrics" if _status(host, port, "/metrics") == http.client.OK else "http"


def _lacks_model(host: str, port: int) -> bool:
    is_ready = _status(host, port, "/v2/health/ready") == http.client.OK
    return is_ready and _status(host, port, f"/v2/models/{ENSEMBLE}") != http.client.OK


def _status(host: str, port: int, path: str) -> int | None:
    try:
        with closing(http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)) as connection:
            connection.request("GET", path)
            return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None


def _is_starting(port: int) -> bool:
    """Whether a server of this user on this machine has the port and does not listen yet; see ``serve``."""
    # ``serve`` takes the first of these that suits it.
    folders = [
        tempfile.gettempdir(),
        os.environ.get("XDG_RUNTIME_DIR") or "/run",
        "/run",
        "/tmp",
        "/var/tmp",
        "/dev/shm",
    ]
    for file in (file for folder in folders for file in Path(folder).glob("glm-image-serve-*/ports.json")):
        with suppress(OSError, ValueError, LookupError, TypeError):
            server: Any = json.loads(file.read_text())
            os.kill(server["pid"], 0)
            if port in server["ports"]:
                return True
    return False


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.partition("/")[0].rpartition(":")
    return host.strip("[]"), int(port)
