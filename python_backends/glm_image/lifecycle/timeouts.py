"""The time that a request may take: what its caller states, and the bounds of the configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from glm_image.errors import InvalidInputError, shown
from glm_image.request.tensors import whole_number_of

PARAMETER: Final = "timeout"
"""KServe's request parameter, in microseconds."""

END_US: Final = 2**63
"""Above every allowed timeout. Triton takes a timeout as an unsigned number, so one below 0 is above this."""

DIGITS: Final = re.compile(r"[0-9]{1,19}")
"""Of a timeout as text."""

ALLOWED: Final = "a whole number of microseconds from 0 (no limit) to 2^63 - 1"


@dataclass(frozen=True)
class Timeouts:
    """The timeout of requests that set none, and the longest one, in microseconds; 0 = no limit."""

    default_us: int = 0
    max_us: int = 0

    def of(self, requested_us: int) -> int:
        timeout = requested_us if requested_us > 0 else self.default_us
        return min(timeout or self.max_us, self.max_us) if self.max_us else timeout


def requested_timeout_us(timeout_us: int, parameters: Mapping[str, Any]) -> int:
    """Returns the timeout that a request states, in microseconds; 0 = none.

    Args:
        timeout_us: as Triton reads it from a request of KServe's protocol, whose types it has checked.
        parameters: the request's parameters. ``generate`` puts a timeout there, of any JSON type.

    Raises:
        InvalidInputError: the timeout is not a whole number from 0 to 2^63 - 1.
    """
    given = timeout_us or parameters.get(PARAMETER, 0)
    timeout = whole_number_of(given, DIGITS)
    if timeout is None or not 0 <= timeout < END_US:
        # As JSON, so that true and "true" differ.
        raise InvalidInputError(f"{PARAMETER} is {shown(json.dumps(given))}; allowed: {ALLOWED}")
    return timeout
