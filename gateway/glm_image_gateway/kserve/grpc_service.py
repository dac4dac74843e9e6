"""KServe's protocol over gRPC, on a port of its own."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, Final, cast

import grpc
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from glm_image_client.errors import ServerFailure
from glm_image_client.transport import Outputs, Request
from glm_image_gateway.kserve.codec import datatype_of, from_bytes, from_values, seconds_of, to_bytes, with_parameters
from glm_image_gateway.kserve.errors import KNOWN, status_of
from glm_image_gateway.kserve.front import Front, Inference
from glm_image_gateway.pools.transport import MODELS, STREAM

logger = logging.getLogger(__name__)

CONTENTS: Final = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
ERROR_HEADER: Final = "triton_grpc_error"
"""With it, an error ends a stream with its status, as Triton has it; otherwise it is a response of the stream."""
EMPTY_FINAL: Final = "triton_enable_empty_final_response"
"""The parameter with which clients ask for a last response without outputs."""
MIN_PING_MS: Final = 5000
MAX_SENT_BYTES: Final = 2**31 - 1
MAX_STREAMED: Final = 128
"""Requests of one stream that are in flight."""


class GrpcService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The service of ``front``; methods that it lacks answer UNIMPLEMENTED."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's names
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=await self._front.transport.ready(None))

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        is_ready = request.name in MODELS and await self._front.transport.ready(None)
        return service_pb2.ModelReadyResponse(ready=is_ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        version = importlib.metadata.version("glm-image-triton")
        return service_pb2.ServerMetadataResponse(name="glm_image_gateway", version=version)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelMetadataResponse(**await self._metadata(request.name, context))

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Returns what clients such as perf_analyzer read of a configuration: tensors, no batches, streams."""
        metadata = await self._metadata(request.name, context)
        config = model_config_pb2.ModelConfig(name=request.name, platform=metadata["platform"], max_batch_size=0)
        config.model_transaction_policy.decoupled = request.name == STREAM
        for entries, tensors in ((config.input, metadata["inputs"]), (config.output, metadata["outputs"])):
            for tensor in tensors:
                kind = "STRING" if tensor["datatype"] == "BYTES" else tensor["datatype"]
                data_type = model_config_pb2.DataType.Value(f"TYPE_{kind}")
                entries.add(name=tensor["name"], data_type=data_type, dims=tensor["shape"])
        for entry in config.input:
            entry.optional = entry.name != "prompt"
        return service_pb2.ModelConfigResponse(config=config)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            caller = self._front.caller(_header(context, "authorization"))
            inference = inference_of(request)
            return infer_response(request, await self._front.infer(inference, caller))
        except KNOWN as error:
            await _abort(context, error)

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Answers each request of a stream as its responses come; the end of the stream cancels them."""
        responses: asyncio.Queue[Any] = asyncio.Queue(MAX_STREAMED)
        answering: set[asyncio.Future[None]] = set()
        reading = asyncio.ensure_future(self._read(requests, context, responses, answering))
        try:
            while (response := await responses.get()) is not None:
                if isinstance(response, Exception):
                    await _abort(context, response)
                yield response
        finally:
            for task in (reading, *answering):
                task.cancel()
            await asyncio.gather(reading, *answering, return_exceptions=True)

    async def _read(
        self, requests: Any, context: Any, responses: asyncio.Queue[Any], answering: set[asyncio.Future[None]]
    ) -> None:
        """Starts the requests of a stream; None in the queue ends it, after their last responses."""
        async for request in requests:
            if len(answering) >= MAX_STREAMED:
                await asyncio.wait(answering, return_when=asyncio.FIRST_COMPLETED)
            task = asyncio.ensure_future(self._answer(request, context, responses))
            answering.add(task)
            task.add_done_callback(answering.discard)
        await asyncio.gather(*answering)
        await responses.put(None)

    async def _answer(self, request: Any, context: Any, responses: asyncio.Queue[Any]) -> None:
        try:
            caller = self._front.caller(_header(context, "authorization"))
            async with aclosing(self._front.stream(inference_of(request), caller)) as streamed:
                async for outputs in streamed:
                    is_only = request.model_name != STREAM
                    await responses.put(stream_response(request, outputs, is_final=is_only))
            if request.model_name == STREAM and request.parameters[EMPTY_FINAL].bool_param:
                await responses.put(stream_response(request, {}, is_final=True))
        except KNOWN as error:
            if _header(context, ERROR_HEADER) == "true":
                await responses.put(error)
                return
            response = service_pb2.ModelStreamInferResponse(error_message=str(error))
            response.infer_response.id = request.id
            await responses.put(response)
        except Exception:  # without an answer the stream would never end
            logger.exception("request %s of a stream failed", request.id)
            await responses.put(ServerFailure("the gateway failed", "INTERNAL"))

    async def _metadata(self, model: str, context: Any) -> dict[str, Any]:
        try:
            return await self._front.transport.model_metadata(model, None)
        except KNOWN as error:
            await _abort(context, error)
            raise


def inference_of(message: Any) -> Inference:
    """Reads a ``ModelInferRequest``; raises ``RefusedError`` if a tensor is malformed."""
    parameters = {name: _parameter(value) for name, value in message.parameters.items()}
    raw = list(message.raw_input_contents)
    tensors = []
    for index, tensor in enumerate(message.inputs):
        shape = list(tensor.shape)
        if index < len(raw):
            tensors.append(from_bytes(tensor.name, tensor.datatype, shape, raw[index]))
        else:
            values = list(getattr(tensor.contents, CONTENTS.get(tensor.datatype, "bytes_contents")))
            tensors.append(from_values(tensor.name, tensor.datatype, shape, values))
    request = Request(message.model_name, with_parameters(tensors, parameters), message.id)
    return Inference(request, seconds_of(parameters), tuple(output.name for output in message.outputs))


def infer_response(request: Any, outputs: Outputs) -> Any:
    """Returns a ``ModelInferResponse`` with outputs in binary form."""
    response = service_pb2.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    for name, array in outputs.items():
        response.outputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        response.raw_output_contents.append(to_bytes(array))
    return response


def stream_response(request: Any, outputs: Outputs, *, is_final: bool) -> Any:
    """Returns a ``ModelStreamInferResponse``, marked as Triton marks the last one."""
    response = infer_response(request, outputs)
    response.parameters["triton_final_response"].bool_param = is_final
    return service_pb2.ModelStreamInferResponse(infer_response=response)


def _parameter(value: Any) -> Any:
    kind = value.WhichOneof("parameter_choice")
    return None if kind is None else getattr(value, kind)


def _header(context: Any, name: str) -> str | None:
    headers = cast("Mapping[str, str]", dict(context.invocation_metadata() or ()))
    return headers.get(name)


async def _abort(context: Any, error: Exception) -> None:
    await context.abort(grpc.StatusCode[status_of(error)], str(error))


async def serve_grpc(front: Front, host: str, port: int, max_message_bytes: int) -> tuple[grpc.aio.Server, int]:
    """Starts the service, and returns it with its port; 0 = any free one.

    Raises:
        OSError: the port cannot be used.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", MAX_SENT_BYTES),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.so_reuseport", 0),
        ]
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(GrpcService(front), server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"{address} cannot be used") from error
    await server.start()
    return server, bound
