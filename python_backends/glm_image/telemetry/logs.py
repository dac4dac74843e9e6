"""The log of a model's process: lines on standard error, which Triton's log shares."""

from __future__ import annotations

import logging

from glm_image.errors import printable


class LineFormatter(logging.Formatter):
    """Formats a record as a line, and its traceback as indented lines.

    Messages and exceptions quote clients and checkpoints; what they quote never looks like another record.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name in logging
        return printable(super().formatMessage(record))

    def formatException(self, ei: object) -> str:  # noqa: N802 - the name in logging
        text = super().formatException(ei)  # type: ignore[arg-type]
        return "\n".join(f"  {printable(line)}" for line in text.split("\n"))


def start_logging(name: str) -> None:
    """Sends the log of this process to standard error; ``name`` begins each line, after the time."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(f"%(asctime)s {name.replace('%', '%%')} %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
