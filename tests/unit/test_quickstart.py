"""The arguments of ``quickstart``."""

from __future__ import annotations

import pytest

from quickstart import options_of, parse_arguments


def test_the_tiny_checkpoint_has_its_own_defaults() -> None:
    options = options_of(parse_arguments(["x"]))
    assert options == {"width": 256, "height": 256, "num_inference_steps": 20, "seed": None}


def test_a_named_checkpoint_has_the_defaults_of_the_server() -> None:
    assert set(options_of(parse_arguments(["x", "--checkpoint", "folder"])).values()) == {None}


@pytest.mark.parametrize("checkpoint", [[], ["--checkpoint", "folder"]])
def test_values_of_0_are_sent_so_that_the_server_refuses_them(checkpoint: list[str]) -> None:
    options = options_of(parse_arguments(["x", *checkpoint, "--steps", "0", "--seed", "0", "--size", "0x0"]))
    assert options == {"width": 0, "height": 0, "num_inference_steps": 0, "seed": 0}
