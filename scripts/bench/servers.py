"""The processes of a server and their memory, and the checkpoint that a benchmark's own server serves.

Imports no other module of this folder, so that scripts outside of it can use this one.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glm_image.supervisor import TritonServer

PROC = Path("/proc")
KIBIBYTE = 1024
STUB = "triton_python_backend_stub"


def tiny_checkpoint(folder: Path) -> Path:
    """Makes a tiny checkpoint of random weights in a folder; returns its path."""
    path = folder / "tiny"
    maker = Path(__file__).resolve().parents[1] / "make_tiny_checkpoint.py"
    subprocess.run([sys.executable, maker, path], check=True, stdout=subprocess.DEVNULL)
    return path


def processes(server: TritonServer) -> dict[str, int]:
    """Returns the process ids of tritonserver and of each model's instances, by name."""
    found: dict[str, int] = {}
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):  # the process has ended
            arguments = (folder / "cmdline").read_text().split("\0")
            if not any(server.shm_prefix in argument for argument in arguments):
                continue
            if arguments[0].endswith("/tritonserver"):
                found["tritonserver"] = int(folder.name)
            elif arguments[0].endswith(f"/{STUB}"):
                model = Path(arguments[1]).parents[1].name
                found[model if model not in found else f"{model} {folder.name}"] = int(folder.name)
    return dict(sorted(found.items()))


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process, shared pages included."""
    status = (PROC / str(pid) / "status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * KIBIBYTE


def shared_memory_bytes(server: TritonServer) -> int:
    """Returns the size of a server's regions in /dev/shm."""
    return sum(region.stat().st_blocks * 512 for region in Path("/dev/shm").glob(f"{server.shm_prefix}*"))


def memory(root: int) -> list[dict[str, Any]]:
    """Returns the peak and the current resident memory of the server's processes that descend from ``root``."""
    found = []
    for pid in descendants(root):
        try:
            arguments = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
            status = dict(line.split(":", 1) for line in (PROC / str(pid) / "status").read_text().splitlines())
        except OSError:  # the process has ended
            continue
        program = Path(arguments[0]).name
        model = Path(arguments[1]).parents[1].name if program == STUB else None
        if program == "tritonserver" or model:
            peak, resident = (int(status[name].split()[0]) * KIBIBYTE for name in ("VmHWM", "VmRSS"))
            found.append({"process": model or program, "pid": pid, "peak_bytes": peak, "resident_bytes": resident})
    return found


def descendants(root: int) -> list[int]:
    """Returns a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [root]
    while waiting:
        found.append(waiting.pop())
        waiting.extend(children.get(found[-1], ()))
    return found
