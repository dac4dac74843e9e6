"""docs/ by the letter: the examples of each document are run in their order, in one folder."""

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
from server.documents import REPOSITORY_ROOT, check_links, examples_of

DOCUMENTS = {path.stem: path for path in sorted((REPOSITORY_ROOT / "docs").glob("*.md"))}
FOX = GenerationParameters(
    "A red fox reading a newspaper that says “NEWS”", height=256, width=256, num_inference_steps=20, seed=42
)


def run_all(name: str, triton: TritonServer, folder: Path) -> dict[str, NDArray[np.uint8]]:
    """Runs every example of a document and returns its pictures."""
    pictures = {}
    for example in examples_of(DOCUMENTS[name].read_text(encoding="utf-8")).values():
        with Image.open(example.run(triton, folder)) as picture:
            assert (picture.format, picture.size) == ("PNG", example.size)
            pictures[example.file] = np.asarray(picture)
    return pictures


class TestPriorTokens:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("prior_tokens")

    @pytest.fixture(scope="class")
    def pictures(self, triton: TritonServer, folder: Path) -> dict[str, NDArray[np.uint8]]:
        return run_all("prior_tokens", triton, folder)

    def test_kept_tokens_give_the_picture_of_one_request(
        self, pictures: dict[str, NDArray[np.uint8]], pipeline: LocalPipeline
    ) -> None:
        (whole,) = pipeline.generate(FOX).pixels
        for file in ("kept.png", "plain.png"):
            np.testing.assert_array_equal(pictures[file], whole)
        np.testing.assert_array_equal(pictures["variants.png"][:256, :256], whole)

    def test_every_setting_paints_another_picture_from_the_same_tokens(
        self, pictures: dict[str, NDArray[np.uint8]]
    ) -> None:
        tiles = pictures["variants.png"].reshape(2, 256, 3, 256, 3).swapaxes(1, 2).reshape(6, -1)
        assert len({tile.tobytes() for tile in tiles}) == 6

    def test_edited_tokens_paint_other_pictures(self, pictures: dict[str, NDArray[np.uint8]], folder: Path) -> None:
        with Image.open(folder / "edited_0.png") as picture:
            swapped = np.asarray(picture)
        assert not np.array_equal(swapped, pictures["kept.png"])
        assert not np.array_equal(swapped, pictures["edited_1.png"])

    def test_the_kept_file_holds_the_tokens(self, pictures: dict[str, NDArray[np.uint8]], folder: Path) -> None:
        kept = PriorTokens.load(folder / "fox.npz")
        assert kept.prior_token_ids.shape == (1, 64)
        assert kept.resolved_seed.tolist() == [42]


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "prior_tokens"])
def test_the_examples_of_other_documents_run(triton: TritonServer, tmp_path: Path, name: str) -> None:
    run_all(name, triton, tmp_path)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    check_links(DOCUMENTS[name])
