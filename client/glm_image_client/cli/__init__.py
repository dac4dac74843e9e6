"""The command ``glm-image``: what it consists of is in ``application``; each of its commands is a module."""

from __future__ import annotations

from glm_image_client.cli.application import app, main
from glm_image_client.cli.commands import edit, generate, inspect, paint, requests, serve, show, tokens

__all__ = ["app", "edit", "generate", "inspect", "main", "paint", "requests", "serve", "show", "tokens"]
