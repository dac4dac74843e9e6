"""KServe v2 requests over every protocol of a server, without the project's own client."""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from threading import Barrier
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from PIL import Image
from tritonclient.utils import InferenceServerException

from glm_image.supervisor import TritonServer

Outputs = dict[str, NDArray[Any]]
Values = Mapping[str, Any]
Tensors = dict[str, tuple[str, list[int]]]

ANSWER_SECONDS = 120

REQUEST_INPUTS: Tensors = {
    "prompt": ("BYTES", [1]),
    "image": ("BYTES", [-1]),
    "glyph_text": ("BYTES", [-1]),
    "height": ("INT32", [1]),
    "width": ("INT32", [1]),
    "num_inference_steps": ("INT32", [1]),
    "guidance_scale": ("FP32", [1]),
    "seed": ("INT64", [1]),
    "num_images": ("INT32", [1]),
    "negative_prompt": ("BYTES", [1]),
    "temperature": ("FP32", [1]),
    "top_p": ("FP32", [1]),
    "top_k": ("INT32", [1]),
    "output_format": ("BYTES", [1]),
    "revision": ("BYTES", [1]),
    "file_metadata": ("BYTES", [1]),
}
STAGE_TENSORS: Tensors = {
    "prior_token_ids": ("INT32", [-1, -1]),
    "prior_grid": ("INT32", [2]),
    "source_token_ids": ("INT32", [-1]),
    "source_grids": ("INT32", [-1, 2]),
    "resolved_seed": ("INT64", [1]),
    "resolved_size": ("INT32", [2]),
    "deadline_ns": ("INT64", [1]),
    "ar_metadata": ("BYTES", [1]),
}
CONTROL_INPUTS: Tensors = {"request_id": ("BYTES", [1]), "action": ("BYTES", [1])}
OUTPUTS: Tensors = {
    "images": ("UINT8", [-1, -1, -1, 3]),
    "images_base64": ("BYTES", [-1]),
    "metadata": ("BYTES", [1]),
}
NUMPY_TYPES = {"INT32": np.int32, "INT64": np.int64, "FP32": np.float32, "UINT8": np.uint8, "BYTES": np.object_}


@dataclass
class KServeError(Exception):
    """An error response: the name of the gRPC status or the HTTP status, and the message."""

    status: str
    message: str


def grpc_infer(
    server: TritonServer,
    values: Values,
    model: str = "glm_image",
    *,
    timeout_seconds: float = 0,
    request_id: str = "",
) -> Outputs:
    """Sends a request over gRPC; the server gets ``timeout_seconds``, 0 = none."""
    timeout = int(timeout_seconds * 1e6) or None
    with closing(tritonclient.grpc.InferenceServerClient(server.grpc_url)) as client:
        inputs = infer_inputs(tritonclient.grpc, values)
        result = _result(
            lambda: client.infer(model, inputs, request_id=request_id, client_timeout=ANSWER_SECONDS, timeout=timeout)
        )
        return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def grpc_start(
    client: tritonclient.grpc.InferenceServerClient, values: Values, model: str, *, request_id: str = ""
) -> Any:
    """Sends a request over gRPC without waiting; ``cancel`` of the returned object cancels the call."""
    return client.async_infer(
        model, infer_inputs(tritonclient.grpc, values), lambda result, error: None, request_id=request_id
    )


def http_binary_infer(server: TritonServer, values: Values, model: str = "glm_image") -> Outputs:
    with closing(tritonclient.http.InferenceServerClient(server.http_url, network_timeout=ANSWER_SECONDS)) as client:
        result = _result(lambda: client.infer(model, infer_inputs(tritonclient.http, values)))
        return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}


def http_json_infer(server: TritonServer, values: Values, model: str = "glm_image") -> Outputs:
    inputs = []
    for name, value in values.items():
        array = _array(name, value)
        data = [text.decode() for text in array.ravel()] if array.dtype == object else array.ravel().tolist()
        inputs.append({"name": name, "datatype": _datatype(name), "shape": list(array.shape), "data": data})
    answer = post(server, f"/v2/models/{model}/infer", {"inputs": inputs})
    return {
        output["name"]: np.array(
            [text.encode() for text in output["data"]] if output["datatype"] == "BYTES" else output["data"],
            dtype=NUMPY_TYPES[output["datatype"]],
        ).reshape(output["shape"])
        for output in answer["outputs"]
    }


def generate(server: TritonServer, values: Values, model: str = "glm_image") -> Outputs:
    """Plain JSON; a list in the answer has lost its shape, and one element is no list."""
    answer = post(server, f"/v2/models/{model}/generate", dict(values))
    found = {name: np.atleast_1d(np.array(answer[name], dtype=NUMPY_TYPES[OUTPUTS[name][0]])) for name in OUTPUTS}
    return {name: _as_bytes(array) if array.dtype == object else array for name, array in found.items()}


Infer = Callable[..., Outputs]
SENDERS: dict[str, Infer] = {
    "grpc": grpc_infer,
    "http-binary": http_binary_infer,
    "http-json": http_json_infer,
    "generate": generate,
}


def post(server: TritonServer, path: str, body: object) -> dict[str, Any]:
    request = urllib.request.Request(f"http://{server.http_url}{path}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise KServeError(str(error.code), json.load(error)["error"]) from error


def metadata(outputs: Outputs) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(outputs["metadata"][0])
    return parsed


def files(outputs: Outputs) -> list[bytes]:
    return [base64.b64decode(text, validate=True) for text in outputs["images_base64"]]


def decoded(file: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(file)) as picture:
        return np.asarray(picture)


@dataclass
class Burst:
    """What requests sent at the same moment gave, in their order, and after how many seconds each."""

    outputs: list[Outputs]
    answered: list[float]

    @property
    def seconds(self) -> float:
        """Until the last answer."""
        return max(self.answered)


def at_once(calls: Sequence[Callable[[], Outputs]]) -> Burst:
    barrier = Barrier(len(calls) + 1)

    def call(send: Callable[[], Outputs]) -> tuple[Outputs, float]:
        barrier.wait()
        return send(), time.monotonic()

    with ThreadPoolExecutor(len(calls)) as pool:
        answers = [pool.submit(call, send) for send in calls]
        barrier.wait()
        began = time.monotonic()
        outputs, ends = zip(*(answer.result() for answer in answers), strict=True)
        return Burst(list(outputs), [end - began for end in ends])


def _datatype(name: str) -> str:
    return {**REQUEST_INPUTS, **STAGE_TENSORS, **CONTROL_INPUTS}.get(name, ("INT32", [1]))[0]


def _array(name: str, value: Any) -> NDArray[Any]:
    datatype = _datatype(name)
    if datatype == "BYTES":
        return _as_bytes(np.atleast_1d(np.array(value, dtype=object)))
    array: NDArray[Any] = np.atleast_1d(np.asarray(value, dtype=NUMPY_TYPES[datatype]))
    return array


def _as_bytes(texts: NDArray[Any]) -> NDArray[Any]:
    return np.array([text.encode() if isinstance(text, str) else text for text in texts], dtype=object)


def infer_inputs(protocol: Any, values: Values, **options: bool) -> list[Any]:
    """Values as inputs of one of tritonclient's halves; ``binary_data=False`` has HTTP write them as JSON."""
    inputs = []
    for name, value in values.items():
        array = _array(name, value)
        inputs.append(protocol.InferInput(name, list(array.shape), _datatype(name)))
        inputs[-1].set_data_from_numpy(array, **options)
    return inputs


def _result(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except InferenceServerException as error:
        raise KServeError(str(error.status()).removeprefix("StatusCode."), error.message()) from error
