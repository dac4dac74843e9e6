"""Graph modes and capture sizes: which are allowed, what they do, and the error of each other value."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from glm_image.ar.engine import ArEngine
from glm_image.ar.settings import GRAPH_MODES, ArSettings, captured
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
def test_modes_capture_the_decode_step(mode: str, expected: bool, sizes: tuple[int, ...]) -> None:
    assert captured(mode, sizes, 8) == expected


def test_full_is_logged_as_decode_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for mode in GRAPH_MODES:
        captured(mode, (), 8)
    assert caplog.messages == [
        "graph_mode FULL runs as FULL_DECODE_ONLY: prompts differ in length, so they are read eagerly"
    ]


@pytest.mark.parametrize("sizes", [(1,), (1, 8), (8, 8), (16,)])
def test_other_sizes_are_refused_with_the_reason(sizes: tuple[int, ...]) -> None:
    message = (
        rf"^graph_capture_sizes is '{','.join(map(str, sizes))}'; allowed: 8, which is max_num_seqs, .*tokens would"
    )
    with pytest.raises(ConfigurationError, match=message):
        captured("NONE", sizes, 8)


def test_piecewise_is_refused_with_the_reason() -> None:
    message = "^graph_mode is 'PIECEWISE'; allowed: NONE, FULL_DECODE_ONLY, FULL; the decode step .* captured whole$"
    with pytest.raises(ConfigurationError, match=message):
        settings_of(graph_mode="PIECEWISE")
    with pytest.raises(ConfigurationError, match=r"^graph_mode is 'PIECEWISE'; allowed: NONE, FULL_DECODE_ONLY, FULL$"):
        captured("PIECEWISE", (), 8)


@pytest.mark.parametrize(
    ("text", "expected"), [("", ()), (" ", ()), ("[]", ()), ("8", (8,)), ("[8]", (8,)), ("[1, 2 ,8]", (1, 2, 8))]
)
def test_lists_of_sizes(text: str, expected: tuple[int, ...]) -> None:
    assert settings_of(graph_capture_sizes=text).graph_capture_sizes == expected


@pytest.mark.parametrize("text", ["eight", "8,", "[8", "-8", "8 8", "[[8]]", "8.0", "1" * 10])
def test_malformed_list_of_sizes_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^graph_capture_sizes is '.*'; allowed: empty, or whole numbers"):
        settings_of(graph_capture_sizes=text)


def test_every_mode_samples_the_same_tokens(checkpoint_folder: Path) -> None:
    tokens = []
    for mode in GRAPH_MODES:
        settings = ArSettings(graph_mode=mode, graph_capture_sizes=(2,), max_num_seqs=2, max_sequence_tokens=512)
        engine = ArEngine(Checkpoint.open(checkpoint_folder), open_device("cpu"), settings)
        request = GenerationParameters(prompt="x", height=32, width=64, seed=1).resolve(Limits(), engine.sampling)
        tokens.append(engine.submit(RequestContext(), request).result(WAIT_SECONDS).prior_token_ids.tolist())
        engine.close()
    assert tokens[0] == tokens[1] == tokens[2]


def test_engine_refuses_sizes_before_loading(checkpoint_folder: Path) -> None:
    for speculation, sizes in (("none", (1, 8)), ("jacobi", (8, 129))):
        settings = ArSettings(graph_capture_sizes=sizes, speculation=speculation)
        with pytest.raises(ConfigurationError, match=f"graph_capture_sizes is '{sizes[0]},{sizes[1]}'"):
            ArEngine(Checkpoint.open(checkpoint_folder), open_device("cpu"), settings)
