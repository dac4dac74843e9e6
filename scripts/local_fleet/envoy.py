"""Envoy's configuration: for each member of the pools an address of its own, its health, its limits and its TLS.

The gateway chooses the member of a request, so every member has a listener and a cluster of one endpoint. Envoy retries
nothing: the gateway does, where the request can still be completed within its deadline.

Envoy reads the listeners and clusters from files that are replaced by rename, so that members come and go while it
runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from local_fleet.certificates import KeyPair

Json = dict[str, Any]
TYPES: Final = "type.googleapis.com/envoy"
BUFFER_BYTES: Final = 32 << 20
STREAM_WINDOW_BYTES: Final = 16 << 20
CONNECTION_WINDOW_BYTES: Final = 64 << 20
MAX_STREAMS: Final = 1024
MAX_CONNECTIONS: Final = 1024
DRAIN_SECONDS: Final = 600
"""How long the requests of a member that was removed may continue."""


@dataclass(frozen=True)
class Route:
    """The way to a member: ``grpc://127.0.0.1:listen_port`` leads to ``host:port``."""

    name: str
    listen_port: int
    host: str
    port: int


@dataclass(frozen=True)
class Tls:
    """What Envoy presents to members, and the certificate of the authority that has signed theirs."""

    client: KeyPair
    authority: Path


def command(program: Path, folder: Path) -> list[str]:
    """Returns Envoy's command line over the configuration in a folder."""
    return [
        *(str(program), "-c", str(folder / "envoy.json"), "--log-level", "warning"),
        # One process replaces another only after its end; without this Envoy keeps regions in /dev/shm.
        *("--disable-hot-restart", "--concurrency", "1", "--drain-time-s", str(DRAIN_SECONDS)),
        *("--file-flush-interval-msec", "500"),
    ]


def write_bootstrap(folder: Path, admin_port: int) -> None:
    """Writes what Envoy reads once, at its start."""
    folder.mkdir(parents=True, exist_ok=True)

    def source(kind: str) -> Json:
        return {
            "resource_api_version": "V3",
            "path_config_source": {"path": str(folder / f"{kind}.json"), "watched_directory": {"path": str(folder)}},
        }

    bootstrap = {
        "node": {"id": "fleet", "cluster": "glm-image"},
        "admin": {"address": _address("127.0.0.1", admin_port)},
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": f"{TYPES}.extensions.resource_monitors.downstream_connections.v3"
                        ".DownstreamConnectionsConfig",
                        "max_active_downstream_connections": MAX_CONNECTIONS,
                    },
                }
            ]
        },
        "dynamic_resources": {"lds_config": source("listeners"), "cds_config": source("clusters")},
    }
    (folder / "envoy.json").write_text(json.dumps(bootstrap, indent=2))


def write_routes(folder: Path, routes: Iterable[Route], tls: Tls | None) -> None:
    """Replaces the ways to members; a running Envoy follows, and keeps those that have not changed."""
    routes = list(routes)
    # A listener that names a cluster which Envoy does not know yet would refuse requests.
    _replace(folder / "clusters.json", [_cluster(route, tls) for route in routes], "config.cluster.v3.Cluster")
    _replace(folder / "listeners.json", [_listener(route) for route in routes], "config.listener.v3.Listener")


def _replace(path: Path, resources: Iterable[Mapping[str, Any]], kind: str) -> None:
    typed = [{"@type": f"{TYPES}.{kind}", **resource} for resource in resources]
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"resources": typed}, indent=2))
    # Envoy watches for renames into the folder.
    new.rename(path)


def _address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _listener(route: Route) -> Json:
    prefix = f"{TYPES}.extensions.filters"
    manager = {
        "@type": f"{prefix}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": route.name,
        "codec_type": "HTTP2",
        "http2_protocol_options": {
            **_windows(),
            "max_concurrent_streams": MAX_STREAMS,
            "connection_keepalive": {"interval": "20s", "timeout": "10s"},
        },
        # The defaults end a request after 5 minutes without a byte, and in a route after 15 s.
        "stream_idle_timeout": "0s",
        "preserve_external_request_id": True,
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{prefix}.http.router.v3.Router"},
            }
        ],
        "route_config": {
            "name": route.name,
            "virtual_hosts": [
                {
                    "name": route.name,
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            # The deadline is the caller's grpc-timeout, if it sends one.
                            "route": {
                                "cluster": route.name,
                                "timeout": "0s",
                                "max_stream_duration": {"grpc_timeout_header_max": "0s"},
                            },
                        }
                    ],
                }
            ],
        },
    }
    return {
        "name": route.name,
        "address": _address("127.0.0.1", route.listen_port),
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _windows() -> Json:
    return {
        "initial_stream_window_size": STREAM_WINDOW_BYTES,
        "initial_connection_window_size": CONNECTION_WINDOW_BYTES,
    }


def _cluster(route: Route, tls: Tls | None) -> Json:
    http = {
        "@type": f"{TYPES}.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {
            "http2_protocol_options": {
                **_windows(),
                # Finds a member that is cut off or stopped, which TCP alone does in a quarter of an hour.
                "connection_keepalive": {"interval": "5s", "timeout": "5s"},
            }
        },
    }
    endpoint = {"endpoint": {"address": _address(route.host, route.port)}}
    return {
        "name": route.name,
        "type": "STATIC",
        "connect_timeout": "2s",
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "load_assignment": {"cluster_name": route.name, "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http},
        # A member that is known to be down is UNAVAILABLE immediately, not after a time-out.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "health_checks": [
            {
                "timeout": "2s",
                "interval": "2s",
                "no_traffic_interval": "2s",
                "unhealthy_interval": "1s",
                "no_traffic_healthy_interval": "2s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 1,
                # Triton: SERVING while all its models are ready, whatever service is named.
                "grpc_health_check": {},
            }
        ],
        "outlier_detection": {
            # Only broken connections eject a member: UNAVAILABLE of Triton is a full queue.
            "split_external_local_origin_errors": True,
            "consecutive_local_origin_failure": 3,
            "enforcing_consecutive_5xx": 0,
            "enforcing_consecutive_gateway_failure": 0,
            "enforcing_success_rate": 0,
            "enforcing_local_origin_success_rate": 0,
            "interval": "2s",
            "base_ejection_time": "5s",
            "max_ejection_time": "60s",
            "max_ejection_percent": 100,
        },
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": MAX_CONNECTIONS,
                    "max_pending_requests": MAX_STREAMS,
                    "max_requests": 4096,
                    "max_retries": 0,
                }
            ]
        },
        **({} if tls is None else {"transport_socket": _transport(route, tls)}),
    }


def _transport(route: Route, tls: Tls) -> Json:
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{TYPES}.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": route.name,
            "common_tls_context": {
                "alpn_protocols": ["h2"],
                "tls_certificates": [
                    {
                        "certificate_chain": {"filename": str(tls.client.certificate)},
                        "private_key": {"filename": str(tls.client.key)},
                    }
                ],
                "validation_context": {
                    "trusted_ca": {"filename": str(tls.authority)},
                    # The member itself, not another one that has taken its port.
                    "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": route.name}}],
                },
            },
        },
    }
