"""``glm-image inspect``: what a checkpoint folder contains and needs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from glm_image_client.cli.application import command
from glm_image_client.cli.offline import inspect_checkpoint
from glm_image_client.errors import BadArgumentError


@command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder, complete or not.")],
    card: Annotated[float | None, typer.Option(metavar="GB", help="Memory of a device, to check what fits it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, also for an error.")] = False,
) -> None:
    """Lists the contents of a checkpoint and the memory it needs; reads no weights."""
    if card is not None and not (math.isfinite(card) and card > 0):
        raise BadArgumentError(f"--card is {card}; allowed: a number of GB above 0")
    found = inspect_checkpoint(folder)
    print(json.dumps(found.to_json(card)) if as_json else found.to_text(card))
