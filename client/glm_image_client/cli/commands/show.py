"""``glm-image show``: what an image file says about its origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from glm_image_client.cli.application import command
from glm_image_client.cli.reproduction import file_texts
from glm_image_client.errors import printable


@command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Image file: PNG, JPEG or WebP.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, also for an error.")] = False,
) -> None:
    """Prints how an image was made and its AIGC label, as its file states them; checks no signature."""
    texts = file_texts(file)
    found = {"record": _parsed(texts.record), "aigc": _parsed(texts.label)}
    if as_json:
        print(json.dumps({**found, "parameters": texts.parameters or None}, ensure_ascii=False))
        return
    for name, value in found.items():
        print(f"{name}:")
        lines = _lines(value) if isinstance(value, dict) else [str(value) if value else "none"]
        print("\n".join(f"  {printable(line)}" for line in lines))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return text


def _lines(value: dict[str, Any]) -> list[str]:
    width = max(map(len, value), default=0)
    return [
        f"{name:{width}}  {item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)}"
        for name, item in value.items()
    ]
