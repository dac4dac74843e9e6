"""Several prompts in one call of the clients, and the call of diffusers' pipeline."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

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

PROMPTS = ["A fox", "A hen “NEWS”", "雪"]
SMALL: dict[str, Any] = {"width": 64, "height": 32, "num_inference_steps": 2}
UNFINISHED: dict[str, Any] = {"width": 512, "height": 512, "num_inference_steps": 200}
POLL_SECONDS = 0.05


@pytest.fixture(params=["grpc", "http"])
def client(triton: TritonServer, request: pytest.FixtureRequest) -> Iterator[GlmImageClient]:
    with GlmImageClient(url(triton, request.param), timeout=120) as opened:
        yield opened


@pytest.fixture
def grpc_client(triton: TritonServer) -> Iterator[GlmImageClient]:
    with GlmImageClient(triton.grpc_url, timeout=120) as opened:
        yield opened


def url(triton: TritonServer, protocol: str) -> str:
    return f"{protocol}://{triton.grpc_url if protocol == 'grpc' else triton.http_url}"


def files_of(results: list[GenerationResult]) -> list[list[bytes]]:
    return [result.encoded for result in results]


def test_a_list_has_the_result_of_each_prompt(client: GlmImageClient) -> None:
    results = client.generate(PROMPTS, seed=5, **SMALL)
    assert files_of(results) == files_of([client.generate(prompt, seed=5, **SMALL) for prompt in PROMPTS])
    assert results[0].image.size == (64, 32)
    assert client.generate([]) == []


def test_the_asyncio_client_has_the_same_results(grpc_client: GlmImageClient, triton: TritonServer) -> None:
    async def send() -> list[GenerationResult]:
        async with AsyncGlmImageClient(triton.grpc_url, timeout=120) as client:
            return await client.generate(tuple(PROMPTS), seed=5, **SMALL)

    assert files_of(asyncio.run(send())) == files_of(grpc_client.generate(PROMPTS, seed=5, **SMALL))


def test_the_results_of_the_others_are_kept_when_one_prompt_fails(client: GlmImageClient) -> None:
    with pytest.raises(PromptsError, match=r"^1 of 3 prompts failed; the first is prompt 2: prompt is ") as failed:
        client.generate(["A fox", " ", "雪"], seed=5, **SMALL)
    kept = failed.value.results
    assert isinstance(kept[1], RefusedError)
    assert files_of([kept[0], kept[2]]) == files_of(client.generate(["A fox", "雪"], seed=5, **SMALL))


def test_a_value_that_cannot_be_sent_is_refused_before_any_request(grpc_client: GlmImageClient) -> None:
    for bad in ({"seed": 2**70}, {"images": "none.png"}, {"request_id": ""}):
        with pytest.raises(BadArgumentError):
            grpc_client.generate(PROMPTS, **bad)
    with pytest.raises(BadArgumentError, match="prompt is 7"):
        grpc_client.generate(["x", 7])  # type: ignore[list-item]


def test_an_interrupt_cancels_the_requests_of_all_prompts(grpc_client: GlmImageClient, triton: TritonServer) -> None:
    def interrupt() -> None:
        with GlmImageClient(triton.grpc_url) as other:
            while other.status("batch-1")["state"] not in ("running", "queued"):
                assert not ended.wait(POLL_SECONDS)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    ended = threading.Event()
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        grpc_client.generate(["a", "b"], request_id="batch", **UNFINISHED)
    ended.set()
    interrupter.join()
    assert [grpc_client.status(f"batch-{index}")["state"] for index in range(2)] == ["cancelled"] * 2


class TestPipeline:
    def test_the_call_of_diffusers_gives_the_images_of_the_client(self, grpc_client: GlmImageClient) -> None:
        pipe = RemotePipeline(grpc_client)
        generator = torch.Generator().manual_seed(7)
        images = pipe("A fox", num_images_per_prompt=2, generator=generator, **SMALL).images
        expected = grpc_client.generate("A fox", num_images=2, seed=7, **SMALL)
        assert [image.tobytes() for image in images] == [image.tobytes() for image in expected.images]
        (arrays,) = pipe(["A fox"], generator=[7], output_type="np", return_dict=False, **SMALL)
        assert isinstance(arrays, np.ndarray)
        assert (arrays.shape, arrays.dtype) == ((1, 32, 64, 3), np.float32)
        assert np.array_equal(arrays * 255, expected.arrays[0][None])

    def test_a_list_of_generators_has_one_for_each_image(self, grpc_client: GlmImageClient) -> None:
        pipe = RemotePipeline(grpc_client)
        images = pipe(["A fox", "雪"], num_images_per_prompt=2, generator=[7, 9, 7, 8], **SMALL).images
        expected = [
            grpc_client.generate(prompt, seed=seed, **SMALL).image
            for prompt, seed in [("A fox", 7), ("A fox", 9), ("雪", 7), ("雪", 8)]
        ]
        assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]

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
