"""The stages of a request as OpenTelemetry spans, below the spans that Triton makes of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from glm_image.errors import ConfigurationError
from glm_image.lifecycle.context import NANOSECONDS, RequestContext

ENDPOINT = "GLM_IMAGE_OTLP_TRACES_ENDPOINT"
"""The variable of the environment that names the collector; without it there are no spans."""


class RequestTracing:
    """Makes and sends an instance's spans, from a thread of the exporter's.

    Raises:
        ConfigurationError: there is a collector, and the packages that send to it are missing.
    """

    def __init__(self, instance: str) -> None:
        endpoint = os.environ.get(ENDPOINT)
        self._provider: Any = None
        if not endpoint:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        except ImportError as error:
            raise ConfigurationError(f"spans need this project's extra 'tracing': {error}") from error
        resource = Resource.create({"service.name": "glm-image", "service.instance.id": instance})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("glm_image")

    def follow(self, request: Any, context: RequestContext) -> None:
        """Has a span made of each part of a job, if Triton traces its request."""
        if self._provider is None or (span_context := _context_of(request)) is None:
            return
        context.on_stage_seconds = self._span_maker(span_context, context.id)

    def _span_maker(self, span_context: Any, request_id: str) -> Callable[[str, float], None]:
        def make(stage: str, seconds: float) -> None:
            ended = time.time_ns()
            span = self._tracer.start_span(
                stage,
                context=span_context,
                start_time=ended - int(seconds * NANOSECONDS),
                attributes={"glm_image.request_id": request_id},
            )
            span.end(ended)

        return make

    def close(self) -> None:
        """Sends what has not been sent."""
        if self._provider is not None:
            self._provider.shutdown()


def _context_of(request: Any) -> Any:
    from opentelemetry.propagate import extract  # noqa: PLC0415

    carrier = request.trace().get_context()
    return extract(json.loads(carrier)) if carrier else None
