"""The end of a model's process."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn


def end_process(code: int = 0) -> NoReturn:
    """Ends this process at once, its interpreter not taken apart: with torch in it that takes up to seconds.

    The last thing that a model does when it is unloaded. Triton waits for nothing but the process's end by then.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
