"""An operator's edits of ``config.pbtxt``: the devices of instances, their checkpoints, and the errors at the start."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from glm_image.supervisor import ServerSettings, ServerStartError, TritonServer
from glm_image_client import GlmImageClient
from helpers import wait_until
from pictures import encoded, picture
from server.kserve import Burst, KServeError, Outputs, Values, at_once, grpc_infer, metadata
from server.test_profiles import images_by_instance

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"

REQUEST: Values = {"prompt": "A fox reading 'NEWS'", "height": 96, "width": 96, "num_inference_steps": 200, "seed": 1}

LOGS: dict[TritonServer, io.StringIO] = {}


def copy_repository(folder: Path, *models: str) -> Path:
    for model in models:
        shutil.copytree(REPOSITORY / model, folder / model, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def edit(repository: Path, model: str, old: str, new: str) -> None:
    """Replaces the only occurrence of ``old``."""
    path = repository / model / "config.pbtxt"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def set_parameter(repository: Path, model: str, name: str, value: str) -> None:
    path = repository / model / "config.pbtxt"
    line = re.compile(rf'^(parameters {{ key: "{name}" value {{ string_value: )".*"( }} }})$', re.MULTILINE)
    text, count = line.subn(lambda found: f'{found[1]}"{value}"{found[2]}', path.read_text())
    assert count == 1
    path.write_text(text)


@pytest.fixture(scope="module")
def two_instances(
    tiny_checkpoint: Path, same_threads: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """Two instances of the DiT over the configuration's checkpoint; that of the environment cannot be loaded."""
    folder = tmp_path_factory.mktemp("placed")
    repository = copy_repository(folder / "models", "glm_image", "glm_ar", "glm_dit", "glm_control")
    edit(repository, "glm_dit", "count: 1", "count: 2")
    edit(repository, "glm_dit", "max_queue_size: 64", "max_queue_size: 4")
    set_parameter(repository, "glm_dit", "devices", "cpu:4;cpu:7")
    set_parameter(repository, "glm_ar", "max_queue_bytes", "2000000")
    for model in ("glm_ar", "glm_dit"):
        set_parameter(repository, model, "checkpoint", str(tiny_checkpoint))
    unusable = folder / "unusable"
    unusable.mkdir()
    (unusable / "model_index.json").write_text("{}")
    log = io.StringIO()
    with TritonServer(ServerSettings(unusable, model_repository=repository, drain_seconds=5), log=log) as server:
        LOGS[server] = log
        yield server


def paint_four(server: TritonServer, prior: Outputs) -> Burst:
    values = {name: value for name, value in REQUEST.items() if name in {"prompt", "num_inference_steps"}}
    return at_once(
        [partial(grpc_infer, server, {**values, **prior, "resolved_seed": [seed]}, "glm_dit") for seed in range(4)]
    )


def denoising_seconds(burst: Burst) -> float:
    return sum(float(metadata(outputs)["seconds"]["denoise"]) for outputs in burst.outputs)


def test_two_instances_denoise_concurrently(triton: TritonServer, two_instances: TritonServer) -> None:
    """An instance denoises one image at a time: only two can denoise for more seconds than have passed."""
    prior = grpc_infer(triton, REQUEST, "glm_ar")
    single, double = paint_four(triton, prior), paint_four(two_instances, prior)
    assert denoising_seconds(single) <= single.seconds
    assert denoising_seconds(double) > double.seconds
    for alone, concurrent in zip(single.outputs, double.outputs, strict=True):
        np.testing.assert_array_equal(alone["images"], concurrent["images"])
    assert all(count > 0 for count in images_by_instance(two_instances, len(double.outputs)).values())


def test_checkpoint_of_the_configuration_is_loaded(
    triton: TritonServer, two_instances: TritonServer, tiny_checkpoint: Path
) -> None:
    requests = [{**REQUEST, "seed": seed, "num_inference_steps": 3} for seed in range(4)]
    alone = [grpc_infer(triton, request) for request in requests]
    concurrent = at_once([partial(grpc_infer, two_instances, request) for request in requests])
    for expected, outputs in zip(alone, concurrent.outputs, strict=True):
        np.testing.assert_array_equal(outputs["images"], expected["images"])
        assert metadata(outputs)["model"] == metadata(expected)["model"]
        assert metadata(outputs)["model"]["name"] == tiny_checkpoint.name


def test_cancel_reaches_all_instances_and_a_full_queue_refuses(
    triton: TritonServer, two_instances: TritonServer
) -> None:
    prior = grpc_infer(triton, REQUEST, "glm_ar")
    stage = {name: prior[name] for name in ("prior_token_ids", "prior_grid")}
    values = {"prompt": REQUEST["prompt"], "num_inference_steps": 200, **stage}
    with ThreadPoolExecutor(16) as pool, GlmImageClient(two_instances.grpc_url) as client:

        def send(count: int) -> list[Future[Outputs]]:
            return [pool.submit(grpc_infer, two_instances, values, "glm_dit", request_id="all") for _ in range(count)]

        answers = send(16)
        wait(answers, return_when=FIRST_COMPLETED)  # a refusal

        def both_denoise() -> bool:
            # Requests in place of those that were refused: Triton may have given the first ones all to one instance.
            answers.extend(send(16 - sum(not answer.done() for answer in answers)))
            return [request["stage"] for request in client.status("all")["requests"]].count("denoise") == 2

        assert wait_until(both_denoise)
        client.cancel("all")
        statuses = [str(getattr(answer.exception(), "status", "answered")) for answer in answers]
    assert set(statuses) <= {"CANCELLED", "UNAVAILABLE", "answered"}
    assert statuses.count("CANCELLED") >= 2
    refused = [answer.exception() for answer in answers if "UNAVAILABLE" in str(answer.exception())]
    assert refused
    assert all("maximum queue size" in str(error) for error in refused)


