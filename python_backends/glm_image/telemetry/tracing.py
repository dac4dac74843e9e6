"""The stages of a request as OpenTelemetry spans, children of the spans that Triton makes of it."""

from __future__ import annotations

import json
import os
import time
from typing import Any, Final

from glm_image.errors import ConfigurationError
from glm_image.lifecycle.context import NANOSECONDS, RequestContext, RequestObserver
from glm_image.request.stages import Stage

ENDPOINT: Final = "GLM_IMAGE_OTLP_TRACES_ENDPOINT"
"""The environment variable that names the collector; without it there are no spans."""


class RequestTracing:
    """Makes an instance's spans, which the exporter sends from a thread of its own.

    Raises:
        ConfigurationError: a collector is named, and the packages that send to it are missing.
    """

    def __init__(self, instance: str) -> None:
        endpoint = os.environ.get(ENDPOINT)
        self._provider: Any = None
        if not endpoint:
            return
        try:
            from opentelemetry import propagate  # noqa: PLC0415
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        except ImportError as error:
            raise ConfigurationError(f"spans need this project's extra 'tracing': {error}") from error
        resource = Resource.create({"service.name": "glm-image", "service.instance.id": instance})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer, self._extract = self._provider.get_tracer("glm_image"), propagate.extract

    def observe(self, context: RequestContext, request: Any, streamed: str | None) -> None:
        """Adds the observer that makes spans, if the request is traced.

        Args:
            context: the request's.
            request: Triton's.
            streamed: the ``trace_of`` of the streamed request, if this one is a part of it: Triton traces that one.
        """
        if self._provider is None:
            return
        carrier = trace_of(request) or streamed
        if carrier:
            context.add_observer(_SpanMaker(self._tracer, self._extract(_entries(carrier))))

    def close(self) -> None:
        if self._provider is not None:
            self._provider.shutdown()


def trace_of(request: Any) -> str | None:
    """Returns the context of the span that Triton makes of a request, as JSON; None = it is not traced."""
    return request.trace().get_context() or None if os.environ.get(ENDPOINT) else None


def _entries(carrier: str) -> dict[str, str]:
    # Any client may send one.
    try:
        entries = json.loads(carrier)
    except (ValueError, RecursionError):
        return {}
    return (
        {name: value for name, value in entries.items() if isinstance(value, str)} if isinstance(entries, dict) else {}
    )


class _SpanMaker(RequestObserver):
    """Makes a span of each part of a request's stages; ``parent`` is the context of their parent."""

    def __init__(self, tracer: Any, parent: Any) -> None:
        self._tracer, self._parent = tracer, parent

    def stage_finished(self, context: RequestContext, stage: Stage, seconds: float) -> None:
        ended = time.time_ns()
        span = self._tracer.start_span(
            stage.value,
            context=self._parent,
            start_time=ended - int(seconds * NANOSECONDS),
            attributes={"glm_image.request_id": context.id},
        )
        span.end(ended)
