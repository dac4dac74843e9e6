"""What a request carries besides its tensors: its id, its timeout and its parameters, all chosen by the client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from glm_image.errors import InvalidInputError
from glm_image.lifecycle.stream_options import StreamOptions
from glm_image.request.request_id import check_request_id, undecodable

ID: Final = "request id"
PARAMETERS: Final = "request parameters"
TIMEOUT: Final = "timeout"
READ: Final = (TIMEOUT, StreamOptions.PARAMETER)
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
    """

    id: str = ""
    timeout_us: int = 0
    options: StreamOptions = field(default_factory=StreamOptions)

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
            timeout_us=request.timeout() or _timeout(parameters.get(TIMEOUT)),
            options=StreamOptions() if options is None else StreamOptions.read(options),
        )


def _parameters(request: TritonRequest) -> Mapping[str, Any]:
    """Returns the parameters, {} if none of them has a meaning."""
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
    parameters = json.loads(text)
    return parameters if isinstance(parameters, dict) else {}


def _timeout(microseconds: Any) -> int:
    """Returns the timeout of ``generate`` and ``generate_stream``, which pass it as any other parameter."""
    if microseconds is None:
        return 0
    if type(microseconds) is not int or not 0 <= microseconds < 2**63:
        raise InvalidInputError.of(TIMEOUT, json.dumps(microseconds), "a whole number of microseconds, 0 = none")
    return microseconds
