"""``glm-image edit``: image to image."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from typing_extensions import Unpack

from glm_image_client.cli.application import command
from glm_image_client.cli.connection import connected
from glm_image_client.cli.flags import Call, Connection, Output, SizeFlag, Sources, parse_size
from glm_image_client.cli.outputs import OutputFiles, print_result
from glm_image_client.cli.running import (
    Progress,
    check_options,
    generate_images,
    read_prompt,
    with_file_metadata,
    with_server_defaults,
)
from glm_image_client.options import GenerateOptions
from glm_image_client.sources import source_bytes


@command()
def edit(
    *,
    source: Annotated[Path, typer.Argument(metavar="IMAGE", help="Source image; more of them with --image.")],
    prompt: Annotated[str | None, typer.Argument(help="What to change. - reads standard input.")] = None,
    size: SizeFlag = None,
    sources: Sources = None,
    output: Output,
    call: Call,
    connection: Connection,
    progress: Progress,
    **options: Unpack[GenerateOptions],
) -> None:
    """Edits an image, or combines several; the size that is not given follows the first one."""
    width, height = parse_size(size)
    text = read_prompt(prompt)
    files = OutputFiles(output, options)
    options |= {
        "width": width,
        "height": height,
        "images": [source_bytes(path) for path in (source, *(sources or ()))],
        "output_format": files.format,
        "request_id": call.request_id,
    }
    sent = with_file_metadata(options)
    check_options(sent)
    began = time.perf_counter()
    with connected(connection, call.timeout) as client:
        result = generate_images(client, text, with_server_defaults(client, sent), progress, call.as_json)
    waited = time.perf_counter() - began
    print_result(text, result, files.save(result), waited, as_json=call.as_json)
