"""The flags of the commands: groups that several commands share, and the options of the client's calls.

A command declares its own flags as typer does, a group as a parameter of the group's class, and the options of a call
as ``**options: Unpack[...]``. ``with_flags`` makes typer's flags of all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Final, get_args, get_type_hints

import typer

from glm_image_client.errors import BadArgumentError
from glm_image_client.options import OPTIONS, FileMetadata

DEFAULT_OUTPUT: Final = "output_{width}x{height}.png"

_SIZE: Final = re.compile(r"(\d{1,6})x(\d{1,6})", re.IGNORECASE | re.ASCII)


class ProtocolChoice(str, Enum):
    """``ProtocolName`` as typer reads it."""

    grpc = "grpc"
    http = "http"


class FileMetadataChoice(str, Enum):
    """``FileMetadata`` as typer reads it."""

    full = "full"
    no_prompt = "no_prompt"
    none = "none"


@dataclass(frozen=True)
class Connection:
    """Where the server is, and how long to wait for it."""

    url: Annotated[
        str | None,
        typer.Option(
            envvar="GLM_IMAGE_URL", metavar="HOST:PORT", help="Server; default 127.0.0.1:8001, over HTTP :8000."
        ),
    ] = None
    protocol: Annotated[ProtocolChoice, typer.Option(help="Protocol, if the URL has no scheme.")] = ProtocolChoice.grpc
    wait: Annotated[
        float | None,
        typer.Option(metavar="[SECONDS]", help="Wait until the server is ready, at most this long (default 600)."),
    ] = None


@dataclass(frozen=True)
class Call:
    """What a request needs besides its options."""

    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Timeout of the request.")] = None
    request_id: Annotated[str | None, typer.Option(metavar="ID", help="Id for `cancel` and `status`.")] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, also for an error.")] = False


@dataclass(frozen=True)
class Output:
    """Where the images go."""

    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Image file: .png, .jpg, .jpeg or .webp. {width}, {height}, {seed} and {index} are replaced by the "
            "image's; several images without {seed} or {index} get _0, _1, ... Default: output_{width}x{height}.png, "
            "with -2, -3, ... if the file exists.",
        ),
    ] = None
    no_clobber: Annotated[
        bool, typer.Option("--no-clobber", help="Do not overwrite a file that exists: refuse the request.")
    ] = False


Sources = Annotated[list[Path] | None, typer.Option("--image", metavar="FILE", help="Source image; may be repeated.")]
SizeFlag = Annotated[str | None, typer.Option(metavar="WxH", help="Width and height in pixels.")]


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command whose signature has a flag for each field of its groups and for each of its options."""
    declared = signature(command, eval_str=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[Parameter] = []
    for name, parameter in declared.parameters.items():
        if is_dataclass(parameter.annotation):
            groups[name] = parameter.annotation  # type: ignore[assignment]
            parameters += _group_parameters(parameter.annotation)
        elif parameter.kind is Parameter.VAR_KEYWORD:
            parameters += _option_parameters(get_args(parameter.annotation)[0])
        else:
            parameters.append(parameter)

    @wraps(command)
    def call(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        # A flag that may be repeated is an empty list where it is not given.
        command(**{name: None if value == [] else value for name, value in values.items()})

    ordered = [item.replace(kind=Parameter.KEYWORD_ONLY) for item in parameters]
    call.__signature__ = declared.replace(parameters=ordered)  # type: ignore[attr-defined] # typer reads it
    return call


def _group_parameters(group: Any) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
        for field in fields(group)
    ]


def _option_parameters(kind: Any) -> list[Parameter]:
    declared = ((name, OPTIONS[name]) for name in kind.__annotations__ if name in OPTIONS)
    return [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_flag_type(option.kind), typer.Option(*option.input.flags, help=option.input.help)],
        )
        for name, option in declared
        if option.input.flags
    ]


def _flag_type(kind: Any) -> Any:
    if kind == FileMetadata | None:
        return FileMetadataChoice | None
    return list[str] | None if kind == Sequence[str] | None else kind


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Returns the width and the height of ``--size``; None where it is not given."""
    if size is None:
        return None, None
    found = _SIZE.fullmatch(size)
    if found is None:
        raise BadArgumentError(f"--size is {size!r}; allowed: WIDTHxHEIGHT in pixels, as in 1024x768")
    return int(found[1]), int(found[2])
