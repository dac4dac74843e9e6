"""``glm-image tokens``: the first stage alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from typing_extensions import Unpack

from glm_image_client.cli.application import command
from glm_image_client.cli.connection import connected
from glm_image_client.cli.flags import Call, Connection, SizeFlag, Sources, parse_size
from glm_image_client.cli.outputs import check_folder
from glm_image_client.cli.running import check_options, read_prompt, with_server_defaults
from glm_image_client.options import PROMPT, PriorOptions
from glm_image_client.sources import source_bytes


@command()
def tokens(
    *,
    prompt: Annotated[str | None, typer.Argument(help=f"{PROMPT.help} - reads standard input.")] = None,
    size: SizeFlag = None,
    sources: Sources = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="File for the tokens.")] = Path(
        "tokens.npz"
    ),
    call: Call,
    connection: Connection,
    **options: Unpack[PriorOptions],
) -> None:
    """Runs the first stage alone and saves its tokens for `glm-image paint`."""
    width, height = parse_size(size)
    text = read_prompt(prompt)
    check_folder(str(output))
    options |= {
        "width": width,
        "height": height,
        "images": [source_bytes(path) for path in sources or ()],
        "request_id": call.request_id,
    }
    check_options(options)
    with connected(connection, call.timeout) as client:
        prior = client.prior_tokens(text, **with_server_defaults(client, options, PriorOptions))
    file = str(prior.save(output))
    rows, columns = (int(side) for side in prior.prior_grid)
    seed = int(prior.resolved_seed[0])
    if call.as_json:
        print(json.dumps({"file": file, "seed": seed, "grid": [rows, columns], "metadata": dict(prior.ar_metadata)}))
    else:
        print(f"{file}\n{len(prior.prior_token_ids)} x {rows}x{columns} tokens, seed {seed}")
