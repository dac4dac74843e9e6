"""What a request carries besides its tensors: its id, its timeout and its parameters, all chosen by the client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from glm_image.errors import InvalidInputError
from glm_image.lifecycle import timeouts
from glm_image.lifecycle.stream_options import StreamOptions
from glm_image.request.parameters import INPUT_PARAMETERS
from glm_image.request.request_id import check_request_id, undecodable

ID: Final = "request id"
PARAMETERS: Final = "request parameters"
READ: Final = (timeouts.PARAMETER, StreamOptions.PARAMETER, *INPUT_PARAMETERS)
"""The parameters that have a meaning; others are ignored, and never parsed."""

MAX_PARAMETERS_CHARACTERS: Final = 64 * 1024
"""Of parameters that are parsed, which keeps the interpreter's lock."""


class TritonRequest(Protocol):
    """The methods of Triton's request that give its header."""

    def request_id(self) -> str: ...

    def timeout(self) -> int: ...

    def parameters(self) -> str:
        """Returns a JSON object."""


@dataclass(frozen=True)
class CallHeader:
    """The header of a request, validated.

    Attributes:
        id: the id that it was sent with; "" = none.
        timeout_us: microseconds for the whole request; 0 = none.
        options: what ``glm_image_stream`` asks for, if the request comes from there.
        parameters: the request's parameters; {} if none of them has a meaning.
    """

    id: str = ""
    timeout_us: int = 0
    options: StreamOptions = field(default_factory=StreamOptions)
    parameters: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def read(cls, request: TritonRequest) -> CallHeader:
        """Reads the header of a request.

        Raises:
            InvalidInputError: the id is too long; id or parameters are not UTF-8; a parameter that has a meaning has a
                value that is not allowed.
        """
        try:
            request_id = request.request_id()
        except UnicodeDecodeError as error:
            raise undecodable(ID, error) from None
        check_request_id(ID, request_id)
        parameters = _parameters(request)
        options = parameters.get(StreamOptions.PARAMETER)
        return cls(
            id=request_id,
            timeout_us=timeouts.requested_timeout_us(request.timeout(), parameters),
            options=StreamOptions() if options is None else StreamOptions.read(options),
            parameters=parameters,
        )


def _parameters(request: TritonRequest) -> dict[str, Any]:
    """Returns the parameters; an empty dictionary if none of them has a meaning."""
    try:
        text = request.parameters()
    except UnicodeDecodeError as error:
        raise undecodable(PARAMETERS, error) from None
    if not any(f'"{name}"' in text for name in READ):
        return {}
    if len(text) > MAX_PARAMETERS_CHARACTERS:
        raise InvalidInputError.of(
            PARAMETERS, f"{len(text)} characters long", f"at most {MAX_PARAMETERS_CHARACTERS} with {' or '.join(READ)}"
        )
    parameters: dict[str, Any] = json.loads(text)
    return parameters
