"""``glm-image generate``: images from a prompt, or from each prompt of a file."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typing_extensions import Unpack

from glm_image_client.cli.application import command
from glm_image_client.cli.batch import PromptsFile, generate_batch
from glm_image_client.cli.connection import connected
from glm_image_client.cli.flags import Call, Connection, Output, SizeFlag, Sources, parse_size
from glm_image_client.cli.offline import generate_offline
from glm_image_client.cli.outputs import OutputFiles, print_result
from glm_image_client.cli.progress import progress_bar
from glm_image_client.cli.reproduction import (
    check_sources,
    differences,
    file_record,
    file_texts,
    repeated_options,
    repeated_prompt,
)
from glm_image_client.cli.running import (
    Progress,
    check_options,
    generate_images,
    read_prompt,
    with_file_metadata,
    with_server_defaults,
)
from glm_image_client.errors import BadArgumentError, printable
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


@dataclass(frozen=True)
class Like:
    """A file whose request is repeated."""

    like: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Repeat the request that made an image file; flags replace its values."),
    ] = None

    def check(self, prompts: Path | None) -> None:
        """Raises BadArgumentError for flags that do not go together."""
        if self.like is not None and prompts is not None:
            raise BadArgumentError("--like and --prompts are both given; allowed: one of them")

    def repeated(self, prompt: str | None, options: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Returns the prompt and the options, completed from the file if one is named."""
        if self.like is None:
            return prompt, options
        record = file_record(self.like)
        check_sources(self.like, record, options["images"])
        return repeated_prompt(self.like, record, prompt), repeated_options(record, options)

    def report(self, file: Path) -> None:
        """Prints in what the server of ``file`` differs from that of the repeated one."""
        if self.like is None:
            return
        made = file_texts(file).record
        found = (
            differences(file_record(self.like), json.loads(made)) if made else ["unknown: the server wrote no record"]
        )
        for difference in found:
            print(printable(f"glm-image: note: the server differs: {difference}"), file=sys.stderr)


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
    like: Like,
    **options: Unpack[GenerateOptions],
) -> None:
    """Generates images; omitted options have the defaults of the server and its checkpoint."""
    offline.check()
    batch.check(prompt, offline.offline)
    like.check(batch.prompts)
    width, height = parse_size(size)
    images = [source_bytes(path) for path in sources or ()]
    options |= {"width": width, "height": height, "images": images, "request_id": call.request_id}
    prompt, sent = like.repeated(prompt, with_file_metadata(options))
    check_options(sent)
    if batch.prompts is not None:
        with connected(connection, call.timeout) as client:
            given = with_server_defaults(client, sent)
            generate_batch(client, batch.prompts, output.output, given, resume=batch.resume, as_json=call.as_json)
        return
    text = read_prompt(prompt)
    files = OutputFiles(output, sent)
    sent["output_format"] = files.format
    began = time.perf_counter()
    if offline.checkpoint is not None:
        with progress_bar("generating", shown=not call.as_json and sys.stderr.isatty()):
            result = generate_offline(offline.checkpoint, offline.device, text, sent)
    else:
        with connected(connection, call.timeout) as client:
            result = generate_images(client, text, with_server_defaults(client, sent), progress, call.as_json)
    waited = time.perf_counter() - began
    saved = files.save(result)
    print_result(text, result, saved, waited, as_json=call.as_json)
    like.report(saved[0])
