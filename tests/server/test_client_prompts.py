"""Several prompts in one call of the clients, and the call of diffusers' pipeline."""

from __future__ import annotations

import asyncio
import io
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glm_image.supervisor import TritonServer
from glm_image_client import (
    AsyncGlmImageClient,
    BadArgumentError,
    GenerationResult,
    GlmImageClient,
    PromptsError,
    RefusedError,
    RemotePipeline,
    UnknownOptionError,
)

PROMPTS = ["A hen “NEWS”", "雪"]
SMALL: dict[str, Any] = {"width": 64, "height": 32, "num_inference_steps": 2}
UNFINISHED: dict[str, Any] = {"width": 512, "height": 512, "num_inference_steps": 200}
POLL_SECONDS = 0.05


@pytest.fixture
def client(triton: TritonServer) -> Iterator[GlmImageClient]:
    with GlmImageClient(triton.grpc_url, timeout=120) as opened:
        yield opened


@pytest.fixture(scope="module")
def singles(triton: TritonServer) -> list[list[bytes]]:
    """The files of each prompt, sent as a request of its own over HTTP."""
    with GlmImageClient(triton.http_url, "http", timeout=120) as client:
        return files_of([client.generate(prompt, seed=5, **SMALL) for prompt in PROMPTS])


def files_of(results: list[GenerationResult]) -> list[list[bytes]]:
    return [result.encoded for result in results]


def test_a_list_has_the_result_of_each_prompt(client: GlmImageClient, singles: list[list[bytes]]) -> None:
    results = client.generate(PROMPTS, seed=5, **SMALL)
    assert files_of(results) == singles
    assert results[0].image.size == (64, 32)
    assert client.generate([]) == []


def test_the_asyncio_client_has_the_same_results(triton: TritonServer, singles: list[list[bytes]]) -> None:
    async def send() -> list[GenerationResult]:
        async with AsyncGlmImageClient(triton.http_url, "http", timeout=120) as client:
            return await client.generate(tuple(PROMPTS), seed=5, **SMALL)

    assert files_of(asyncio.run(send())) == singles


def test_the_results_of_the_others_are_kept_when_one_prompt_fails(
    client: GlmImageClient, singles: list[list[bytes]]
) -> None:
    with pytest.raises(PromptsError, match=r"^1 of 2 prompts failed; the first is prompt 1: prompt is ") as failed:
        client.generate([" ", PROMPTS[1]], seed=5, **SMALL)
    refused, kept = failed.value.results
    assert isinstance(refused, RefusedError)
    assert isinstance(kept, GenerationResult)
    assert kept.encoded == singles[1]


def test_a_value_that_cannot_be_sent_is_refused_before_any_request(client: GlmImageClient) -> None:
    for bad in ({"seed": 2**70}, {"images": "none.png"}, {"request_id": ""}):
        with pytest.raises(BadArgumentError):
            client.generate(PROMPTS, **bad)
    with pytest.raises(BadArgumentError, match="prompt is 7"):
        client.generate(["x", 7])  # type: ignore[list-item]


def test_an_interrupt_cancels_the_requests_of_all_prompts(client: GlmImageClient, triton: TritonServer) -> None:
    def interrupt() -> None:
        with GlmImageClient(triton.grpc_url) as other:
            while other.status("batch-1")["state"] not in ("running", "queued"):
                assert not ended.wait(POLL_SECONDS)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    ended = threading.Event()
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        client.generate(["a", "b"], request_id="batch", **UNFINISHED)
    ended.set()
    interrupter.join()
    assert [client.status(f"batch-{index}")["state"] for index in range(2)] == ["cancelled"] * 2


class TestPipeline:
    def test_the_call_of_diffusers_gives_the_images_of_the_client(
        self, client: GlmImageClient, singles: list[list[bytes]]
    ) -> None:
        pipe = RemotePipeline(client)
        generator = torch.Generator().manual_seed(4)
        images = pipe(PROMPTS[1], num_images_per_prompt=2, generator=generator, **SMALL).images
        assert [image.size for image in images] == [(64, 32)] * 2
        assert np.array_equal(images[1], Image.open(io.BytesIO(singles[1][0])))
        (arrays,) = pipe(PROMPTS, generator=[5, 4], output_type="np", return_dict=False, **SMALL)
        assert isinstance(arrays, np.ndarray)
        assert (arrays.shape, arrays.dtype) == ((2, 32, 64, 3), np.float32)
        assert np.array_equal(arrays[0] * 255, Image.open(io.BytesIO(singles[0][0])))
        assert np.array_equal(arrays[1] * 255, images[0])

    def test_what_is_not_supported_is_refused(self) -> None:
        pipe = RemotePipeline("127.0.0.1:1")
        with pytest.raises(UnknownOptionError, match="unexpected keyword argument 'latents'; allowed: prompt, image"):
            pipe("x", latents=None)
        with pytest.raises(BadArgumentError, match="output_type is 'pt'; allowed: pil, np"):
            pipe("x", output_type="pt")  # type: ignore[arg-type]
        with pytest.raises(BadArgumentError, match="generator has 2 elements; allowed: 1"):
            pipe("x", generator=[1, 2])
        with pytest.raises(BadArgumentError, match="generator is of type str"):
            pipe("x", generator=["1"])  # type: ignore[list-item]
        with pytest.raises(BadArgumentError, match="prompt is 7"):
            pipe(7)  # type: ignore[arg-type]
