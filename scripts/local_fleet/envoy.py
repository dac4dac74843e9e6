"""Envoy's configuration: one address for the members of both pools, their health, their limits and their TLS.

The gateway chooses the member of a request and names it in a header; Envoy passes the request to this member or to
none. It retries nothing: the gateway does, where the request can still be completed within its deadline.

Envoy reads each pool's members from a file that is replaced by rename, so that they come and go while it runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from local_fleet.certificates import KeyPair

Json = dict[str, Any]
TYPES: Final = "type.googleapis.com/envoy"
POOL_HEADER: Final = "pool"
MEMBER_HEADER: Final = "x-glm-image-member"
"""``HOST:PORT`` of the member that a request is for."""
MEMBER_KEY: Final = "member"
BUFFER_BYTES: Final = 32 << 20
STREAM_WINDOW_BYTES: Final = 16 << 20
CONNECTION_WINDOW_BYTES: Final = 64 << 20
MAX_STREAMS: Final = 1024
MAX_CONNECTIONS: Final = 1024
MAX_REQUESTS: Final = 4096


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
        *("--disable-hot-restart", "--concurrency", "1"),
    ]


def write_bootstrap(folder: Path, port: int, admin_port: int, pools: Iterable[str], tls: Tls | None) -> None:
    """Writes what Envoy reads once, at its start: ``port`` is that of the pools, ``admin_port`` its own."""
    folder.mkdir(parents=True, exist_ok=True)
    pools = list(pools)
    connections = {
        "@type": f"{TYPES}.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
        "max_active_downstream_connections": MAX_CONNECTIONS,
    }
    monitor = {"name": "envoy.resource_monitors.global_downstream_max_connections", "typed_config": connections}
    bootstrap = {
        "node": {"id": "fleet", "cluster": "glm-image"},
        "admin": {"address": _address("127.0.0.1", admin_port)},
        "overload_manager": {"resource_monitors": [monitor]},
        "static_resources": {
            "listeners": [_listener(port, pools)],
            "clusters": [_cluster(folder, pool, tls) for pool in pools],
        },
    }
    (folder / "envoy.json").write_text(json.dumps(bootstrap, indent=2))


def write_members(folder: Path, pool: str, members: Iterable[tuple[str, int]]) -> None:
    """Replaces the members of a pool, each a host's address and a port; a running Envoy follows."""
    endpoints = [
        {
            "endpoint": {"address": _address(host, port)},
            "metadata": {"filter_metadata": {"envoy.lb": {MEMBER_KEY: f"{host}:{port}"}}},
        }
        for host, port in members
    ]
    assignment = {
        "@type": f"{TYPES}.config.endpoint.v3.ClusterLoadAssignment",
        "cluster_name": pool,
        "endpoints": [{"lb_endpoints": endpoints}],
    }
    path = _members_file(folder, pool)
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"resources": [assignment]}, indent=2))
    # Envoy watches for renames into the folder.
    new.rename(path)


def _members_file(folder: Path, pool: str) -> Path:
    return folder / f"{pool}.json"


def _address(host: str, port: int) -> Json:
    return {"socket_address": {"address": host, "port_value": port}}


def _windows() -> Json:
    return {
        "initial_stream_window_size": STREAM_WINDOW_BYTES,
        "initial_connection_window_size": CONNECTION_WINDOW_BYTES,
    }


def _listener(port: int, pools: Iterable[str]) -> Json:
    filters = f"{TYPES}.extensions.filters"
    member = {"metadata_namespace": "envoy.lb", "key": MEMBER_KEY, "type": "STRING"}
    manager = {
        "@type": f"{filters}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "pools",
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
                "name": "envoy.filters.http.header_to_metadata",
                "typed_config": {
                    "@type": f"{filters}.http.header_to_metadata.v3.Config",
                    "request_rules": [{"header": MEMBER_HEADER, "on_header_present": member}],
                },
            },
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{filters}.http.router.v3.Router"},
            },
        ],
        "route_config": {
            "name": "pools",
            "virtual_hosts": [{"name": "pools", "domains": ["*"], "routes": [_route(pool) for pool in pools]}],
        },
    }
    return {
        "name": "pools",
        "address": _address("127.0.0.1", port),
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _route(pool: str) -> Json:
    return {
        "match": {"prefix": "/", "headers": [{"name": POOL_HEADER, "string_match": {"exact": pool}}]},
        # The deadline is the caller's grpc-timeout, if it sends one.
        "route": {"cluster": pool, "timeout": "0s", "max_stream_duration": {"grpc_timeout_header_max": "0s"}},
    }


def _cluster(folder: Path, pool: str, tls: Tls | None) -> Json:
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
    source = {"path": str(_members_file(folder, pool)), "watched_directory": {"path": str(folder)}}
    return {
        "name": pool,
        "type": "EDS",
        "eds_cluster_config": {"eds_config": {"resource_api_version": "V3", "path_config_source": source}},
        "connect_timeout": "2s",
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "lb_policy": "ROUND_ROBIN",
        # The member that the gateway names, or none.
        "lb_subset_config": {
            "fallback_policy": "NO_FALLBACK",
            "subset_selectors": [{"keys": [MEMBER_KEY], "single_host_per_subset": True}],
        },
        # A member that left the file gets nothing more, although it is healthy.
        "ignore_health_on_host_removal": True,
        # A member that is known to be down is UNAVAILABLE immediately, not after a time-out.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": http},
        "health_checks": [_health_check()],
        "outlier_detection": _outlier_detection(),
        "circuit_breakers": {
            "thresholds": [
                {
                    "max_connections": MAX_CONNECTIONS,
                    "max_pending_requests": MAX_STREAMS,
                    "max_requests": MAX_REQUESTS,
                    "max_retries": 0,
                }
            ]
        },
        **({} if tls is None else {"transport_socket": _transport(pool, tls)}),
    }


def _health_check() -> Json:
    return {
        "timeout": "2s",
        "interval": "2s",
        "no_traffic_interval": "2s",
        "unhealthy_interval": "1s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        # Triton: SERVING while all its models are ready, whatever service is named.
        "grpc_health_check": {},
    }


def _outlier_detection() -> Json:
    return {
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
    }


def _transport(pool: str, tls: Tls) -> Json:
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{TYPES}.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": pool,
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
                    # A member of this pool, not another process that has taken its port.
                    "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": pool}}],
                },
            },
        },
    }
