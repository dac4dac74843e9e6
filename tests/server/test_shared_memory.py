"""Pixels through system shared memory, for clients on the server's machine, and the API that an operator opens."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, shared_memory

from glm_image.pipeline import LocalPipeline
from glm_image.request.parameters import GenerationParameters
from glm_image.supervisor import TritonServer
from glm_image.supervisor.api_access import CLOSABLE_APIS
from server.kserve import infer_inputs
from server.regions import registered_region
from server.test_clients import PROTOCOLS, address
from server.test_clients import REQUEST as ENCODED_REQUEST
from server.test_closed_doors import HTTP, call

REQUEST: dict[str, Any] = {**ENCODED_REQUEST, "output_format": "raw"}
PIXEL_BYTES = 64 * 96 * 3


@pytest.fixture(scope="module")
def pixels(pipeline: LocalPipeline) -> NDArray[np.uint8]:
    """The image that the engines generate without a server."""
    (image,) = pipeline.generate(GenerationParameters(**REQUEST)).pixels
    return np.asarray(image)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pixels_come_through_system_shared_memory(
    bare_triton: TritonServer, pixels: NDArray[np.uint8], protocol: str
) -> None:
    library = tritonclient.grpc if protocol == "grpc" else tritonclient.http
    with (
        closing(library.InferenceServerClient(address(bare_triton, protocol))) as client,
        registered_region(client, PIXEL_BYTES) as (name, handle),
    ):
        output = library.InferRequestedOutput("images")
        output.set_shared_memory(name, PIXEL_BYTES)
        client.infer("glm_image", infer_inputs(library, REQUEST), outputs=[output])
        shared: NDArray[Any] = shared_memory.get_contents_as_numpy(handle, np.uint8, [64, 96, 3])
        np.testing.assert_array_equal(shared, pixels)


def test_a_region_that_is_too_small_is_refused(bare_triton: TritonServer) -> None:
    with (
        closing(tritonclient.grpc.InferenceServerClient(bare_triton.grpc_url)) as client,
        registered_region(client, PIXEL_BYTES) as (name, _),
    ):
        output = tritonclient.grpc.InferRequestedOutput("images")
        output.set_shared_memory(name, 64)
        with pytest.raises(InferenceServerException, match="shared memory size"):
            client.infer("glm_image", infer_inputs(tritonclient.grpc, REQUEST), outputs=[output])


def test_opened_api_is_open_and_the_others_are_restricted(bare_triton: TritonServer) -> None:
    for api in CLOSABLE_APIS:
        status = call(bare_triton, *HTTP[api][0])[0]
        assert status == (200 if api == "shared-memory" else 403), api
