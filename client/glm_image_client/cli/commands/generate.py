"""``glm-image generate``: images from a prompt, or from each prompt of a file."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from typing_extensions import Unpack

from glm_image_client.cli.application import command
from glm_image_client.cli.batch import PromptsFile, generate_batch
from glm_image_client.cli.connection import connected
from glm_image_client.cli.flags import Call, Connection, Output, SizeFlag, Sources, parse_size
from glm_image_client.cli.offline import generate_offline
from glm_image_client.cli.outputs import OutputFiles, print_result
from glm_image_client.cli.progress import progress_bar
from glm_image_client.cli.running import Progress, check_options, generate_images, read_prompt, with_server_defaults
from glm_image_client.errors import BadArgumentError
from glm_image_client.options import PROMPT, GenerateOptions
from glm_image_client.sources import source_bytes


@dataclass(frozen=True)
class Offline:
    """The engines in this process, in place of a server."""

    offline: Annotated[bool, typer.Option("--offline", help="Run the engines here, without a server.")] = False
    checkpoint: Annotated[Path | None, typer.Option(metavar="DIR", help="Checkpoint for --offline.")] = None
    device: Annotated[str | None, typer.Option(help="Device for --offline: auto, cpu, cuda:0, npu:0.")] = None

    def check(self) -> None:
        """Raises BadArgumentError for flags that do not go together."""
        if self.offline and self.checkpoint is None:
            raise BadArgumentError("--offline needs --checkpoint DIR")
        if not self.offline and (self.checkpoint, self.device) != (None, None):
            raise BadArgumentError("--checkpoint and --device need --offline; a server has its own")


@command()
def generate(
    *,
    prompt: Annotated[str | None, typer.Argument(help=f"{PROMPT.help} - reads standard input.")] = None,
    size: SizeFlag = None,
    sources: Sources = None,
    output: Output,
    batch: PromptsFile,
    call: Call,
    connection: Connection,
    progress: Progress,
    offline: Offline,
    **options: Unpack[GenerateOptions],
) -> None:
    """Generates images; omitted options have the defaults of the server and its checkpoint."""
    offline.check()
    batch.check(prompt, offline.offline)
    width, height = parse_size(size)
    images = [source_bytes(path) for path in sources or ()]
    options |= {"width": width, "height": height, "images": images, "request_id": call.request_id}
    check_options(options)
    if batch.prompts is not None:
        with connected(connection, call.timeout) as client:
            given = with_server_defaults(client, options)
            generate_batch(client, batch.prompts, output.output, given, resume=batch.resume, as_json=call.as_json)
        return
    text = read_prompt(prompt)
    files = OutputFiles(output, options)
    options["output_format"] = files.format
    began = time.perf_counter()
    if offline.checkpoint is not None:
        with progress_bar("generating", shown=not call.as_json and sys.stderr.isatty()):
            result = generate_offline(offline.checkpoint, offline.device, text, options)
    else:
        with connected(connection, call.timeout) as client:
            result = generate_images(client, text, with_server_defaults(client, options), progress, call.as_json)
    waited = time.perf_counter() - began
    print_result(text, result, files.save(result), waited, as_json=call.as_json)
