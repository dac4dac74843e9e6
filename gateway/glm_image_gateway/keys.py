"""API keys: their file, who a request comes from, and the limits of each.

The file is JSON with the SHA-256 of each key, so that it holds no key. It is read again when it changes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from glm_image_gateway.errors import ApiError
from glm_image_gateway.settings import SettingsError

logger = logging.getLogger(__name__)

CHECK_SECONDS: Final = 1.0
"""Between two looks at the file."""


class Caller(BaseModel):
    """An API key: its name, the SHA-256 of its text, and its limits; None = no limit.

    Attributes:
        weight: the key's share of a busy server, relative to the other keys.
        max_in_flight: requests and jobs that it may have at the same time.
        megapixel_steps_per_minute: images x megapixels x denoising steps that it may ask for in a minute.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    weight: float = Field(default=1.0, gt=0)
    max_in_flight: int | None = Field(default=None, ge=1)
    megapixel_steps_per_minute: float | None = Field(default=None, gt=0)


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[Caller]


ANONYMOUS: Final = Caller(name="anonymous", sha256="0" * 64)
"""Every caller of a gateway without keys."""


def digest(key: str) -> str:
    """Returns the SHA-256 of a key. Keys are random and long, so that no salt or slow hash is needed."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class Keys:
    """The keys of a file.

    Raises:
        SettingsError: the file cannot be read, or is not a file of keys.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._callers: list[Caller] = []
        self._checked = time.monotonic()
        self._stamp: tuple[int, int, int] | None = None
        if path is not None:
            self._stamp, self._callers = _stamp(path), _read(path)

    @property
    def are_required(self) -> bool:
        return self._path is not None

    def caller(self, authorization: str | None) -> Caller:
        """Returns whom an ``Authorization`` header names.

        Raises:
            ApiError: the header has no key, or an unknown one.
        """
        if self._path is None:
            return ANONYMOUS
        self._reload()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "the request has no API key; allowed: Authorization: Bearer KEY", "missing_api_key")
        given, found = digest(key.strip()), None
        for caller in self._callers:  # all of them, so that the duration does not depend on the key
            if hmac.compare_digest(caller.sha256, given):
                found = caller
        if found is None:
            raise ApiError(401, "the API key is not known", "invalid_api_key")
        return found

    def named(self, name: str) -> Caller:
        """Returns the caller of a name, with default limits if its key has been removed."""
        return next((caller for caller in self._callers if caller.name == name), ANONYMOUS)

    def _reload(self) -> None:
        if self._path is None or time.monotonic() < self._checked + CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        try:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._stamp, self._callers = stamp, _read(self._path)
                logger.info("%s was read again: %d keys", self._path, len(self._callers))
        except SettingsError as error:
            logger.error("the keys stay as they were: %s", error)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise SettingsError(f"--api-keys is {str(path)!r}, which cannot be read: {error.strerror}") from None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> list[Caller]:
    try:
        callers = _KeyFile.model_validate_json(path.read_bytes()).keys
    except OSError as error:
        raise SettingsError(f"--api-keys is {str(path)!r}, which cannot be read: {error.strerror}") from None
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise SettingsError(f"--api-keys is {str(path)!r}, which is no file of keys: {place} {fault['msg']}") from None
    names = [caller.name for caller in callers]
    if len(set(names)) < len(names):
        raise SettingsError(f"--api-keys is {str(path)!r}, in which two keys have the same name")
    return callers


def new_key(path: Path, name: str) -> str:
    """Adds a random key to a file, which is made if it is missing, and returns the key.

    Raises:
        SettingsError: the file is not a file of keys, or has a key of the name.
    """
    callers = _read(path) if path.exists() else []
    if any(caller.name == name for caller in callers):
        raise SettingsError(f"{str(path)!r} has a key named {name!r}; allowed: a new name")
    key = f"glm-{secrets.token_urlsafe(32)}"
    callers.append(Caller(name=name, sha256=digest(key)))
    content = {"keys": [caller.model_dump(exclude_none=True) for caller in callers]}
    written = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    written.replace(path)
    return key
