"""README.md and docs/: blocks are those of examples/, tables are what the code declares, links resolve."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest

from glm_image.config.parameters import ArParameters, DitParameters
from glm_image.config.schema import OUTPUTS, REQUEST_INPUTS, STAGE_TENSORS, STREAM_INPUTS
from glm_image.errors import DeadlineExceededError
from glm_image.lifecycle.context import NANOSECONDS, RequestContext
from glm_image.request.declaration import parameters
from glm_image.request.tensors import TensorSpec
from glm_image.supervisor import ServerSettings, TritonServer
from glm_image.supervisor.cli import parse_arguments
from server.documents import (
    DOCS,
    DOCUMENTS,
    EXAMPLES,
    REPOSITORY_ROOT,
    blocks_of,
    check_links,
    generated_table,
    is_excerpt,
    marked_block,
    table_after,
)
from server.kserve import KServeError, generate, grpc_infer, metadata

API, CLI, CONFIGURATION = (
    (DOCS / name).read_text(encoding="utf-8") for name in ("api.md", "cli.md", "configuration.md")
)
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in DOCUMENTS.items()}


@pytest.mark.parametrize("name", TEXTS)
def test_blocks_are_excerpts_of_the_examples_they_name(name: str) -> None:
    for block in blocks_of(TEXTS[name]):
        if block.example:
            text = (REPOSITORY_ROOT / block.example).read_text(encoding="utf-8")
            assert is_excerpt(block.text, text), block.text


@pytest.mark.parametrize("name", TEXTS)
def test_python_blocks_come_from_examples(name: str) -> None:
    """Examples are run by ``test_examples``; a block that is not one of them would rot."""
    assert [block.text for block in blocks_of(TEXTS[name]) if block.language == "python" and not block.example] == []


@pytest.mark.parametrize("name", TEXTS)
def test_scripts_named_in_shell_blocks_exist(name: str) -> None:
    for block in blocks_of(TEXTS[name]):
        for script in re.findall(r"(?:^|\s)(?:\./)?(scripts/[\w/.*-]+)", block.text):
            assert any(REPOSITORY_ROOT.glob(script)), script


def test_every_example_is_mentioned() -> None:
    for example in EXAMPLES.iterdir():
        assert any(f"examples/{example.name}" in text for text in TEXTS.values()), example.name


@pytest.mark.parametrize("name", TEXTS)
def test_links_resolve(name: str) -> None:
    check_links(DOCUMENTS[name])


@pytest.mark.parametrize(
    ("table", "specs"),
    [
        ("inputs", REQUEST_INPUTS),
        ("outputs", OUTPUTS),
        ("stream-inputs", STREAM_INPUTS[len(REQUEST_INPUTS) :]),
        ("stage-tensors", STAGE_TENSORS),
    ],
)
def test_tensor_tables_have_the_declared_names_and_types(table: str, specs: tuple[TensorSpec, ...]) -> None:
    rows = generated_table(API, table)
    assert list(rows) == [spec.name for spec in specs]
    for spec in specs:
        assert rows[spec.name][0].split()[0] == {"STRING": "BYTES"}.get(spec.data_type, spec.data_type)


@pytest.mark.parametrize(
    ("tables", "kind"),
    [
        (("stage-parameters", "ar-parameters", "limits"), ArParameters),
        (("stage-parameters", "dit-parameters", "limits"), DitParameters),
    ],
)
def test_parameter_tables_have_the_declared_defaults(tables: tuple[str, ...], kind: type) -> None:
    rows = {name: cells for table in tables for name, cells in generated_table(CONFIGURATION, table).items()}
    declared = {name: f"`{default}`" * bool(default) for name, _, default in parameters(kind)}
    assert {name: cells[0] for name, cells in rows.items()} == declared


def test_the_flags_of_serve_have_the_documented_defaults() -> None:
    rows = table_after(CLI, "flag")
    flags = vars(parse_arguments(["--checkpoint", "x"]))
    documented = set()
    for names, (default, _) in rows.items():
        flags_of_row = re.findall(r"--([\w-]+)", names)
        values = default.split(", ") if "," in default else [default] * len(flags_of_row)
        for flag, value in zip(flags_of_row, values, strict=True):
            name = flag.replace("-", "_")
            documented.add(name)
            is_none = flags[name] is None or (value, flags[name]) == ("none", ())
            assert value == "required" or is_none or str(flags[name]) == value, flag
    assert documented == set(flags)
    assert ServerSettings.host == rows["--host"][0]


def test_the_metadata_example_has_the_fields_of_a_response(triton: TritonServer) -> None:
    shown = json.loads(marked_block(API, "metadata"))
    prompt = "A red fox reading a newspaper that says “NEWS”"
    answered = metadata(grpc_infer(triton, {"prompt": prompt, "width": 32, "height": 32, "num_inference_steps": 1}))
    assert _fields(shown) == _fields(answered)
    assert shown["tokens"] == {**answered["tokens"], "preview": 256, "image": 64, "steps": shown["tokens"]["steps"]}


def _fields(value: Any) -> Any:
    return {name: _fields(field) for name, field in value.items()} if isinstance(value, dict) else type(value)


def test_quoted_error_is_the_servers(triton: TritonServer) -> None:
    with pytest.raises(KServeError, match="height is 0; allowed: 32 to 2048") as refused:
        generate(triton, {"prompt": "x", "height": 0})
    assert "`height is 0; allowed: 32 to 2048`" in API
    assert refused.value.status == "400"


def test_quoted_deadline_error_is_the_servers() -> None:
    context = RequestContext("fox-1", deadline_ns=time.monotonic_ns() + 5 * NANOSECONDS)
    with pytest.raises(DeadlineExceededError) as refused:
        context.check(needed_seconds=8.16)
    assert _without_seconds(f"`{refused.value}`") in _without_seconds(TEXTS["docs/requests.md"])


def _without_seconds(text: str) -> str:
    return re.sub(r"\d+(\.\d+)? s\b", "N s", " ".join(text.split()))


@pytest.mark.parametrize("name", ["configuration.md", "cached_denoising.md"])
def test_lines_to_edit_differ_from_the_configuration_in_their_value_only(name: str) -> None:
    config = (REPOSITORY_ROOT / "model_repository" / "glm_dit" / "config.pbtxt").read_text(encoding="utf-8")
    given = [_without_values(line) for line in config.splitlines()]
    for line in marked_block(TEXTS[f"docs/{name}"], "edits glm_dit").splitlines():
        assert given.count(_without_values(line)) == 1, line


def _without_values(line: str) -> str:
    return re.sub(r"count: \d+|string_value: \".*?\"", "VALUE", line)
