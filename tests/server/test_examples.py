"""Every file of examples/, run as it is against a real server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from glm_image.pipeline import LocalPipeline
from glm_image.request.parameters import GenerationParameters
from glm_image.supervisor import TritonServer
from glm_image_client import PriorTokens
from server.documents import DOCS, EXAMPLES, REPOSITORY_ROOT, run_example
from server.test_clients import NODE_EXAMPLE

FOX = GenerationParameters(
    "A red fox reading a newspaper that says “NEWS”", height=256, width=256, num_inference_steps=20, seed=42
)
FOX_EXAMPLES = {
    "curl_generate.sh": "generate.png",
    "curl_infer.sh": "infer.png",
    "grpc_tritonclient.py": "grpc.png",
    "http_tritonclient.py": "http.png",
    "client_sync.py": "client.png",
    "client_pipeline.py": "pipeline.png",
    "client_async.py": "async_0.png",
    "stream_previews.py": "streamed.png",
    "cli_generate.sh": "command.png",
    "cli_offline.sh": "offline.png",
    "prior_tokens_http.py": "plain.png",
}
"""Examples that send the same request through different clients, and the files they write."""

IMAGE_TO_IMAGE = ("image_to_image.py", "image_to_image_curl.sh")
PRIOR_TOKENS = "prior_tokens.py"

GATEWAY_EXAMPLES = ("images.sh", "openai.sh", "openai_sdk.py")
"""Run by ``tests/gateway/test_clients.py``."""


def pixels_of(file: Path, size: tuple[int, int] = (256, 256)) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        assert (image.format, image.size) == ("PNG", size)
        return np.asarray(image)


@pytest.fixture(scope="module")
def fox(pipeline: LocalPipeline) -> NDArray[np.uint8]:
    """The image that the engines generate without a server."""
    (image,) = pipeline.generate(FOX).pixels
    return np.asarray(image)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A working directory with the checkpoint where the offline example expects it."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "tiny").symlink_to(tiny_checkpoint)
    return tmp_path


def test_every_example_is_tested() -> None:
    tested = {*FOX_EXAMPLES, *IMAGE_TO_IMAGE, *GATEWAY_EXAMPLES, PRIOR_TOKENS, NODE_EXAMPLE.name}
    assert {path.name for path in EXAMPLES.iterdir()} == tested
    assert NODE_EXAMPLE.parent == EXAMPLES


@pytest.mark.parametrize("name", FOX_EXAMPLES)
def test_example_writes_the_reference_image(
    triton: TritonServer, folder: Path, fox: NDArray[np.uint8], name: str
) -> None:
    run_example(name, triton, folder)
    np.testing.assert_array_equal(pixels_of(folder / FOX_EXAMPLES[name]), fox)
    if name == "client_async.py":
        assert not np.array_equal(pixels_of(folder / "async_1.png"), fox)
    if name == "stream_previews.py":
        sketches = sorted(path.name for path in folder.glob("denoise_*.png"))
        assert sketches == ["denoise_05.png", "denoise_10.png", "denoise_15.png"]
        assert pixels_of(folder / sketches[0], (32, 32)).any()


class TestPriorTokens:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory, triton: TritonServer) -> Path:
        folder = tmp_path_factory.mktemp("prior_tokens")
        self.check_output(run_example(PRIOR_TOKENS, triton, folder))
        return folder

    def check_output(self, output: str) -> None:
        assert f"# {output.strip()}\n" in (EXAMPLES / PRIOR_TOKENS).read_text(encoding="utf-8")

    def test_saved_tokens_give_the_image_of_a_single_request(self, folder: Path, fox: NDArray[np.uint8]) -> None:
        np.testing.assert_array_equal(pixels_of(folder / "kept.png"), fox)
        np.testing.assert_array_equal(pixels_of(folder / "variants.png", (768, 512))[:256, :256], fox)

    def test_every_setting_renders_a_different_image(self, folder: Path) -> None:
        sheet = pixels_of(folder / "variants.png", (768, 512))
        tiles = sheet.reshape(2, 256, 3, 256, 3).swapaxes(1, 2).reshape(6, -1)
        assert len({tile.tobytes() for tile in tiles}) == 6

    def test_edited_tokens_render_different_images(self, folder: Path, fox: NDArray[np.uint8]) -> None:
        swapped, mixed = (pixels_of(folder / f"edited_{index}.png") for index in range(2))
        assert not np.array_equal(swapped, fox)
        assert not np.array_equal(mixed, fox)
        assert not np.array_equal(swapped, mixed)

    def test_saved_file_holds_the_tokens(self, folder: Path) -> None:
        kept = PriorTokens.load(folder / "fox.npz")
        assert kept.prior_token_ids.shape == (1, 64)
        assert kept.resolved_seed.tolist() == [42]


class TestImageToImage:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory, triton: TritonServer) -> Path:
        folder = tmp_path_factory.mktemp("image_to_image")
        python, curl = IMAGE_TO_IMAGE
        assert "'image': 64," in run_example(python, triton, folder)
        run_example(curl, triton, folder)
        return folder

    def test_source_is_the_image_in_the_documentation(self, folder: Path) -> None:
        np.testing.assert_array_equal(pixels_of(folder / "edit_before.png"), pixels_of(DOCS / "edit_before.png"))

    def test_grpc_and_json_give_the_same_edit(self, folder: Path) -> None:
        edited = pixels_of(folder / "edit_after.png")
        np.testing.assert_array_equal(pixels_of(folder / "edit_json.png"), edited)
        assert not np.array_equal(edited, pixels_of(folder / "edit_before.png"))

    def test_two_sources_give_two_different_images(self, folder: Path) -> None:
        first, second = (pixels_of(folder / f"edit_two_{index}.png") for index in range(2))
        assert not np.array_equal(first, second)


def test_examples_are_executable_where_they_are_scripts() -> None:
    for path in EXAMPLES.glob("*.sh"):
        assert path.stat().st_mode & 0o100, path.relative_to(REPOSITORY_ROOT)
