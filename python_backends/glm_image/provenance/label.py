"""The implicit label of GB 45438-2025: who made an image that a model generated."""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

GENERATED: Final = "1"
"""The value of ``Label`` for content that is known to be generated."""
ID_DIGITS: Final = 32


def aigc_label(pixels: NDArray[np.uint8], producer: str, propagator: str) -> dict[str, str]:
    """Returns the label of an image, uint8 [height, width, 3]; its id is the hash of the pixels.

    The reserved codes are for the security measures of producer and propagator; there are none.
    """
    content = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()[:ID_DIGITS]
    return {
        "Label": GENERATED,
        "ContentProducer": producer,
        "ProduceID": content,
        "ReservedCode1": "",
        "ContentPropagator": propagator,
        "PropagateID": content if propagator else "",
        "ReservedCode2": "",
    }
