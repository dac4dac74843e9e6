"""The options with which ``glm_image_stream`` calls the stages."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class StreamOptions:
    """What a stage publishes of a request over IPC, in addition to its progress.

    Attributes:
        arrived_ns: the ``time.monotonic_ns()`` at which the streamed request arrived; None = not a streamed request.
        previews: whether ``glm_ar`` publishes the tokens of the first image's preview as soon as they are sampled.
        latent_preview_every: denoising steps between two latent previews that ``glm_dit`` publishes; 0 = none.
    """

    arrived_ns: int | None = None
    previews: bool = False
    latent_preview_every: int = 0

    PARAMETER: ClassVar[str] = "stream_options"
    """The request parameter that holds the options as JSON: Triton's parameters are strings, numbers and booleans."""

    def parameters(self) -> dict[str, str]:
        return {self.PARAMETER: json.dumps(asdict(self))}

    @classmethod
    def read(cls, parameters: str) -> StreamOptions:
        """Parses a request's parameters, a JSON object; any client may send them, so invalid ones are ignored."""
        try:
            options = json.loads(json.loads(parameters).get(cls.PARAMETER, "{}"))
        except (ValueError, TypeError, AttributeError, RecursionError):
            return cls()
        if not isinstance(options, dict):
            return cls()
        return cls(
            arrived_ns=_count(options.get("arrived_ns")),
            previews=options.get("previews") is True,
            latent_preview_every=_count(options.get("latent_preview_every")) or 0,
        )


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**63 else None  # a bool is an int too
