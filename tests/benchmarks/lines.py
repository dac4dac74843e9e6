"""Runs benchmarks in this process, and checks what all of their lines have in common."""

from __future__ import annotations

import importlib
import json
import math
import re
from typing import Any

import pytest

Line = dict[str, Any]
POSITIVE = re.compile(r"(?:.*_)?(?:ms|us|seconds|tb_s|tflop_s|gb_s|gb|gigabytes|to_floor|pictures_per_second)")
DIFFERENCES = re.compile(r"(?:added|unexplained|rest|concatenation|attention|queue|ar_queue|dit_queue)_.*")
"""Figures that may be 0 or less: differences of measured times, and times in a queue."""


def run(capsys: pytest.CaptureFixture[str], name: str, *arguments: object, code: int = 0) -> list[Line]:
    """Runs a benchmark; returns its lines, whose figures are checked."""
    capsys.readouterr()
    assert importlib.import_module(name).main(list(map(str, arguments))) == code
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines() if text.startswith("{")]
    check_figures(lines)
    return lines


def check_figures(lines: list[Line]) -> None:
    for line in lines:
        for name, value in line.items():
            if isinstance(value, float):
                assert math.isfinite(value), line
            if POSITIVE.fullmatch(name) and not DIFFERENCES.fullmatch(name):
                assert value > 0, (name, line)


def all_of(lines: list[Line], measure: str, **fields: object) -> list[Line]:
    """Returns the lines of a measure with these fields, at least one."""
    found = [
        line
        for line in lines
        if line["measure"] == measure and all(line.get(name) == value for name, value in fields.items())
    ]
    assert found, f"no line {measure!r} with {fields} in {lines}"
    return found


def only(lines: list[Line], measure: str, **fields: object) -> Line:
    """Returns the line of a measure."""
    (line,) = all_of(lines, measure, **fields)
    return line


def check_ceiling(lines: list[Line]) -> Line:
    """Returns the ceilings of the run, which come before its figures."""
    device, ceiling = lines[:2]
    assert (device["measure"], ceiling["measure"]) == ("device", "ceiling")
    assert {"python", "torch", "transformers"} <= set(device["versions"])
    assert min(ceiling["copy_tb_s"], ceiling["matmul_tflop_s"]) > 0
    return ceiling
