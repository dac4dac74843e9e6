"""How a request is watched that is made on behalf of another: what ``glm_image_stream`` tells the two stages."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class StreamOptions:
    """What a stage is to tell of a request over the bus, beside its progress.

    Attributes:
        arrived_ns: ``time.monotonic_ns()`` when the request that is followed came; None = when this one does.
        previews: whether the tokens of the first picture's preview are handed out as soon as they are drawn.
        pictures_every: steps between two pictures of what is being denoised; 0 = none.
    """

    arrived_ns: int | None = None
    previews: bool = False
    pictures_every: int = 0

    PARAMETER: ClassVar[str] = "follow"
    """The request parameter that holds it; Triton takes texts, numbers and booleans."""

    def parameters(self) -> dict[str, str]:
        """Returns it as request parameters."""
        return {self.PARAMETER: json.dumps(asdict(self))}

    @classmethod
    def is_asked(cls, parameters: str) -> bool:
        """Tells whether a request is made on behalf of another, by its parameters as JSON."""
        return f'"{cls.PARAMETER}"' in parameters

    @classmethod
    def read(cls, parameters: str) -> StreamOptions:
        """Reads a request's parameters, a JSON object; anybody may send them, so what does not fit is left out."""
        try:
            given = json.loads(json.loads(parameters).get(cls.PARAMETER, "{}"))
        except (ValueError, TypeError, AttributeError, RecursionError):
            return cls()
        if not isinstance(given, dict):
            return cls()
        return cls(
            arrived_ns=_count(given.get("arrived_ns")),
            previews=given.get("previews") is True,
            pictures_every=_count(given.get("pictures_every")) or 0,
        )


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None  # a bool is an int too
