"""Jobs: states, results, cancellation, ids, and a gateway that ends meanwhile."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient
from glm_image_gateway.services import Services
from glm_image_gateway.settings import SettingsError
from helpers import serving
from running_gateway import RunningGateway, error_of, running_gateway

JOBS = "/v1/images/jobs"
SMALL = {"prompt": "A red fox", "size": "64x32", "num_inference_steps": 1, "seed": 7}
LONG = {"prompt": "A red fox", "size": "64x64", "num_inference_steps": 200}
WAIT_SECONDS = 60


def wait_for(gateway: RunningGateway, job_id: str, *states: str) -> dict[str, Any]:
    until = time.monotonic() + WAIT_SECONDS
    while True:
        job = gateway.client.get(f"{JOBS}/{job_id}").json()
        if job["status"] in states:
            return job
        assert time.monotonic() < until, job
        time.sleep(0.02)


def test_a_job_has_the_answer_of_a_request(gateway: RunningGateway) -> None:
    response = gateway.post(JOBS, {**SMALL, "n": 2})
    job = response.json()
    assert (response.status_code, job["status"], job["object"]) == (202, "queued", "image.job")
    done = wait_for(gateway, job["id"], "done", "failed")
    assert done["result"]["data"] == gateway.post("/v1/images/generations", {**SMALL, "n": 2}).json()["data"]
    assert done["result"]["seeds"] == [7, 8]
    assert done["finished"] >= done["created"]


def test_a_running_job_has_its_progress_and_can_be_cancelled(gateway: RunningGateway, triton: TritonServer) -> None:
    job_id = gateway.post(JOBS, LONG).json()["id"]
    until = time.monotonic() + WAIT_SECONDS
    while (job := gateway.client.get(f"{JOBS}/{job_id}").json()).get("stage") != "denoise":
        assert time.monotonic() < until, job
    assert job["status"] == "running"
    assert 0 <= job["done"] <= job["total"]
    cancelled = gateway.client.delete(f"{JOBS}/{job_id}").json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("cancelled", "request_cancelled")
    with GlmImageClient(triton.grpc_url) as client:
        while (state := client.status(job["request_id"])["state"]) == "running":
            assert time.monotonic() < until
    assert state == "cancelled"
    assert gateway.client.delete(f"{JOBS}/{job_id}").json() == cancelled


def test_put_is_idempotent(gateway: RunningGateway) -> None:
    first = gateway.client.put(f"{JOBS}/fox", json={**SMALL, "response_format": "url"})
    again = gateway.client.put(f"{JOBS}/fox", json={**SMALL, "response_format": "url"})
    assert (first.status_code, again.status_code) == (202, 200)
    url = wait_for(gateway, "fox", "done")["result"]["data"][0]["url"]
    assert gateway.client.get(url).headers["content-type"] == "image/png"
    other = gateway.client.put(f"{JOBS}/fox", json=SMALL)
    assert (other.status_code, error_of(other)["code"]) == (409, "job_exists")
    assert gateway.client.put(f"{JOBS}/fox%20", json=SMALL).status_code == 400


def test_refused_and_failed_jobs(gateway: RunningGateway) -> None:
    for fields, code in (
        ({"n": 11}, "invalid_value"),
        ({"stream": True}, "invalid_value"),
        ({"webhook": "http://127.0.0.1/"}, "webhook_not_allowed"),
    ):
        response = gateway.post(JOBS, {**SMALL, **fields})
        assert (response.status_code, error_of(response)["code"]) == (400, code)
    failed = wait_for(gateway, gateway.post(JOBS, {**SMALL, "size": "9000x32"}).json()["id"], "failed")
    assert failed["error"]["message"] == "width is 9000; allowed: 32 to 2048"
    assert error_of(gateway.client.get(f"{JOBS}/none"))["code"] == "job_not_found"


class Receiver(BaseHTTPRequestHandler):
    received: ClassVar[list[bytes]] = []
    has_received: ClassVar[threading.Event] = threading.Event()

    def do_POST(self) -> None:
        self.received.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()
        self.has_received.set()

    def log_message(self, *_: object) -> None:
        pass


def test_a_restart_keeps_results_and_resumes_jobs(triton: TritonServer, tmp_path: Path) -> None:
    url = f"grpc://{triton.grpc_url}"
    body = {**SMALL, "num_inference_steps": 60}
    with HTTPServer(("127.0.0.1", 0), Receiver) as receiver, serving(receiver):
        host = f"127.0.0.1:{receiver.server_address[1]}"
        with running_gateway(url, tmp_path, webhook_hosts=(host,)) as gateway:
            done = gateway.post(JOBS, SMALL).json()["id"]
            result = wait_for(gateway, done, "done")
            left = gateway.post(JOBS, {**body, "seed": None, "webhook": f"http://{host}/done"}).json()["id"]
        with running_gateway(url, tmp_path, webhook_hosts=(host,)) as gateway:
            assert gateway.client.get(f"{JOBS}/{done}").json() == result
            resumed = wait_for(gateway, left, "done", "failed")
            assert resumed["status"] == "done", resumed
            seed = resumed["result"]["seeds"][0]
            plain = gateway.post("/v1/images/generations", {**body, "seed": seed}).json()
            assert resumed["result"]["data"] == plain["data"]
            assert Receiver.has_received.wait(WAIT_SECONDS)
    assert left.encode() in Receiver.received[0]


def test_more_jobs_than_may_wait(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.services.jobs, "_settings", replace(gateway.services.settings, max_queue=1))
    job_id = gateway.post(JOBS, LONG).json()["id"]
    refused = gateway.post(JOBS, SMALL)
    assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    assert gateway.client.delete(f"{JOBS}/{job_id}").json()["status"] == "cancelled"


def test_two_gateways_cannot_share_a_store(gateway: RunningGateway) -> None:
    with pytest.raises(SettingsError, match="another gateway uses the state folder"):
        Services.of(gateway.services.settings)
