"""Images of the served ensemble equal the reference's bit for bit, also under concurrent requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc

from glm_image.pipeline import LocalPipeline
from glm_image.request.parameters import GenerationParameters
from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient
from helpers import wait_until
from parity.reference import load_reference, reference_image
from server.kserve import (
    SENDERS,
    Burst,
    Outputs,
    Values,
    at_once,
    decoded,
    files,
    grpc_infer,
    grpc_start,
    http_binary_infer,
    metadata,
)
from server.test_metrics import page_when

DIT_STAGES = {"dit_queue", "condition", "denoise", "vae", "encode"}
STAGES = {"ar_queue", "prefill", "decode"} | DIT_STAGES

SLOTS = 8
SMALL: Values = {"prompt": "a fox", "height": 32, "width": 64, "num_inference_steps": 2, "seed": 5}

# Prompt, height, width, seed, steps, guidance.
PARITY = [
    ("a red fox in the snow", 128, 128, 1, 4, 1.5),
    ("A fox reading 'NEWS'", 64, 192, 2, 3, 4.0),
    ("two signs: 'open' and \"closed\"", 160, 32, 3, 5, 1.0),
    ("它说“你好”", 96, 256, -7, 2, 0.0),
]

# Different in everything, the lengths of their sequences included.
CONCURRENT: list[dict[str, Any]] = [
    {"prompt": "a fox", "height": 32, "width": 32, "num_inference_steps": 2},
    {"prompt": "a 'sign' at night, in the rain, far away", "height": 256, "width": 64, "num_inference_steps": 6},
    {"prompt": "雪", "height": 64, "width": 256, "num_inference_steps": 3, "guidance_scale": 0.0},
    {"prompt": "x", "height": 160, "width": 160, "num_inference_steps": 4, "guidance_scale": 4.0},
    {"prompt": "a 'b' \"c\"", "height": 33, "width": 65, "num_inference_steps": 2, "temperature": 0.5},
    {"prompt": "a fox", "height": 96, "width": 32, "num_inference_steps": 5, "top_p": 1.0},
    {"prompt": "two", "height": 64, "width": 64, "num_inference_steps": 2, "num_images": 2},
    {"prompt": "hat", "height": 128, "width": 96, "num_inference_steps": 3, "top_k": 7},
]


@pytest.mark.parametrize(("prompt", "height", "width", "seed", "steps", "guidance"), PARITY)
def test_equals_the_reference(
    triton: TritonServer,
    tiny_checkpoint: Path,
    pipeline: LocalPipeline,
    prompt: str,
    height: int,
    width: int,
    seed: int,
    steps: int,
    guidance: float,
) -> None:
    values: dict[str, Any] = {
        "prompt": prompt,
        "height": height,
        "width": width,
        "seed": seed,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    (served,) = grpc_infer(triton, values)["images"]
    (local,) = pipeline.generate(GenerationParameters(**values)).pixels
    reference = reference_image(load_reference(tiny_checkpoint), prompt, height, width, seed, steps, guidance)
    assert served.std() > 1  # a picture, not one colour
    np.testing.assert_array_equal(served, reference)
    np.testing.assert_array_equal(served, local)


def test_an_omitted_seed_is_random_and_reported(triton: TritonServer) -> None:
    unseeded = {name: value for name, value in SMALL.items() if name != "seed"}
    first, second = at_once([partial(grpc_infer, triton, unseeded)] * 2).outputs
    seeds = [metadata(outputs)["seeds"][0] for outputs in (first, second)]
    assert seeds[0] != seeds[1]
    assert all(0 <= seed < 2**53 for seed in seeds)
    assert not np.array_equal(first["images"], second["images"])
    again = grpc_infer(triton, {**unseeded, "seed": seeds[0]})
    np.testing.assert_array_equal(again["images"], first["images"])


def test_omitted_inputs_have_the_documented_defaults(triton: TritonServer, pipeline: LocalPipeline) -> None:
    sampling = pipeline.ar.sampling
    spelt_out = {
        **SMALL,
        "num_inference_steps": 50,
        "guidance_scale": 1.5,
        "num_images": 1,
        "negative_prompt": "",
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "output_format": "raw",
    }
    left_out = {name: value for name, value in SMALL.items() if name != "num_inference_steps"}
    short, long = (grpc_infer(triton, values) for values in (left_out, spelt_out))
    np.testing.assert_array_equal(short["images"], long["images"])
    assert metadata(short)["steps"] == 50


def test_metadata_describes_the_image(triton: TritonServer, tiny_checkpoint: Path) -> None:
    values = {**SMALL, "height": 33, "width": 65, "num_images": 2, "output_format": "webp"}
    found = metadata(grpc_infer(triton, values))
    seconds, tokens, model = found.pop("seconds"), found.pop("tokens"), found.pop("model")
    assert isinstance(found.pop("version"), str)
    assert [label["Label"] for label in found.pop("aigc")] == ["1", "1"]
    assert found == {
        "seeds": [5, 6],
        "width": 65,
        "height": 33,
        "generated_width": 96,
        "generated_height": 64,
        "steps": 2,
        "rendered_text": [],
        "cached_steps": [0, 0],
        "attention_backend": "native",
        "blurred": [],
    }
    assert set(seconds) == STAGES
    assert all(value >= 0 for value in seconds.values())
    assert min(seconds[stage] for stage in STAGES - {"ar_queue", "dit_queue"}) > 0
    # A grid of 2 x 3; its preview has int(sqrt(2/3) * 16) rows and int(sqrt(3/2) * 16) columns.
    assert tokens.pop("prompt") > len("a fox")
    assert 1 <= tokens.pop("steps")[0] < 13 * 19 + 2 * 3
    assert tokens == {"source": 0, "preview": 13 * 19, "image": 2 * 3}
    assert model["name"] == tiny_checkpoint.name
    assert isinstance(model["revision"], str)
    assert model["revision"]


@pytest.fixture(scope="module")
def raw(triton: TritonServer) -> Outputs:
    return grpc_infer(triton, {**SMALL, "height": 33, "width": 65})


def test_raw_image_is_cropped_to_the_requested_size(triton: TritonServer, raw: Outputs) -> None:
    assert raw["images"].shape == (1, 33, 65, 3)
    assert raw["images_base64"].shape == (0,)
    whole = grpc_infer(triton, {**SMALL, "height": 64, "width": 96})["images"]
    np.testing.assert_array_equal(raw["images"], whole[:, :33, :65])


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_encoded_image_is_a_file_of_the_requested_size(triton: TritonServer, raw: Outputs, output_format: str) -> None:
    outputs = http_binary_infer(triton, {**SMALL, "height": 33, "width": 65, "output_format": output_format})
    assert outputs["images"].shape == (0, 0, 0, 3)
    (file,) = files(outputs)
    assert file.startswith({"png": b"\x89PNG", "jpeg": b"\xff\xd8\xff", "webp": b"RIFF"}[output_format])
    pixels = decoded(file)
    assert pixels.shape == (33, 65, 3)
    difference = np.abs(pixels.astype(int) - raw["images"][0])
    assert difference.mean() <= (0 if output_format == "png" else 12)


@pytest.mark.parametrize("seed", [5, 2**63 - 4])
def test_image_i_has_the_seed_plus_i(triton: TritonServer, seed: int) -> None:
    eight = grpc_infer(triton, {**SMALL, "seed": seed, "num_images": 8})
    seeds = metadata(eight)["seeds"]
    assert seeds == [(seed + index + 2**63) % 2**64 - 2**63 for index in range(8)]
    assert len({picture.tobytes() for picture in eight["images"]}) == 8
    for index in (0, 3, 7):
        alone = grpc_infer(triton, {**SMALL, "seed": seeds[index]})
        np.testing.assert_array_equal(alone["images"][0], eight["images"][index])


def test_concurrent_requests_get_the_images_of_single_requests(triton: TritonServer) -> None:
    """Eight requests, different in everything, at the same moment over all protocols."""
    senders = list(SENDERS.values())
    calls = [
        partial(senders[index % len(senders)], triton, {**request, "seed": 100 + index, "output_format": "png"})
        for index, request in enumerate(CONCURRENT)
    ]
    alone = [call() for call in calls]
    images = sum(request.get("num_images", 1) for request in CONCURRENT)
    concurrent = decoded_together(triton, calls, images)
    assert [files(outputs) for outputs in concurrent.outputs] == [files(outputs) for outputs in alone]
    # The seconds of a request with several images are those of all of them.
    reports = [
        (answered, metadata(outputs)["seconds"])
        for answered, outputs in zip(concurrent.answered, concurrent.outputs, strict=True)
        if len(metadata(outputs)["seeds"]) == 1
    ]
    ends = [answered - sum(seconds[stage] for stage in DIT_STAGES) for answered, seconds in reports]
    assert (
        most_concurrent([end - seconds["decode"] for end, (_, seconds) in zip(ends, reports, strict=True)], ends) >= 3
    )


def test_the_ar_decodes_requests_together(triton: TritonServer) -> None:
    """By its own times, on the monotonic clock that it shares with this process."""
    calls = [
        partial(grpc_infer, triton, {"prompt": "a fox", "height": 128, "width": 128, "seed": seed}, "glm_ar")
        for seed in range(8)
    ]
    reports = [_ar_metadata(outputs) for outputs in decoded_together(triton, calls, SLOTS).outputs]
    ends = [report["finished_ns"] for report in reports]
    begins = [report["finished_ns"] - int(1e9 * report["seconds"]["decode"]) for report in reports]
    assert most_concurrent(begins, ends) == SLOTS


def decoded_together(server: TritonServer, calls: Sequence[Callable[[], Outputs]], images: int) -> Burst:
    """Sends requests for ``images`` while another holds every slot of the AR, which is freed when all of them wait."""
    holder: Values = {**SMALL, "height": 2048, "width": 2048, "num_images": SLOTS}
    with closing(tritonclient.grpc.InferenceServerClient(server.grpc_url)) as client, ThreadPoolExecutor(1) as pool:
        holding = grpc_start(client, holder, "glm_ar")
        page_when(server, lambda page: page.load() == (SLOTS, 0))
        burst = pool.submit(at_once, calls)
        page = page_when(server, lambda page: page.load() == (SLOTS, images))
        holding.cancel()
        assert page.load() == (SLOTS, images)
        return burst.result()


def most_concurrent(begins: Sequence[float], ends: Sequence[float]) -> int:
    """The most of some intervals that share a moment."""
    return max(sum(begin <= moment < end for begin, end in zip(begins, ends, strict=True)) for moment in begins)


def _ar_metadata(outputs: Outputs) -> dict[str, Any]:
    return metadata({"metadata": outputs["ar_metadata"]})


def test_later_request_joins_a_running_one_without_changing_it(triton: TritonServer) -> None:
    """Requests join while a long one decodes, which ends later than they do, and as it does alone."""
    long_one = {**SMALL, "height": 512, "width": 512, "num_inference_steps": 1}
    alone = grpc_infer(triton, long_one)
    short_alone = grpc_infer(triton, SMALL)
    with ThreadPoolExecutor(1) as pool, GlmImageClient(triton.grpc_url) as client:
        answer = pool.submit(grpc_infer, triton, long_one, request_id="joined")
        assert wait_until(lambda: [request["stage"] for request in client.status("joined")["requests"]] == ["decode"])
        short = grpc_infer(triton, SMALL)
        assert not answer.done()
    np.testing.assert_array_equal(short["images"], short_alone["images"])
    np.testing.assert_array_equal(answer.result()["images"], alone["images"])
