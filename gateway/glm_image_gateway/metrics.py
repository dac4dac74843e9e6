"""The gateway's own metrics, in Prometheus' conventions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


class PoolState(Protocol):
    """What the metrics read of a pool."""

    @property
    def members(self) -> Sequence[object]: ...

    @property
    def ready(self) -> Sequence[object]: ...

    def queued_seconds(self) -> float: ...

    def outstanding_seconds(self) -> float: ...


class Metrics:
    """The metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "glm_image_gateway_requests", "Answered requests", ["route", "status"], registry=registry
        )
        self.errors = Counter(
            "glm_image_gateway_errors", "Refused and failed requests, by code", ["code"], registry=registry
        )
        self.request_seconds = Histogram(
            "glm_image_gateway_request_seconds",
            "Time from a request's head to the end of its answer",
            ["route"],
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )
        self.stage_seconds = Histogram(
            "glm_image_gateway_stage_seconds",
            "Time of a request in each stage of the server, and in the gateway's queue",
            ["stage"],
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )
        self.first_image_seconds = Histogram(
            "glm_image_gateway_first_image_seconds",
            "Time from a stream's start to its first image",
            registry=registry,
            buckets=SECONDS_BUCKETS,
        )
        self.in_flight = Gauge(
            "glm_image_gateway_in_flight_requests", "Requests without a complete answer", registry=registry
        )
        self.running = Gauge("glm_image_gateway_running_requests", "Requests that Triton has", registry=registry)
        self.waiting = Gauge("glm_image_gateway_waiting_requests", "Requests in the gateway's queue", registry=registry)
        self.images = Counter("glm_image_gateway_images", "Images returned", registry=registry)
        self.cancelled = Counter(
            "glm_image_gateway_cancelled_requests", "Requests whose client closed the connection", registry=registry
        )
        self.received_bytes = Counter("glm_image_gateway_received_bytes", "Bytes of request bodies", registry=registry)
        self.sent_bytes = Counter("glm_image_gateway_sent_bytes", "Bytes of response bodies", registry=registry)
        self.store_bytes = Gauge("glm_image_gateway_store_bytes", "Bytes of stored results", registry=registry)
        self.jobs = Counter("glm_image_gateway_jobs", "Ended jobs", ["status"], registry=registry)

        self.retries = Counter(
            "glm_image_gateway_retries",
            "Calls to members of pools that were sent again, by stage and reason",
            ["stage", "reason"],
            registry=registry,
        )
        self._members = Gauge(
            "glm_image_gateway_members", "Members of a pool, by stage and state", ["stage", "state"], registry=registry
        )
        self._queued = Gauge(
            "glm_image_gateway_queued_seconds",
            "Predicted seconds of the calls that wait for a member of a pool",
            ["stage"],
            registry=registry,
        )
        self._outstanding = Gauge(
            "glm_image_gateway_outstanding_seconds",
            "Predicted seconds of unfinished work that the members of a pool have",
            ["stage"],
            registry=registry,
        )

    def watch_pool(self, stage: str, pool: PoolState) -> None:
        """Reports the state of a pool."""
        self._members.labels(stage, "known").set_function(lambda: len(pool.members))
        self._members.labels(stage, "ready").set_function(lambda: len(pool.ready))
        self._queued.labels(stage).set_function(pool.queued_seconds)
        self._outstanding.labels(stage).set_function(pool.outstanding_seconds)

    def observe_stages(self, seconds: Mapping[str, float]) -> None:
        """Adds the durations that a result's metadata reports."""
        for stage, duration in seconds.items():
            self.stage_seconds.labels(stage).observe(duration)
