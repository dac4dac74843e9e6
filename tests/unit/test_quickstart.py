"""The arguments of ``quickstart``."""

from __future__ import annotations

from quickstart import options_of, parse_arguments


def test_what_is_not_given_has_the_default_of_the_checkpoint() -> None:
    assert set(options_of(parse_arguments(["x"])).values()) == {None}


def test_values_of_0_are_given() -> None:
    options = options_of(parse_arguments(["x", "--steps", "0", "--seed", "0", "--size", "0x0"]))
    assert options == {"width": 0, "height": 0, "num_inference_steps": 0, "seed": 0}
