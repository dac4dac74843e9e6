"""The gateway's own metrics, in Prometheus' conventions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)


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

    def observe_stages(self, seconds: Mapping[str, float]) -> None:
        """Adds the durations that a result's metadata reports."""
        for stage, duration in seconds.items():
            self.stage_seconds.labels(stage).observe(duration)
