"""Other programs as clients, each in an environment of its own, and the examples."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from client_environments import environment
from glm_image.supervisor import TritonServer
from pictures import encoded, picture
from running_gateway import RunningGateway
from server.documents import REPOSITORY_ROOT, run_example
from server.kserve import grpc_infer

SECONDS = 300
CALLS = Path(__file__).parent
TOKENIZER = REPOSITORY_ROOT / "checkpoints" / "tiny" / "processor"


@pytest.fixture(scope="module")
def fox(triton: TritonServer) -> NDArray[np.uint8]:
    """The image of the examples, as Triton gives it directly."""
    prompt = "A red fox reading a newspaper that says “NEWS”"
    values = {"prompt": prompt, "width": 256, "height": 256, "num_inference_steps": 20, "seed": 42}
    pixels: NDArray[np.uint8] = grpc_infer(triton, values)["images"][0]
    return pixels


def pixels_of(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def python_of(name: str) -> str:
    return str(environment(name) / "bin" / "python")


def run(*command: str | Path) -> str:
    """Runs a program that succeeds, and returns what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_openai_library(gateway: RunningGateway) -> None:
    assert run(python_of("openai"), CALLS / "openai_calls.py", gateway.url) == "done\n"


def test_openai_library_for_node(gateway: RunningGateway) -> None:
    library = environment("node", "node") / "node_modules" / "openai" / "index.mjs"
    assert run("node", CALLS / "node_calls.mjs", gateway.url, library) == "done\n"


def test_litellm(gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is downloaded
    (tmp_path / "source.png").write_bytes(encoded(picture(64, 64)))
    printed = run(python_of("litellm"), CALLS / "litellm_calls.py", gateway.url, tmp_path / "source.png")
    assert printed.splitlines()[-1] == "done"


def test_langchain(gateway: RunningGateway) -> None:
    assert run(python_of("langchain"), CALLS / "langchain_calls.py", gateway.url) == "done\n"


TRITON_TEMPLATE = (
    "--custom-endpoint", "/v2/models/glm_image/generate",
    "--extra-inputs", 'payload_template:{"prompt": {{ text|tojson }}}',
    "--extra-inputs", "output_format:png", "--extra-inputs", "height:64", "--extra-inputs", "width:64",
    "--extra-inputs", "response_field:images_base64",
)  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("image_generation", ("--extra-inputs", "size:64x64")),
        ("image_generation", ("--extra-inputs", "size:64x64", "--streaming", "--extra-inputs", "partial_images:2")),
        (
            "image_edit",
            ("--extra-inputs", "size:64x64", "--image-width-mean", "96", "--image-height-mean", "64"),
        ),
        ("template", TRITON_TEMPLATE),
    ],
)
def test_aiperf(
    gateway: RunningGateway, triton: TritonServer, tmp_path: Path, kind: str, flags: tuple[str, ...]
) -> None:
    url, model = (f"http://{triton.http_url}", "glm_image") if kind == "template" else (gateway.url, "glm-image")
    run(
        environment("aiperf") / "bin" / "aiperf", "profile", "--model", model, "--url", url, "--endpoint-type", kind,
        *flags, "--extra-inputs", "num_inference_steps:2", "--synthetic-input-tokens-mean", "10", "--concurrency", "2",
        "--request-count", "4", "--tokenizer", TOKENIZER, "--ui", "none", "--artifact-dir", tmp_path,
    )  # fmt: skip
    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert (report["request_count"]["avg"], report["request_error_rate"]["avg"]) == (4, 0)
    assert report["http_req_data_received"]["min"] > 1  # kilobytes


@pytest.mark.parametrize("name", ["images.sh", "openai.sh"])
def test_curl(gateway: RunningGateway, triton: TritonServer, tmp_path: Path, fox: NDArray[np.uint8], name: str) -> None:
    run_example(name, triton, tmp_path, gateway_url=gateway.url)
    np.testing.assert_array_equal(pixels_of(tmp_path / "output_t2i_256x256.png"), fox)
    assert (tmp_path / "resp.json").is_file()


def test_openai_example(gateway: RunningGateway, triton: TritonServer, tmp_path: Path, fox: NDArray[np.uint8]) -> None:
    run_example("openai_sdk.py", triton, tmp_path, gateway_url=gateway.url, python=python_of("openai"))
    for name in ("openai", "openai_streamed", "openai_chat"):
        np.testing.assert_array_equal(pixels_of(tmp_path / f"{name}.png"), fox)
    partial = pixels_of(tmp_path / "openai_partial_1.png")
    assert partial.shape == (32, 32, 3)
    assert not np.array_equal(pixels_of(tmp_path / "openai_edit.png"), fox)
