"""The limits that the host sets for a server's processes (``ulimit``)."""

from __future__ import annotations

import resource

from glm_image.errors import ConfigurationError

MIN_DESCRIPTORS = 1024
"""Files and connections. A server without clients has some hundred open; each connection takes one more."""


def check_descriptors() -> None:
    """Raises ConfigurationError if the server may not open enough files; it raises the soft limit itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < MIN_DESCRIPTORS:
        raise ConfigurationError(
            f"the limit of open files is {hard} (ulimit -Hn); allowed: {MIN_DESCRIPTORS} or more, "
            "as every connection takes one"
        )


def limit_warning() -> str | None:
    """Returns a warning of a limit that may keep models from loading, or None."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    return (
        f"the address space is limited to {soft / 2**30:.1f} GiB (ulimit -v): models fail to load if they need more, "
        "and requests of deeply nested JSON end the server, whose threads keep the usual stack"
    )
