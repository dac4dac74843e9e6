"""``glm-image paint``: the second stage alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from typing_extensions import Unpack

from glm_image_client.cli.application import command
from glm_image_client.cli.connection import connected
from glm_image_client.cli.flags import Call, Connection, Output, Sources
from glm_image_client.cli.outputs import OutputFiles, print_result
from glm_image_client.cli.running import check_options, read_prompt, with_file_metadata, with_server_defaults
from glm_image_client.options import PaintOptions
from glm_image_client.result import PriorTokens
from glm_image_client.sources import source_bytes


@command()
def paint(
    *,
    tokens: Annotated[Path, typer.Argument(metavar="FILE", help="File of `glm-image tokens`.")],
    prompt: Annotated[
        str | None, typer.Argument(help="Its quoted text is the lettering. - reads standard input.")
    ] = None,
    sources: Sources = None,
    output: Output,
    call: Call,
    connection: Connection,
    **options: Unpack[PaintOptions],
) -> None:
    """Runs the second stage alone on saved tokens; --image as for `glm-image tokens`."""
    prior = PriorTokens.load(tokens)
    text = read_prompt(prompt)
    files = OutputFiles(output, {"num_images": len(prior.prior_token_ids)})
    options |= {
        "images": [source_bytes(path) for path in sources or ()],
        "output_format": files.format,
        "request_id": call.request_id,
    }
    sent = with_file_metadata(options)
    check_options(sent)
    began = time.perf_counter()
    with connected(connection, call.timeout) as client:
        result = client.paint(text, prior, **with_server_defaults(client, sent, PaintOptions))
    waited = time.perf_counter() - began
    print_result(text, result, files.save(result), waited, as_json=call.as_json)