def test_requests_beyond_the_bytes_of_the_queue_are_refused(two_instances: TritonServer) -> None:
    """A source image costs its file and 0.8 MB of patches."""
    file, large = (encoded(picture(side, side)) for side in (128, 1000))
    values: Values = {**REQUEST, "height": 2048, "width": 2048, "num_inference_steps": 1, "image": [file]}
    with ThreadPoolExecutor(2) as pool, GlmImageClient(two_instances.grpc_url) as client:
        held = [pool.submit(grpc_infer, two_instances, values, request_id="held") for _ in range(2)]
        while [request["stage"] for request in client.status("held")["requests"]].count("decode") < 2:
            pass
        with pytest.raises(
            KServeError,
            match=r"glm_ar holds 2 MB of requests, and this one of 1 MB would exceed the 2 MB of max_qu",
        ) as full:
            grpc_infer(two_instances, values)
        assert full.value.status == "UNAVAILABLE"
        client.cancel("held")
        assert all(isinstance(answer.exception(), KServeError) for answer in held)
    with pytest.raises(KServeError, match=r"image is \d+ bytes in all; allowed: at most 2000000 \(max_queue_bytes\)"):
        grpc_infer(two_instances, {**values, "image": [large]})
    small = {**values, "height": 32, "width": 32}
    assert grpc_infer(two_instances, small)["images"].shape == (1, 32, 32, 3)


# Model, parameter, value, the model's error.
REFUSALS = {
    "no device": ("glm_dit", "devices", "gpu:0", "devices has the entry 'gpu:0'; allowed: auto, or cpu, npu:N, cuda:N"),
    "unknown device": ("glm_dit", "devices", "cuda:99", "devices has the entry 'cuda:99'; found on this machine: "),
    "too many devices": ("glm_ar", "devices", "cpu:0;cpu:1", "devices is 'cpu:0;cpu:1': 2 for 1 instances; allowed: "),
    "more ranks than devices": (
        "glm_dit",
        "parallel",
        "cfg=2",
        "parallel is 'cfg=2', which takes 2 devices, and the instance has 1; allowed: none, auto, or of cfg=2, tp=N, ",
    ),
    "misspelt dtype": ("glm_dit", "dtype", "bf16", "dtype is 'bf16'; allowed: auto, float32, bfloat16"),
    "no number": ("glm_ar", "max_num_seqs", "many", "max_num_seqs is 'many'; allowed: a whole number of at least 1"),
    "pieces": (
        "glm_ar",
        "graph_mode",
        "PIECEWISE",
        "allowed: NONE, FULL_DECODE_ONLY, FULL; the decode step has no part",
    ),
    "sizes": (
        "glm_ar",
        "graph_capture_sizes",
        "[1,4]",
        "graph_capture_sizes is '1,4'; allowed with speculation: row counts from 1 to 128, one of them at least 8",
    ),
    "no limit": ("glm_ar", "limit_max_side", "2k", "limit_max_side is '2k'; allowed: a number"),
    "no variable": ("glm_ar", "checkpoint", "${NO_SUCH_FOLDER}", "the environment has no NO_SUCH_FOLDER; set it"),
}


# Refused after seconds of imports, with messages that other tests check.
LATE = {"sizes", "more ranks than devices"}


@pytest.mark.parametrize(
    "refusal", [pytest.param(name, marks=pytest.mark.full if name in LATE else ()) for name in REFUSALS]
)
def test_invalid_parameter_ends_the_start_with_the_models_error(
    tiny_checkpoint: Path, tmp_path: Path, refusal: str
) -> None:
    model, parameter, value, sentence = REFUSALS[refusal]
    repository = copy_repository(tmp_path, model)
    set_parameter(repository, model, parameter, value)
    with pytest.raises(ServerStartError, match=re.escape(sentence)) as refused:
        TritonServer(ServerSettings(tiny_checkpoint, model_repository=repository)).__enter__()
    assert str(refused.value).startswith(f"{model} failed to load: {parameter.removesuffix('s')}")


def test_unknown_parameter_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    repository = copy_repository(tmp_path, "glm_dit")
    edit(repository, "glm_dit", 'key: "devices"', 'key: "device"')
    with pytest.raises(ServerStartError, match="glm_dit failed to load: parameter 'device' is not known; allowed: "):
        TritonServer(ServerSettings(tiny_checkpoint, model_repository=repository)).__enter__()


def test_instance_takes_the_device_of_its_index(two_instances: TritonServer) -> None:
    log = (LOGS[two_instances]).getvalue()
    for index, device in enumerate(("cpu:4", "cpu:7")):
        assert f"glm_dit_0_{index} instance {index} of 2 takes {device}: devices is cpu:4;cpu:7, found " in log
        assert f"glm_dit_0_{index} loading the engine on {device}" in log
    assert "glm_ar_0_0 instance 0 of 1 takes " in log


def test_mismatched_checkpoint_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "partial"
    shutil.copytree(tiny_checkpoint, checkpoint)
    config = checkpoint / "vae" / "config.json"
    statistics = {"latents_mean": [0.0] * 9, "latents_std": [1.0] * 9}
    config.write_text(json.dumps({**json.loads(config.read_text()), "latent_channels": 9, **statistics}))
    repository = copy_repository(tmp_path / "models", "glm_dit")
    with pytest.raises(ServerStartError, match=r"glm_dit failed to load: .*vae.*shape"):
        TritonServer(ServerSettings(checkpoint, model_repository=repository)).__enter__()
