"""Reads the events that a parent waits for from Triton's log: services started, the start failed, a model unloaded."""

from __future__ import annotations

import json
import re

from glm_image import errors

SERVICES = frozenset({"GRPCInferenceService", "HTTPService", "Metrics Service"})
_STARTED = re.compile(r'"Started (GRPCInferenceService|HTTPService|Metrics Service) at ')
_NOT_STARTED = re.compile(r'"failed to start \w+ service: \w+ - (?P<reason>.*)"')
_MODEL_FAILURES = [
    re.compile(r""""failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)"$"""),
    re.compile(r""""Poll failed for model directory '(?P<model>[^']+)': (?P<reason>.*)"$"""),
    re.compile(r""""(?:Invalid argument: )?(?P<reason>ensemble (?P<model>\S+) contains models that are not .*)"$"""),
    # The server would wait for this stub forever.
    re.compile(r"Failed to preinitialize Python stub: (?P<reason>.*)$"),
]
# Logged by protobuf, one line before Triton logs that it cannot read the config.pbtxt.
_SYNTAX = re.compile(r"^\[libprotobuf ERROR .*\] Error parsing text-format \S+ (?P<place>\d+:\d+: .*)$")
_UNREADABLE = "failed to read text proto from "
_UNLOADED = re.compile(r""""successfully unloaded '(?P<model>[^']+)' version \d+"$""")
_STATUS = re.compile(r"^(?:Internal|Invalid argument|Unavailable|Unknown|Not found|Unsupported|Already exists): ")
_ERROR_NAMES = "|".join(name for name, value in vars(errors).items() if isinstance(value, type))
_ERROR_NAME = re.compile(rf"^(?:[\w.]+\.)?(?:{_ERROR_NAMES}): ")


def started_service(line: str) -> str | None:
    """Returns the one of ``SERVICES`` that this line reports as started, else None."""
    match = _STARTED.search(line)
    return match[1] if match else None


def unloaded_model(line: str) -> str | None:
    """Returns the model that this line reports as unloaded, which it is after its last response; else None."""
    match = _UNLOADED.search(line.rstrip())
    return match["model"] if match else None


def syntax_error(line: str) -> str | None:
    """Returns the line, column and description of a syntax error in a text-format file, else None."""
    match = _SYNTAX.match(line.rstrip())
    return match["place"] if match else None


def start_failure(line: str, syntax: str | None = None) -> str | None:
    """Returns why, by this line, the server cannot become ready, with the model's own message; else None.

    ``syntax``, the last ``syntax_error`` before it, belongs to the file that cannot be read.
    """
    if match := _NOT_STARTED.search(line):
        return match["reason"].strip()
    for pattern in _MODEL_FAILURES:
        if match := pattern.search(line.rstrip()):
            model = match.groupdict().get("model", "a model")
            message = _own_message(match["reason"])
            if syntax is not None and _UNREADABLE in message:
                message = f"{message}, line and column {syntax}"
            return f"{model} failed to load: {message}"
    return None


def _own_message(reason: str) -> str:
    """Unescapes a reason; removes Triton's status, Python's traceback and the names of this package's errors."""
    try:
        reason = str(json.loads(f'"{reason}"'))
    except ValueError:  # not escaped by this version of Triton
        reason = reason.strip('"')
    reason = _STATUS.sub("", reason.split("\n\nAt:\n")[0])
    return _ERROR_NAME.sub("", reason).strip()
