"""A value that was given is never taken for one that was not: ``flags.steps or 20`` takes 0 for 20."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for folder in ("scripts", "client", "python_backends") for path in (ROOT / folder).rglob("*.py"))
GIVEN = {"arguments", "flags", "args", "options", "settings"}
"""Names of objects whose attributes a user sets."""


def falsy_defaults(code: str) -> Iterator[int]:
    """Yields the lines where a default stands for a falsy value of a flag, or a constant for any falsy value."""
    tree = ast.parse(code)
    conditions = {id(part) for node in ast.walk(tree) for part in _conditions(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or) and id(node) not in conditions:
            is_flag = any(_is_given(value) for value in node.values[:-1])
            if is_flag or _is_constant_name(node.values[-1]):
                yield node.lineno
        if isinstance(node, ast.IfExp) and _is_given(node.test) and ast.dump(node.test) == ast.dump(node.body):
            yield node.lineno


def _conditions(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the parts of a node of which only the truth counts."""
    if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
        yield from _operands(node.test)
    if isinstance(node, ast.comprehension):
        for test in node.ifs:
            yield from _operands(test)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield from _operands(node.operand)


def _operands(test: ast.AST) -> Iterator[ast.AST]:
    yield test
    if isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from _operands(value)


def _is_given(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in GIVEN


def _is_constant_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id.isupper() and len(node.id) > 1


@pytest.mark.parametrize(
    "code",
    [
        "steps = arguments.steps or 20",
        "run(steps=flags.steps or default())",
        "size = size or TINY_SIZE",
        "x = flags.steps if flags.steps else 20",
    ],
)
def test_the_check_finds_what_it_looks_for(code: str) -> None:
    assert list(falsy_defaults(code)) == [1]


@pytest.mark.parametrize(
    "code", ["if flags.json or flags.brief: pass", "x = 20 if flags.steps is None else flags.steps"]
)
def test_the_check_passes_conditions(code: str) -> None:
    assert list(falsy_defaults(code)) == []


def test_no_falsy_value_is_taken_for_a_missing_one() -> None:
    found = [f"{path.relative_to(ROOT)}:{line}" for path in FILES for line in falsy_defaults(path.read_text("utf-8"))]
    assert found == []
