"""Image-to-image over every protocol: the reference's images, and direct requests to the DiT."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from glm_image.pipeline import LocalPipeline
from glm_image.request.parameters import GenerationParameters
from glm_image.supervisor import TritonServer
from glm_image_client import GlmImageClient
from glm_image_client.cli import app
from parity.reference import load_reference, reference_image
from pictures import encoded, picture
from server.documents import REPOSITORY_ROOT
from server.kserve import (
    SENDERS,
    KServeError,
    Outputs,
    at_once,
    decoded,
    files,
    grpc_infer,
    http_binary_infer,
    http_json_infer,
    metadata,
)

SOURCE = picture(520, 512, seed=1)
OTHER = picture(512, 640, seed=2)
REQUEST: dict[str, Any] = {
    "prompt": "the sign says 'OPEN'", "height": 64, "width": 96, "seed": 7, "num_inference_steps": 2,
    "guidance_scale": 2.0,
}  # fmt: skip


def as_base64(file: bytes, header: str = "") -> str:
    return header + base64.b64encode(file).decode()


@pytest.fixture(scope="module")
def edited(triton: TritonServer) -> Outputs:
    return grpc_infer(triton, {**REQUEST, "image": [encoded(SOURCE), encoded(OTHER)]})


def test_equals_the_reference(edited: Outputs, tiny_checkpoint: Path) -> None:
    reference = load_reference(tiny_checkpoint)
    expected = reference_image(reference, REQUEST["prompt"], 64, 96, 7, 2, 2.0, images=[SOURCE, OTHER])
    assert expected.std() > 1
    np.testing.assert_array_equal(edited["images"][0], expected)
    tokens = metadata(edited)["tokens"]
    assert 1 <= tokens.pop("steps")[0] <= 5
    assert tokens == {"prompt": 30, "source": 16 * 16 + 20 * 16, "preview": 0, "image": 6}


def test_every_protocol_takes_files_or_base64(triton: TritonServer, edited: Outputs) -> None:
    raw = [encoded(SOURCE), encoded(OTHER)]
    texts = [as_base64(raw[0]), as_base64(raw[1], "data:image/png;base64,")]
    for infer, images in (
        (http_binary_infer, raw),
        (http_binary_infer, texts),
        (http_json_infer, texts),
        (grpc_infer, [raw[0], texts[1]]),
    ):
        np.testing.assert_array_equal(infer(triton, {**REQUEST, "image": images})["images"], edited["images"])
    (file,) = files(SENDERS["generate"](triton, {**REQUEST, "image": texts, "output_format": "png"}))
    np.testing.assert_array_equal(decoded(file), edited["images"][0])


def test_omitted_size_is_the_size_of_the_first_source(triton: TritonServer) -> None:
    images = [encoded(picture(530, 700)), encoded(SOURCE)]
    values = {"prompt": "x", "seed": 1, "num_inference_steps": 1, "image": images}
    outputs = grpc_infer(triton, values)
    assert outputs["images"].shape == (1, 704, 544, 3)
    assert (metadata(outputs)["width"], metadata(outputs)["height"]) == (544, 704)


def test_images_of_a_request_equal_those_of_their_seeds(triton: TritonServer, edited: Outputs) -> None:
    images = [encoded(SOURCE), encoded(OTHER)]
    together = grpc_infer(triton, {**REQUEST, "image": images, "num_images": 3})["images"]
    np.testing.assert_array_equal(together[0], edited["images"][0])
    np.testing.assert_array_equal(together[2], grpc_infer(triton, {**REQUEST, "image": images, "seed": 9})["images"][0])


def test_concurrent_edits_equal_single_edits(triton: TritonServer) -> None:
    variants: list[dict[str, Any]] = [
        {}, {"image": [encoded(SOURCE)]}, {"image": [encoded(OTHER)], "guidance_scale": 1.0}, {"height": 96},
        {"image": [encoded(OTHER), encoded(SOURCE)]}, {"image": [encoded(SOURCE, "jpeg")]},
    ]  # fmt: skip
    calls = [partial(grpc_infer, triton, {**REQUEST, **variant, "seed": 40 + i}) for i, variant in enumerate(variants)]
    alone = [call()["images"] for call in calls]
    for expected, together in zip(alone, at_once(calls).outputs, strict=True):
        np.testing.assert_array_equal(together["images"], expected)


@pytest.fixture(scope="module")
def prior(triton: TritonServer) -> Outputs:
    return grpc_infer(triton, {**REQUEST, "image": [encoded(SOURCE), encoded(OTHER)]}, "glm_ar")


PAINTING = {name: REQUEST[name] for name in ("prompt", "num_inference_steps", "guidance_scale")}


def test_stages_called_in_turn_equal_the_ensemble(triton: TritonServer, prior: Outputs, edited: Outputs) -> None:
    assert prior["source_grids"].tolist() == [[16, 16], [20, 16]]
    assert prior["source_token_ids"].shape == (16 * 16 + 20 * 16,)
    images = [encoded(SOURCE), encoded(OTHER)]
    painted = grpc_infer(triton, {**prior, **PAINTING, "image": images}, "glm_dit")
    np.testing.assert_array_equal(painted["images"], edited["images"])


SOURCES: dict[str, Any] = {"image": [encoded(SOURCE), encoded(OTHER)]}
EMPTY: dict[str, Any] = {"source_token_ids": np.zeros(0), "source_grids": np.zeros((0, 2))}
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "tokens without images": ({}, "image is 0 files; allowed: 1 to 4 files"),
    "images without tokens": (
        {**SOURCES, **EMPTY},
        "source_grids' number of rows is 0; allowed: 2, one for each image",
    ),
    "one image of two": ({"image": SOURCES["image"][:1]}, "number of rows is 2; allowed: 1, one for each image"),
    "images in another order": (
        {"image": SOURCES["image"][::-1]},
        r"source_grids\[0\] is \(16, 16\); allowed: \(20, 16\), as image 1 of 2",
    ),
    "too few tokens": ({**SOURCES, "source_token_ids": np.zeros(10)}, "source_token_ids' number is 10; allowed: 576"),
    "wrong tokens": (
        {**SOURCES, "source_token_ids": np.full(576, 256)},
        "source_token_ids is a tensor with 256; allowed: 0 to 255",
    ),
    "an empty grid": (
        {**SOURCES, "source_grids": [[0, 16], [20, 16]]},
        r"source_grids\[0\] is \(0, 16\); allowed: two sides of 1 and above",
    ),
    "a broken image": (
        {"image": [SOURCES["image"][0], b"\x89PNG\r\n\x1a\n"]},
        "image 2 of 2 is a PNG file that cannot",
    ),
    "no images": ({"image": np.zeros(0, dtype=object), **EMPTY}, "image is 0 files; allowed: 1 to 4 files"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_dit_refuses_invalid_source_inputs(triton: TritonServer, prior: Outputs, refusal: str) -> None:
    changed, sentence = REFUSALS[refusal]
    with pytest.raises(KServeError, match=sentence) as refused:
        grpc_infer(triton, {**prior, **PAINTING, **changed}, "glm_dit")
    assert refused.value.status == "INVALID_ARGUMENT"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_client_sends_paths_bytes_and_images(
    triton: TritonServer, edited: Outputs, protocol: Any, tmp_path: Path
) -> None:
    path = tmp_path / "source.png"
    path.write_bytes(encoded(SOURCE))
    url = triton.grpc_url if protocol == "grpc" else triton.http_url
    with GlmImageClient(url, protocol) as client:
        for images in ([path, OTHER], [str(path), encoded(OTHER)], [SOURCE, OTHER]):
            result = client.generate(**REQUEST, images=images)
            np.testing.assert_array_equal(result.arrays[0], edited["images"][0])
        tokens = client.prior_tokens(REQUEST["prompt"], height=64, width=96, seed=7, images=[SOURCE, OTHER])
        painted = client.paint(prior=tokens, images=[SOURCE, OTHER], **PAINTING)
        np.testing.assert_array_equal(painted.arrays[0], edited["images"][0])


def run_command(arguments: list[str], in_process: bool) -> str:
    """Runs ``glm-image`` and returns its output."""
    if in_process:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return result.stdout
    command = [sys.executable, "-c", "from glm_image_client.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("offline", [False, True])
def test_command_line_sends_images(
    triton: TritonServer, tiny_checkpoint: Path, edited: Outputs, offline: bool, tmp_path: Path
) -> None:
    """The second source is really a JPEG, another image, so the output is compared with that of a request.

    Offline, the command runs in this process, which has torch imported; ``cli_offline.sh`` runs it as a program.
    """
    (tmp_path / "a.png").write_bytes(encoded(SOURCE))
    (tmp_path / "b.jpg").write_bytes(encoded(OTHER, "jpeg"))
    where = ["--offline", "--checkpoint", str(tiny_checkpoint), "--device", "cpu"]
    arguments = [
        "generate", REQUEST["prompt"],
        "--size", "96x64", "--steps", "2", "--guidance", "2", "--seed", "7", "--json", "-o", str(tmp_path / "out.png"),
        "--image", str(tmp_path / "a.png"), "--image", str(tmp_path / "b.jpg"),
        *(where if offline else ["--url", triton.grpc_url]),
    ]  # fmt: skip
    assert json.loads(run_command(arguments, offline))["metadata"]["tokens"]["source"] == 576
    expected = grpc_infer(triton, {**REQUEST, "image": [encoded(SOURCE), encoded(OTHER, "jpeg")]})["images"][0]
    with Image.open(tmp_path / "out.png") as written:
        np.testing.assert_array_equal(np.asarray(written), expected)
    assert not np.array_equal(expected, edited["images"][0])


def test_images_in_the_documentation_are_those_of_its_command() -> None:
    docs = REPOSITORY_ROOT / "docs"
    values = GenerationParameters(
        prompt="Paint the blue square red",
        height=256,
        width=256,
        num_inference_steps=20,
        seed=42,
        images=((docs / "edit_before.png").read_bytes(),),
    )
    assert values.prompt in (docs / "image_to_image.md").read_text(encoding="utf-8")
    with LocalPipeline(REPOSITORY_ROOT / "checkpoints" / "tiny", "cpu") as trained:
        (edited,) = trained.generate(values).pixels
    with Image.open(docs / "edit_after.png") as shown:
        difference = np.asarray(shown).astype(int) - edited
    assert np.abs(difference).max() <= 2  # the number of threads changes the last bits
