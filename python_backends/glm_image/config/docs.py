"""Renders the tables of the documentation from the declarations.

A page holds a table between ``<!-- BEGIN GENERATED: NAME -->`` and ``<!-- END GENERATED -->``. Run as
``python -m glm_image.config.docs docs`` to update the pages of a folder, without the folder to print every table.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from glm_image.config import schema
from glm_image.config.parameters import ArParameters, DitParameters
from glm_image.request.declaration import Parameter, parameters
from glm_image.request.limits import LIMIT_PREFIX, Limits
from glm_image.request.parameters import GenerationParameters, PreviewParameters
from glm_image.request.tensors import TensorSpec, request_fields

PAGES: Final = ("api.md", "configuration.md")

DeclaredParameter = tuple[str, Parameter, str]

BLOCK: Final = re.compile(
    r"(?P<begin><!-- BEGIN GENERATED: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- END GENERATED -->)", re.DOTALL
)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _parameters(declared: Iterable[DeclaredParameter]) -> str:
    def row(name: str, parameter: Parameter, default: str) -> tuple[str, ...]:
        unit = f" ({parameter.unit})" if parameter.unit else ""
        return f"`{name}`", f"`{default}`" if default else "", parameter.help, parameter.allowed + unit

    return _table(("parameter", "default", "meaning", "allowed"), (row(*item) for item in declared))


def _stage_parameters(kind: type) -> list[DeclaredParameter]:
    return [item for item in parameters(kind) if not item[0].startswith(LIMIT_PREFIX)]


def _own_parameters(kind: type, other: type) -> str:
    common = _stage_parameters(other)
    return _parameters(item for item in _stage_parameters(kind) if item not in common)


def _common_parameters() -> str:
    dit = _stage_parameters(DitParameters)
    return _parameters(item for item in _stage_parameters(ArParameters) if item in dit)


def _inputs(kind: type) -> str:
    return _table(
        ("name", "type", "default", "meaning", "allowed"),
        (
            (f"`{item.spec.name}`", _type(item.spec), item.default, item.spec.help, item.allowed.allowed(Limits()))
            for item in request_fields(kind)
        ),
    )


def _tensors(specs: Iterable[TensorSpec]) -> str:
    return _table(("name", "type", "contents"), ((f"`{spec.name}`", _type(spec), spec.help) for spec in specs))


def _type(spec: TensorSpec) -> str:
    data_type = "BYTES" if spec.data_type == "STRING" else spec.data_type
    return data_type + " [k]" * (spec.name == "image")


TABLES: Final[Mapping[str, Callable[[], str]]] = {
    "stage-parameters": _common_parameters,
    "ar-parameters": lambda: _own_parameters(ArParameters, DitParameters),
    "dit-parameters": lambda: _own_parameters(DitParameters, ArParameters),
    "limits": lambda: _parameters(parameters(Limits, LIMIT_PREFIX)),
    "inputs": lambda: _inputs(GenerationParameters),
    "stream-inputs": lambda: _inputs(PreviewParameters),
    "outputs": lambda: _tensors(schema.OUTPUTS),
    "stage-tensors": lambda: _tensors(schema.STAGE_TENSORS),
}


def rendered(page: str) -> str:
    """Returns a page with every generated block up to date."""
    return BLOCK.sub(lambda block: f"{block['begin']}{TABLES[block['name']]()}{block['end']}", page)


def main() -> None:
    """Updates the pages of the folder given on the command line; without it, prints every table."""
    if not sys.argv[1:]:
        print("\n".join(f"<!-- BEGIN GENERATED: {name} -->\n{TABLES[name]()}<!-- END GENERATED -->" for name in TABLES))
        return
    (folder,) = sys.argv[1:]
    for name in PAGES:
        path = Path(folder, name)
        path.write_text(rendered(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
