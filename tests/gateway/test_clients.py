"""Other programs as clients: OpenAI's library, in an environment of its own, and the examples."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from glm_image.supervisor import TritonServer
from running_gateway import RunningGateway
from server.documents import REPOSITORY_ROOT, run_example
from server.kserve import grpc_infer

PYTHON_VARIABLE = "GLM_IMAGE_OPENAI_PYTHON"
ENVIRONMENT = ".venv-openai"
INSTALL = f"python3 -m venv {ENVIRONMENT} && {ENVIRONMENT}/bin/pip install openai==3.57.0"
SECONDS = 300


@pytest.fixture(scope="module")
def openai_python() -> str:
    """A Python that has OpenAI's library."""
    python = os.environ.get(PYTHON_VARIABLE) or str(REPOSITORY_ROOT / ENVIRONMENT / "bin" / "python")
    if not Path(python).exists():
        pytest.skip(f"no environment with OpenAI's library: {INSTALL}, or set {PYTHON_VARIABLE}")
    return python


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


def test_openai_library(gateway: RunningGateway, openai_python: str) -> None:
    script = Path(__file__).with_name("openai_calls.py")
    done = subprocess.run(
        [openai_python, script, gateway.url], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize("name", ["images.sh", "openai.sh"])
def test_curl(gateway: RunningGateway, triton: TritonServer, tmp_path: Path, fox: NDArray[np.uint8], name: str) -> None:
    run_example(name, triton, tmp_path, gateway_url=gateway.url)
    np.testing.assert_array_equal(pixels_of(tmp_path / "output_t2i_256x256.png"), fox)
    assert (tmp_path / "resp.json").is_file()


def test_openai_example(
    gateway: RunningGateway, triton: TritonServer, tmp_path: Path, fox: NDArray[np.uint8], openai_python: str
) -> None:
    run_example("openai_sdk.py", triton, tmp_path, gateway_url=gateway.url, python=openai_python)
    for name in ("openai", "openai_streamed", "openai_chat"):
        np.testing.assert_array_equal(pixels_of(tmp_path / f"{name}.png"), fox)
    partial = pixels_of(tmp_path / "openai_partial_1.png")
    assert partial.shape == (32, 32, 3)
    assert not np.array_equal(pixels_of(tmp_path / "openai_edit.png"), fox)
