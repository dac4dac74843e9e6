"""``glm-image cancel`` and ``status``: requests by their id."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from glm_image_client.cli.application import command
from glm_image_client.cli.connection import connected
from glm_image_client.cli.exits import EXIT_REFUSED
from glm_image_client.cli.flags import Connection

RequestId = Annotated[str, typer.Argument(metavar="ID", help="Id of the requests.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print errors as JSON too; the answer always is.")]


@command()
def cancel(request_id: RequestId, connection: Connection, as_json: AsJson = False) -> None:
    """Cancels the requests of an id; exits with 2 if the server does not know it."""
    with connected(connection) as client:
        _print_answer(client.cancel(request_id))


@command()
def status(request_id: RequestId, connection: Connection, as_json: AsJson = False) -> None:
    """Prints the state of the requests of an id; exits with 2 if the server does not know it."""
    with connected(connection) as client:
        _print_answer(client.status(request_id))


def _print_answer(answer: dict[str, Any]) -> None:
    print(json.dumps(answer))
    if answer["state"] == "unknown":
        raise typer.Exit(EXIT_REFUSED)
