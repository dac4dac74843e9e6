"""What Triton says on its standard error, turned into the two things a parent waits for: started, and failed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from glm_image import errors
from glm_image.config.models import DRAINED

# In the order in which they start. HTTP is said to be up before its port is bound; the next one's start proves it.
SERVICES = frozenset({"GRPCInferenceService", "HTTPService", "Metrics Service"})
_STARTED = re.compile(r'"Started (GRPCInferenceService|HTTPService|Metrics Service) at ')
_PORT_LOST = re.compile(r'"failed to start \w+ service: \w+ - (?P<reason>.*)"')
_MODEL_FAILURES = [
    re.compile(r""""failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)"$"""),
    re.compile(r""""Poll failed for model directory '(?P<model>[^']+)': (?P<reason>.*)"$"""),
    re.compile(r""""(?:Invalid argument: )?(?P<reason>ensemble (?P<model>\S+) contains models that are not .*)"$"""),
    # The server would wait for this stub without end.
    re.compile(r"Failed to preinitialize Python stub: (?P<reason>.*)$"),
]
# What protobuf says of a config.pbtxt, a line before Triton says that it cannot read the file.
_SYNTAX = re.compile(r"^\[libprotobuf ERROR .*\] Error parsing text-format \S+ (?P<place>\d+:\d+: .*)$")
_UNREADABLE = "failed to read text proto from "
_UNLOADED = re.compile(r""""successfully unloaded '(?P<model>[^']+)' version \d+"$""")
_DRAINED = re.compile(rf"^\S+ \S+ (?P<model>\w+)_\d+_\d+ {DRAINED}$")
_STATUS = re.compile(r"^(?:Internal|Invalid argument|Unavailable|Unknown|Not found|Unsupported|Already exists): ")
_OWN_ERRORS = "|".join(name for name, value in vars(errors).items() if isinstance(value, type))
_OWN_ERROR = re.compile(rf"^(?:[\w.]+\.)?(?:{_OWN_ERRORS}): ")


@dataclass(frozen=True)
class StartFailure:
    """Why a server cannot become ready; ``port_lost`` when another process took a port meanwhile."""

    message: str
    port_lost: bool = False


def started_service(line: str) -> str | None:
    """The one of ``SERVICES`` that this line of the log says is up, else None."""
    match = _STARTED.search(line)
    return match[1] if match else None


def unloaded_model(line: str) -> str | None:
    """The model that this line of the log says is unloaded, its last request answered, else None."""
    match = _UNLOADED.search(line.rstrip())
    return match["model"] if match else None


def drained_model(line: str) -> str | None:
    """The model that says in this line of the log that it has no requests and takes no more, else None."""
    match = _DRAINED.search(line.rstrip())
    return match["model"] if match else None


def syntax_error(line: str) -> str | None:
    """Line, column and fault of a text-format file, where this line of the log tells of one, else None."""
    match = _SYNTAX.match(line.rstrip())
    return match["place"] if match else None


def start_failure(line: str, syntax: str | None = None) -> StartFailure | None:
    """The failure that this line of the log tells of, in the model's own words, else None.

    Args:
        line: a line of the log.
        syntax: the last ``syntax_error`` before it, which belongs to a file that cannot be read.
    """
    if match := _PORT_LOST.search(line):
        return StartFailure(match["reason"].strip(), port_lost="already in use" in match["reason"])
    for pattern in _MODEL_FAILURES:
        if match := pattern.search(line.rstrip()):
            model = match.groupdict().get("model", "a model")
            words = _own_words(match["reason"])
            if syntax is not None and _UNREADABLE in words:
                words = f"{words}, line and column {syntax}"
            return StartFailure(f"{model} failed to load: {words}")
    return None


def _own_words(reason: str) -> str:
    """Unescapes a reason and drops Triton's status, Python's traceback and the names of this package's own errors."""
    try:
        reason = str(json.loads(f'"{reason}"'))
    except ValueError:  # not escaped by this version of Triton
        reason = reason.strip('"')
    reason = _STATUS.sub("", reason.split("\n\nAt:\n")[0])
    return _OWN_ERROR.sub("", reason).strip()
