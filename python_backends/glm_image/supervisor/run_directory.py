"""Makes the private folder of a running server, with ASCII links to what the server reads elsewhere.

The Python of a model's process decodes paths as ASCII, whatever the locale, and Triton starts it through a shell. So a
path with other characters reaches the models as a link.

A lock on the folder shows that its server lives. It also keeps systemd-tmpfiles from cleaning the folder, as
tmpfiles.d(5) documents. The kernel releases it with the last process of the server that ``serve`` has started.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import stat
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

from glm_image.errors import ConfigurationError, shown
from glm_image.watchdog.leftovers import remove_leftovers

PREFIX = "glm-image-serve-"
_NAME = re.compile(rf"{PREFIX}([0-9a-f]{{16}})")
_PLAIN = re.compile(r"[A-Za-z0-9_./+@=-]{1,255}")
MAX_PARENT_CHARACTERS = 45
"""With the names within, a longer path exceeds the 107 characters of a socket's address."""
OTHER_PARENTS = ("/run", "/tmp", "/var/tmp", "/dev/shm")
ATTEMPTS = 10


class RunDirectory:
    """The folder of one server, locked while this object or a process that inherits ``lock`` exists.

    Attributes:
        shm_prefix: begins the names of the server's regions in /dev/shm.
        lock: the descriptor that holds the lock.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path, self.lock = path, lock
        self.shm_prefix = _shm_prefix(path.name)
        self._targets: dict[str, str] = {}
        self.close = weakref.finalize(self, os.close, lock)

    @classmethod
    def create(cls) -> RunDirectory:
        """Makes a folder in the first of the possible ones that can be written.

        Raises:
            ConfigurationError: there is none, or TMPDIR is not a folder.
        """
        parents = _parents()
        for parent in parents:
            for _ in range(ATTEMPTS):
                path = parent / f"{PREFIX}{secrets.token_hex(8)}"
                try:
                    path.mkdir(mode=0o700)
                except OSError:
                    break
                lock = _lock(path)
                if lock is not None:
                    return cls(path, lock)
        names = ", ".join(map(str, parents))
        raise ConfigurationError(f"no folder for the server's sockets: none of {names} can be written; set TMPDIR")

    def plain(self, path: Path | str, name: str) -> str:
        """Returns a path that any program can read: ``path``, or a link ``name`` to it."""
        if is_plain(path):
            return str(path)
        link = self.path / "links" / name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(path)
        self._targets[str(link)] = str(path)
        return str(link)

    def plain_environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        """Returns environment variables, those that name a folder with a plain path for it."""
        return {
            name: self.plain(value, name) if not value.isascii() and Path(value).is_absolute() and _is_folder(value)
            else value
            for name, value in variables.items()
        }  # fmt: skip

    def with_targets(self, text: str) -> str:
        """Returns a message with the paths that the links stand for."""
        for link, target in self._targets.items():
            text = text.replace(link, shown(target))
        return text

    def remove(self) -> None:
        """Removes the folder and the server's shared memory; to be called when the server has ended."""
        remove_leftovers(self.shm_prefix, self.path)
        self.close()


def is_plain(path: Path | str) -> bool:
    """Whether a path is short and has only characters that no shell, list or encoding treats specially."""
    return _PLAIN.fullmatch(str(path)) is not None


def remove_dead() -> None:
    """Removes what killed servers of this user have left; a living server's folder is locked."""
    for parent in {*_parents(), *map(Path, OTHER_PARENTS)}:
        for path in _own_folders(parent):
            lock = _lock(path)
            if lock is not None:
                remove_leftovers(_shm_prefix(path.name), path)
                os.close(lock)


def _parents() -> list[Path]:
    temporary = os.environ.get("TMPDIR") or "/tmp"
    if not _is_folder(temporary):
        raise ConfigurationError(f"TMPDIR is {shown(temporary)}, which is not a folder; allowed: a folder, or not set")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    folders = [str(Path(temporary).absolute()), *([runtime] if runtime else []), *OTHER_PARENTS]
    usable = [folder for folder in folders if is_plain(folder) and len(folder) <= MAX_PARENT_CHARACTERS]
    return [Path(folder) for folder in dict.fromkeys(usable)]


def _own_folders(parent: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for entry in os.scandir(parent):
            is_folder = entry.is_dir(follow_symlinks=False)
            if _NAME.fullmatch(entry.name) and is_folder and entry.stat().st_uid == os.geteuid():
                yield Path(entry.path)


def _lock(path: Path) -> int | None:
    """Locks a folder and returns the descriptor; None if another process holds it or has removed it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
    os.close(descriptor)
    return None


def _shm_prefix(name: str) -> str:
    return f"glm_image_{name.removeprefix(PREFIX)}_"


def _is_folder(path: str) -> bool:
    try:
        return stat.S_ISDIR(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False
