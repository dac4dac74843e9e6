"""Graph modes and capture sizes: what is taken, what it maps to, and what is refused in words."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from glm_image.ar.engine import ArEngine
from glm_image.ar.graphs import GRAPH_MODES, captured
from glm_image.ar.settings import ArSettings
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.open import open_device
from glm_image.errors import ConfigurationError
from glm_image.lifecycle.context import RequestContext
from glm_image.request.declaration import read
from glm_image.request.limits import Limits
from glm_image.request.parameters import GenerationParameters

WAIT_SECONDS = 60


def settings_of(**parameters: str) -> ArSettings:
    return read(ArSettings, parameters)


@pytest.mark.parametrize(("mode", "expected"), [("NONE", False), ("FULL_DECODE_ONLY", True), ("FULL", True)])
@pytest.mark.parametrize("sizes", [(), (8,)])
def test_modes(mode: str, expected: bool, sizes: tuple[int, ...]) -> None:
    assert captured(mode, sizes, 8) == expected


def test_full_is_said_to_be_decode_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for mode in GRAPH_MODES:
        captured(mode, (), 8)
    assert caplog.messages == [
        "graph_mode FULL runs as FULL_DECODE_ONLY: prompts differ in length, so they are read eagerly"
    ]


@pytest.mark.parametrize("sizes", [(1,), (1, 8), (8, 8), (16,)])
def test_other_sizes_are_refused_with_the_reason(sizes: tuple[int, ...]) -> None:
    told = rf"^graph_capture_sizes is '{','.join(map(str, sizes))}'; allowed: 8, which is max_num_seqs, .*tokens would"
    with pytest.raises(ConfigurationError, match=told):
        captured("NONE", sizes, 8)


def test_piecewise_is_refused_with_the_reason() -> None:
    told = "^graph_mode is 'PIECEWISE'; allowed: NONE, FULL_DECODE_ONLY, FULL; the decode step .* captured whole$"
    with pytest.raises(ConfigurationError, match=told):
        settings_of(graph_mode="PIECEWISE")
    with pytest.raises(ConfigurationError, match=r"^graph_mode is 'PIECEWISE'; allowed: NONE, FULL_DECODE_ONLY, FULL$"):
        captured("PIECEWISE", (), 8)


@pytest.mark.parametrize(
    ("text", "expected"), [("", ()), (" ", ()), ("[]", ()), ("8", (8,)), ("[8]", (8,)), ("[1, 2 ,8]", (1, 2, 8))]
)
def test_lists_of_sizes(text: str, expected: tuple[int, ...]) -> None:
    assert settings_of(graph_capture_sizes=text).graph_capture_sizes == expected


@pytest.mark.parametrize("text", ["eight", "8,", "[8", "-8", "8 8", "[[8]]", "8.0", "1" * 10])
def test_what_is_no_list_of_sizes(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^graph_capture_sizes is '.*'; allowed: empty, or whole numbers"):
        settings_of(graph_capture_sizes=text)


def test_every_mode_draws_the_same_tokens(checkpoint_folder: Path) -> None:
    drawn = []
    for mode in GRAPH_MODES:
        settings = ArSettings(graph_mode=mode, graph_capture_sizes=(2,), max_num_seqs=2, max_sequence_tokens=512)
        engine = ArEngine(Checkpoint.open(checkpoint_folder), open_device("cpu"), settings)
        asked = GenerationParameters(prompt="x", height=32, width=64, seed=1).resolve(Limits(), engine.sampling)
        drawn.append(engine.submit(RequestContext(), asked).result(WAIT_SECONDS).prior_token_ids.tolist())
        engine.close()
    assert drawn[0] == drawn[1] == drawn[2]


def test_an_engine_refuses_before_it_loads(checkpoint_folder: Path) -> None:
    settings = ArSettings(graph_capture_sizes=(1, 8))
    with pytest.raises(ConfigurationError, match="graph_capture_sizes is '1,8'"):
        ArEngine(Checkpoint.open(checkpoint_folder), open_device("cpu"), settings)
