"""The parent of a Triton process: finds, starts, watches, restarts and stops a server."""

from __future__ import annotations

from glm_image.supervisor.server import ServerStartError, TritonServer
from glm_image.supervisor.settings import ServerSettings

__all__ = ["ServerSettings", "ServerStartError", "TritonServer"]
