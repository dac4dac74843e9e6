"""Pools over real connections: members that a test has answer, fail, end and hang."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from glm_image_client.errors import BusyError, RefusedError, RequestCancelled, RequestTimeout, ServerFailure
from glm_image_client.transport import Endpoint, Outputs, Request, Tensor, object_array
from glm_image_gateway.kserve.errors import http_status_of, status_of
from glm_image_gateway.kserve.grpc_service import infer_response, inference_of
from glm_image_gateway.metrics import Metrics
from glm_image_gateway.pools.connection import TlsFiles
from glm_image_gateway.pools.pool import Pool
from glm_image_gateway.pools.tensors import DEFAULT_SIDE, Asked, merged, parts_of, preview_prior
from glm_image_gateway.pools.transport import PoolTransport

WAIT_SECONDS = 60.0
FULL = "Exceeds maximum queue size"
Answer = Callable[["Member", Request], Awaitable[Outputs]]


class AnsweredError(Exception):
    """Ends a call with a status."""

    def __init__(self, status: grpc.StatusCode, message: str = "") -> None:
        super().__init__(message)
        self.status = status


class Member(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A server of one stage, whose answers are those of ``answer``."""

    def __init__(self, stage: str, answer: Answer, fingerprint: str = "f0") -> None:
        self.stage, self.answer, self.fingerprint = stage, answer, fingerprint
        self.calls: list[Request] = []
        self.server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.url = f"grpc://127.0.0.1:{self.port}"

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=True)

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        asked = inference_of(request).request
        if asked.model == "glm_control":
            description = {"revision": self.fingerprint, "fingerprint": self.fingerprint, "instances": 1, "slots": 1}
            reply = {"stages": {self.stage: description}}
            return infer_response(request, {"result": object_array([json.dumps(reply).encode()])})
        self.calls.append(asked)
        try:
            return infer_response(request, await self.answer(self, asked))
        except AnsweredError as refusal:
            await context.abort(refusal.status, str(refusal))


async def tokens(member: Member, request: Request) -> Outputs:
    values = {tensor.name: tensor.data for tensor in request.tensors}
    count = int(values.get("num_images", [1])[0])
    metadata = {"fingerprint": member.fingerprint, "finished_ns": 1, "seconds": {"decode": 1.0}}
    return {
        "prior_token_ids": np.zeros((count, 4), np.int32),
        "prior_grid": np.array([2, 2], np.int32),
        "source_token_ids": np.zeros(0, np.int32),
        "source_grids": np.zeros((0, 2), np.int32),
        "resolved_seed": values["seed"],
        "resolved_size": np.array([64, 64], np.int32),
        "deadline_ns": np.array([5], np.int64),
        "ar_metadata": object_array([json.dumps(metadata).encode()]),
    }


async def images(member: Member, request: Request) -> Outputs:
    values = {tensor.name: tensor.data for tensor in request.tensors}
    assert "deadline_ns" not in values
    assert "finished_ns" not in json.loads(values["ar_metadata"][0])
    seed, count = int(values["resolved_seed"][0]), len(values["prior_token_ids"])
    metadata = {
        "seeds": [seed + index for index in range(count)],
        "cached_steps": [0] * count,
        "seconds": {"decode": 1.0, "dit_queue": 2.0, "denoise": 1.0 * count},
        "model": {"revision": member.fingerprint},
    }
    return {
        "images": np.zeros((0, 0, 0, 3), np.uint8),
        "images_base64": object_array([str(seed + index).encode() for index in range(count)]),
        "metadata": object_array([json.dumps(metadata).encode()]),
    }


@asynccontextmanager
async def pools_of(
    ar: list[Member], dit: list[Member], **settings: Any
) -> AsyncIterator[tuple[PoolTransport, Metrics]]:
    """Pools of members that have started and are known to be ready."""
    metrics = Metrics()
    options = {"max_waiting": 9, "max_failures": 2, "lost_seconds": 60.0, **settings}
    pools = []
    for stage, members in (("glm_ar", ar), ("glm_dit", dit)):
        for member in members:
            await member.server.start()
        endpoints = [Endpoint.parse(member.url) for member in members]
        pools.append(Pool(stage, endpoints, metrics, tls=TlsFiles(), proxy=None, **options))
    transport = PoolTransport(pools[0], pools[1], WAIT_SECONDS)
    transport.start()
    try:
        while (len(pools[0].ready), len(pools[1].ready)) != (len(ar), len(dit)):
            await asyncio.sleep(0.01)
        yield transport, metrics
    finally:
        await transport.close()
        for member in (*ar, *dit):
            await member.server.stop(None)


