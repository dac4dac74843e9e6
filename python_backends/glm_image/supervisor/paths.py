"""Checks of the paths that an operator names."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from glm_image.errors import ConfigurationError, shown


def folder_fault(path: Path, file: str | None = None) -> str | None:
    """Returns why a path is no folder, or no folder with this file, that can be read; None if it is one."""
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return "is not a folder"
        if file is not None and not stat.S_ISREG((path / file).stat().st_mode):
            return f"has no {file}"
    except (FileNotFoundError, NotADirectoryError):
        return f"has no {file}" if path.is_dir() else "is not a folder"
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    return None if os.access(path, os.R_OK | os.X_OK) else "cannot be read"


def check_log_file(name: str, path: Path) -> None:
    """Checks that a file can be appended to, without creating it; a named pipe and a device are allowed.

    Raises:
        ConfigurationError: names the flag, the path and the fault.
    """
    fault = _log_fault(path)
    if fault is not None:
        allowed = "the path of a file, a named pipe or a device that can be written"
        raise ConfigurationError(f"{name} is {shown(str(path))}, {fault}; allowed: {allowed}")


def _log_fault(path: Path) -> str | None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            return "whose folder does not exist"
        return None if os.access(path.parent, os.W_OK | os.X_OK) else "whose folder cannot be written"
    except OSError as error:
        return f"which cannot be used ({error.strerror})"
    if stat.S_ISDIR(mode):
        return "which is a folder"
    if stat.S_ISSOCK(mode):
        return "which is a socket"
    return None if os.access(path, os.W_OK) else "which cannot be written"
