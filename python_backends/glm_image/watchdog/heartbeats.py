"""The heartbeat files of models' processes, and the pipes to them; written by ``glm_image.telemetry.heartbeat``."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

FOLDER = "heartbeats"
"""The folder of the run directory that holds the files."""
SUFFIX, COMMANDS_SUFFIX = ".heartbeat", ".commands"


class HeartbeatRecord(NamedTuple):
    """The content of a heartbeat file: 64-bit words in native byte order.

    Attributes:
        pid: the process; 0 = it is not watched.
        beats: a counter that changes at every beat.
        busy_since: start of the oldest command that runs, on the monotonic clock in ns; 0 = idle.
        hang_ns: how long a command may run, in ns; 0 = no limit.
        drained: 1 = the process has no requests and accepts no more.
    """

    pid: int = 0
    beats: int = 0
    busy_since: int = 0
    hang_ns: int = 0
    drained: int = 0


HEARTBEAT = struct.Struct(f"={len(HeartbeatRecord._fields)}q")


class HeartbeatFile:
    """An instance's heartbeat and command pipe, kept open: both work after their files are removed.

    Attributes:
        name: of the instance, ``MODEL_INDEX``.

    Raises:
        OSError: the file is gone.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self._heartbeat = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._commands: int | None = None
        with contextlib.suppress(OSError):  # the model is still loading
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
            self._commands = os.open(path.with_suffix(COMMANDS_SUFFIX), flags)

    @property
    def model(self) -> str:
        return self.name.rpartition("_")[0]

    def read(self) -> HeartbeatRecord:
        """Returns zeros if the file is incomplete."""
        content = os.pread(self._heartbeat, HEARTBEAT.size, 0)
        return HeartbeatRecord(*HEARTBEAT.unpack(content)) if len(content) == HEARTBEAT.size else HeartbeatRecord()

    def send(self, command: bytes) -> None:
        """Sends a command to the process; one that has ended ignores it."""
        if self._commands is not None:
            with contextlib.suppress(OSError):
                os.write(self._commands, command)

    def close(self) -> None:
        os.close(self._heartbeat)
        if self._commands is not None:
            os.close(self._commands)


def find_heartbeat(folder: Path, pid: int) -> HeartbeatFile | None:
    """Returns the heartbeat of a process, or None if it has none or has not started it."""
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):  # removed meanwhile
            file = HeartbeatFile(path)
            if file.read().pid == pid:
                return file
            file.close()
    return None


def drained_models(files: Iterable[HeartbeatFile]) -> set[str]:
    """Returns the models all of whose instances have drained."""
    drained: dict[str, bool] = {}
    for file in files:
        drained[file.model] = drained.get(file.model, True) and bool(file.read().drained)
    return {model for model, is_drained in drained.items() if is_drained}