def request(**values: int) -> Request:
    own = [Tensor(name, "INT64" if name == "seed" else "INT32", np.array([value])) for name, value in values.items()]
    own = [tensor._replace(data=tensor.data.astype("int64" if tensor.name == "seed" else "int32")) for tensor in own]
    return Request("glm_image", [Tensor("prompt", "BYTES", object_array([b"A fox"])), *own], "fox")


def files(outputs: Outputs) -> list[int]:
    return [int(file) for file in outputs["images_base64"]]


def retries(metrics: Metrics, reason: str, stage: str = "glm_dit") -> float:
    labels = {"stage": stage, "reason": reason}
    return metrics.registry.get_sample_value("glm_image_gateway_retries_total", labels) or 0.0


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Makes a test of a coroutine: a server belongs to the loop in which it is made."""

    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), WAIT_SECONDS))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@in_loop
async def test_the_images_of_a_request_are_rendered_by_several_members_in_their_order() -> None:
    ar, dit = [Member("glm_ar", tokens)], [Member("glm_dit", images) for _ in range(2)]
    async with pools_of(ar, dit) as (pools, _):
        outputs = await pools.infer(request(seed=7, num_images=3), None)
    assert files(outputs) == [7, 8, 9]
    metadata = json.loads(outputs["metadata"][0])
    assert metadata["seeds"] == [7, 8, 9]
    assert metadata["seconds"] == {"decode": 1.0, "dit_queue": 2.0, "denoise": 3.0}
    assert [len(member.calls) for member in dit] == [1, 1]


@in_loop
async def test_a_call_that_fails_at_a_member_is_sent_to_another_with_the_same_seed() -> None:
    stopping: list[asyncio.Task[None]] = []

    async def end(member: Member, _: Request) -> Outputs:
        # The connection breaks amid the call. Ending the server cancels this call, and with it what the call awaits.
        stopping.append(asyncio.create_task(member.server.stop(None)))
        await asyncio.Event().wait()
        raise AssertionError

    ar, dit = [Member("glm_ar", tokens)], [Member("glm_dit", end), Member("glm_dit", images)]
    async with pools_of(ar, dit) as (pools, metrics):
        while not dit[0].calls:
            assert len(files(await pools.infer(request(), None))) == 1
        assert retries(metrics, "unreachable") == 1
        assert files(await pools.infer(request(seed=7), None)) == [7]
    seeds = [{tensor.name: tensor.data for tensor in call.tensors}["resolved_seed"][0] for call in dit[1].calls]
    first = {tensor.name: tensor.data for tensor in dit[0].calls[0].tensors}["resolved_seed"][0]
    assert first in seeds


@in_loop
async def test_failures_are_limited_and_full_queues_are_not() -> None:
    full = 2

    async def at_first_full(member: Member, asked: Request) -> Outputs:
        if len(member.calls) <= full:
            raise AnsweredError(grpc.StatusCode.UNAVAILABLE, FULL)
        return await images(member, asked)

    async def fail(member: Member, _: Request) -> Outputs:
        raise AnsweredError(grpc.StatusCode.INTERNAL, "the instance has failed")

    async with pools_of([Member("glm_ar", tokens)], [Member("glm_dit", at_first_full)]) as (pools, metrics):
        assert files(await pools.infer(request(seed=7), None)) == [7]
        assert retries(metrics, "busy") == full
    failing = Member("glm_dit", fail)
    async with pools_of([Member("glm_ar", tokens)], [failing]) as (pools, metrics):
        with pytest.raises(ServerFailure, match="the instance has failed"):
            await pools.infer(request(), None)
        assert (len(failing.calls), retries(metrics, "failed")) == (3, 2)


@in_loop
async def test_what_every_member_refuses_is_sent_once() -> None:
    async def refuse(member: Member, _: Request) -> Outputs:
        raise AnsweredError(grpc.StatusCode.INVALID_ARGUMENT, "seed is x; allowed: y")

    ar = Member("glm_ar", refuse)
    async with pools_of([ar], [Member("glm_dit", images)]) as (pools, _):
        with pytest.raises(RefusedError, match=r"^seed is x; allowed: y$"):
            await pools.infer(request(), None)
    assert len(ar.calls) == 1


@in_loop
async def test_a_call_waits_for_a_member_up_to_its_deadline() -> None:
    held = asyncio.Event()

    async def hold(member: Member, asked: Request) -> Outputs:
        await held.wait()
        return await images(member, asked)

    dit = Member("glm_dit", hold)
    async with pools_of([Member("glm_ar", tokens)], [dit]) as (pools, _):
        running = [asyncio.ensure_future(pools.infer(request(seed=seed), None)) for seed in (1, 2, 3)]
        while len(dit.calls) < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(RequestTimeout, match=r"no member of glm_dit was free within .*; 1 of 1 members are ready"):
            await pools.infer(request(), 1.0)
        held.set()
        assert [files(outputs) for outputs in await asyncio.gather(*running)] == [[1], [2], [3]]


@in_loop
async def test_tokens_go_to_members_with_their_own_checkpoint() -> None:
    ar = [Member("glm_ar", tokens, name) for name in ("f0", "f1")]
    dit = [Member("glm_dit", images, name) for name in ("f0", "f1")]
    async with pools_of(ar, dit) as (pools, _):
        for revision in ("f1", "f0", "f1"):
            asked = request(seed=7)
            own = replace(
                asked, tensors=[*asked.tensors, Tensor("revision", "BYTES", object_array([revision.encode()]))]
            )
            metadata = json.loads((await pools.infer(own, None))["metadata"][0])
            assert metadata["model"]["revision"] == revision
        unknown = replace(asked, tensors=[*asked.tensors, Tensor("revision", "BYTES", object_array([b"f2"]))])
        with pytest.raises(RefusedError, match=r"^revision is f2; allowed: f0, f1$"):
            await pools.infer(unknown, None)
    for member in dit:
        for call in member.calls:
            (metadata,) = (tensor.data[0] for tensor in call.tensors if tensor.name == "ar_metadata")
            assert json.loads(metadata)["fingerprint"] == member.fingerprint


@in_loop
async def test_a_cancelled_request_ends_its_calls_and_is_remembered() -> None:
    ended = asyncio.Event()

    async def hang(member: Member, _: Request) -> Outputs:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    async with pools_of([Member("glm_ar", hang)], [Member("glm_dit", images)]) as (pools, _):
        call = asyncio.ensure_future(pools.infer(request(), None))
        control = [
            Tensor(name, "BYTES", object_array([value]))
            for name, value in (("action", b"cancel"), ("request_id", b"fox"))
        ]
        while not pools._ar.members[0].leases:
            await asyncio.sleep(0.01)
        reply = json.loads((await pools.infer(Request("glm_control", control, ""), None))["result"][0])
        assert (reply["state"], reply["cancelled"]) == ("cancelled", 1)
        with pytest.raises(RequestCancelled, match="request fox was cancelled"):
            await call
        await ended.wait()
        reply = json.loads((await pools.infer(Request("glm_control", control, ""), None))["result"][0])
        assert (reply["state"], reply["cancelled"]) == ("already_cancelled", 0)


def test_parts_have_the_seeds_of_their_images() -> None:
    prior = preview_prior({"grid": [1, 1], "tokens": [5], "seed": 2**63 - 1})
    two = replace(prior, prior_token_ids=np.zeros((2, 1), np.int32))
    assert [int(part.resolved_seed[0]) for part in parts_of(two, [1, 1])] == [2**63 - 1, -(2**63)]
    with pytest.raises(ServerFailure, match="do not fit together"):
        merged([{"images": np.zeros((1, 2, 2, 3)), "images_base64": object_array([])}, {"images": np.zeros(3)}])


def test_a_full_queue_of_the_gateway_is_unavailable() -> None:
    error = BusyError("256 requests wait for glm_dit, as many as --max-queue allows")
    assert (status_of(error), http_status_of(error)) == ("UNAVAILABLE", 503)


def test_the_work_of_a_size_that_is_no_number_is_that_of_the_default() -> None:
    asked = Asked.of([Tensor("height", "FP32", np.array([np.nan], np.float32))])
    assert asked.pixels == DEFAULT_SIDE**2
