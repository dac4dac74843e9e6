"""The stages of a request, in the order in which it passes through them: the only list of their names."""

from __future__ import annotations

from enum import Enum
from typing import Final


class Stage(str, Enum):
    """A stage of a request; its value is the name in events, metadata, logs and traces."""

    AR_QUEUE = "ar_queue"
    """Waits for a slot of the AR."""
    PREFILL = "prefill"
    """The AR reads the prompt and the source images."""
    DECODE = "decode"
    """The AR samples image tokens."""
    DIT_QUEUE = "dit_queue"
    """Waits for an instance of the DiT, and there for its turns."""
    CONDITION = "condition"
    """The DiT prepares its conditioning, source images included."""
    DENOISE = "denoise"
    """The DiT takes the denoising steps."""
    VAE = "vae"
    """The VAE decodes the latents."""
    ENCODE = "encode"
    """The image is encoded as a file."""

    def __str__(self) -> str:
        return self.value


STAGE_ORDER: Final = tuple(Stage)

AR_STAGES: Final = (Stage.AR_QUEUE, Stage.PREFILL, Stage.DECODE)
"""The stages that ``glm_ar`` serves; the others belong to ``glm_dit``."""

QUEUES: Final = (Stage.AR_QUEUE, Stage.DIT_QUEUE)
