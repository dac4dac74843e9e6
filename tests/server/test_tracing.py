"""Spans of a traced request, as a collector receives them."""

from __future__ import annotations

import gzip
import http.server
import json
import queue
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from glm_image.request.stages import Stage
from glm_image.supervisor import ServerSettings, TritonServer
from helpers import serving
from running_gateway import RunningGateway, running_gateway

PARENT = "b7ad6b7169203331"
SECONDS = 60


class Collector(http.server.ThreadingHTTPServer):
    """Receives OTLP over HTTP: Triton sends JSON, the stages send protobuf."""

    def __init__(self) -> None:
        self.spans: queue.SimpleQueue[tuple[str, str, str, str]] = queue.SimpleQueue()
        super().__init__(("127.0.0.1", 0), _Handler)

    def take(self, body: bytes, content_type: str) -> None:
        if content_type == "application/json":
            for resource in json.loads(body)["resourceSpans"]:
                for scope in resource["scopeSpans"]:
                    for span in scope["spans"]:
                        self.spans.put((span["name"], span["traceId"], span["spanId"], span.get("parentSpanId", "")))
            return
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    assert span.start_time_unix_nano <= span.end_time_unix_nano
                    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                    self.spans.put((span.name, *ids))


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, Collector)
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.take(body, self.headers["Content-Type"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def traced_server(tiny_checkpoint: Path, same_threads: None) -> Iterator[tuple[TritonServer, Collector]]:
    with Collector() as collector, serving(collector):
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        with TritonServer(ServerSettings(tiny_checkpoint, drain_seconds=5, otlp_traces_endpoint=endpoint)) as server:
            yield server, collector


@pytest.fixture(scope="module")
def gateway(
    traced_server: tuple[TritonServer, Collector], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    with running_gateway(f"grpc://{traced_server[0].grpc_url}", tmp_path_factory.mktemp("store")) as running:
        yield running


BODY = {"prompt": "a fox", "height": 32, "width": 32, "num_inference_steps": 1, "output_format": "png"}


@pytest.mark.full
@pytest.mark.parametrize("way", ["triton", "gateway", "gateway_stream", "gateway_job"])
def test_spans_of_stages_are_children_of_their_models_spans(
    traced_server: tuple[TritonServer, Collector], gateway: RunningGateway, way: str
) -> None:
    server, collector = traced_server
    trace = uuid.uuid4().hex
    paths = {"triton": f"http://{server.http_url}/v2/models/glm_image/generate", "gateway_job": "/v1/images/jobs"}
    body = {**BODY, "stream": True} if way == "gateway_stream" else BODY
    path = paths.get(way, "/v1/images/generations")
    response = gateway.client.post(path, json=body, headers={"traceparent": f"00-{trace}-{PARENT}-01"})
    assert response.status_code in {200, 202}, response.text
    is_streamed = way in {"gateway_stream", "gateway_job"}
    first, second = ("glm_image_stream",) * 2 if is_streamed else ("glm_ar", "glm_dit")
    found: dict[str, tuple[str, str]] = {}
    while not {"InferRequest", first, second, *Stage} - {"dit_queue"} <= found.keys():
        name, span_trace, span, parent = collector.spans.get(timeout=SECONDS)
        if span_trace == trace:
            found[name] = (span, parent)
    assert found["InferRequest"][1] == PARENT
    for stage in ("ar_queue", "prefill", "decode"):
        assert found[stage][1] == found[first][0]
    for stage in ("condition", "denoise", "vae", "encode"):
        assert found[stage][1] == found[second][0]
