"""README.md by the letter: its examples are run as they stand there, its tables are what the code declares."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from glm_image.config.parameters import PARAMETERS
from glm_image.config.schema import OUTPUTS, REQUEST_INPUTS, STAGE_TENSORS
from glm_image.pipeline import LocalPipeline
from glm_image.request.declaration import parameters
from glm_image.request.limits import LIMIT_PREFIX
from glm_image.request.parameters import GenerationParameters
from glm_image.request.tensors import TensorSpec
from glm_image.supervisor import ServerSettings, TritonServer
from glm_image.supervisor.cli import parse_arguments
from server.documents import BLOCK, REPOSITORY_ROOT, check_links, examples_of
from server.kserve import KServeError, generate, grpc_infer, metadata

README = (REPOSITORY_ROOT / "README.md").read_text(encoding="utf-8")
RUNNABLE = {"bash", "python"}

PICTURE = GenerationParameters(
    "A red fox reading a newspaper that says “NEWS”", height=256, width=256, num_inference_steps=20, seed=42
)


EXAMPLES = examples_of(README)


def marked_block(mark: str) -> str:
    (text,) = (block["text"] for block in BLOCK.finditer(README) if block["mark"] == mark)
    return text


def table(mark: str) -> dict[str, list[str]]:
    """The rows of the table after a comment: the code in the first cell, and the other cells."""
    lines = README.split(f"<!-- {mark} -->\n")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


@pytest.fixture(scope="module")
def pixels(pipeline: LocalPipeline) -> NDArray[np.uint8]:
    (picture,) = pipeline.generate(PICTURE).pixels
    return np.asarray(picture)


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A folder of its own for an example, with the checkpoint where the README has it."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "tiny").symlink_to(tiny_checkpoint)
    return tmp_path


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_makes_its_picture(triton: TritonServer, folder: Path, pixels: NDArray[np.uint8], name: str) -> None:
    example = EXAMPLES[name]
    if "curl" in example.text and shutil.which("curl") is None:
        pytest.skip("this machine has no curl")
    with Image.open(example.run(triton, folder)) as picture:
        assert picture.format == "PNG"
        assert picture.size == example.size
        # The examples differ in how they ask, not in what they ask for; but one edits its tokens.
        assert np.array_equal(np.asarray(picture), pixels) == (name != "edited.png")


def test_every_example_is_run() -> None:
    """What is not, is the scripts, which have tests of their own, and cannot be part of a test of the README."""
    assert len(EXAMPLES) >= 8
    unmarked = [
        block["text"] for block in BLOCK.finditer(README) if block["language"] in RUNNABLE and not block["mark"]
    ]
    commands = [line.split()[0] for text in unmarked for line in text.splitlines()]
    assert set(commands) == {"./scripts/quickstart", "./scripts/test", "./scripts/serve"}
    for command in commands:
        assert os.access(REPOSITORY_ROOT / command, os.X_OK)


def test_the_flags_of_serve_have_these_defaults() -> None:
    rows = table_rows_of("flag")
    flags = parse_arguments(["--checkpoint", "x"])
    for names, default in rows.items():
        for name, value in zip(re.findall(r"--([\w-]+)", names), default.split(", "), strict=True):
            actual = getattr(flags, name.replace("-", "_"))
            assert str(actual) == value or actual is None
    assert ServerSettings.host == rows["`--host`"]


def table_rows_of(first_cell: str) -> dict[str, str]:
    lines = README.split(f"| {first_cell} |")[1].split("\n\n")[0].splitlines()[2:]
    return {cells[0]: cells[1] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


@pytest.mark.parametrize(
    ("mark", "specs"), [("inputs", REQUEST_INPUTS), ("outputs", OUTPUTS), ("stage tensors", STAGE_TENSORS)]
)
def test_a_table_names_the_declared_tensors(mark: str, specs: tuple[TensorSpec, ...]) -> None:
    rows = table(mark)
    assert rows.keys() == {spec.name for spec in specs}
    for spec in specs:
        assert rows[spec.name][0].split()[0] == {"STRING": "BYTES"}.get(spec.data_type, spec.data_type)


def test_the_table_of_parameters_has_the_declared_defaults() -> None:
    declared = {
        name: f"`{default}`" * bool(default)
        for kind in PARAMETERS.values()
        for name, _, default in parameters(kind)
        if not name.startswith(LIMIT_PREFIX)
    }
    assert {name: cells[0] for name, cells in table("parameters").items()} == declared


def test_the_metadata_has_the_fields_of_an_answer(triton: TritonServer) -> None:
    shown = json.loads(marked_block("metadata"))
    answered = metadata(
        grpc_infer(triton, {"prompt": PICTURE.prompt, "width": 32, "height": 32, "num_inference_steps": 1})
    )
    assert _fields(shown) == _fields(answered)
    assert shown["tokens"] == {**answered["tokens"], "preview": 256, "image": 64}


def _fields(value: Any) -> Any:
    return {name: _fields(field) for name, field in value.items()} if isinstance(value, dict) else type(value)


def test_the_refusal_is_quoted_as_it_comes(triton: TritonServer) -> None:
    with pytest.raises(KServeError, match="height is 0; allowed: 32 to 2048") as refused:
        generate(triton, {"prompt": "x", "height": 0})
    assert "`height is 0; allowed: 32 to 2048`" in README
    assert refused.value.status == "400"


def test_the_lines_to_edit_stand_in_the_configuration() -> None:
    """Each shown line differs from one of the file in its value alone."""
    config = (REPOSITORY_ROOT / "model_repository" / "glm_dit" / "config.pbtxt").read_text().splitlines()
    for line in marked_block("edits glm_dit").splitlines():
        pattern = re.escape(line).replace("2", r"\d+").replace('"cuda:1;cuda:\\d+"', '".*"')
        assert sum(bool(re.fullmatch(pattern, given)) for given in config) == 1


def test_the_tree_is_there() -> None:
    above = ""
    for line in marked_block("tree").splitlines():
        name = line.split()[0]
        path = Path(above, name) if line.startswith(" ") else Path(name)
        above = above if line.startswith(" ") else name
        assert (REPOSITORY_ROOT / path).exists(), path
        assert (REPOSITORY_ROOT / path).is_dir() == name.endswith("/")


def test_links_and_pictures_are_there() -> None:
    check_links(REPOSITORY_ROOT / "README.md")
