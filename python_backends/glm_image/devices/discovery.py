"""Finds this machine's accelerators without importing torch, which would fix what the process sees."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Final

VISIBLE_VARIABLES: Final = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
"""The variables that select the devices a process sees; read once, when torch is imported or first used."""

NODES_VARIABLE: Final = "GLM_IMAGE_DEVICE_NODES"
"""Names the folder of the NPU driver's device nodes, for tests on a machine without the driver; /dev if not set."""


@dataclass(frozen=True)
class Accelerators:
    """Accelerators of one kind.

    Attributes:
        kind: ``npu`` or ``cuda``; ``cpu`` if there are none.
        ids: their ids in the runtime's variable; ``npu:1`` is the second of them.
    """

    kind: str
    ids: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.ids:
            return "cpu only"
        last = f" to {self.kind}:{len(self.ids) - 1}" if len(self.ids) > 1 else ""
        return f"{self.kind}:0{last}"

    def has(self, device: str) -> bool:
        """Whether ``device``, such as ``npu:1``, is one of them; ``cpu`` and ``cpu:N`` always are."""
        kind, _, index = device.partition(":")
        return kind == "cpu" or (kind == self.kind and int(index) < len(self.ids))


def find_accelerators(environment: Mapping[str, str] = os.environ) -> Accelerators:
    """Returns the accelerators that are visible to a process with this environment."""
    nodes = Path(environment.get(NODES_VARIABLE) or "/dev")
    for kind, count in (("npu", partial(_count_npus, nodes)), ("cuda", _count_gpus)):
        present = tuple(map(str, range(count())))
        ids = _visible_ids(environment.get(VISIBLE_VARIABLES[kind]), present)
        if present and ids:
            return Accelerators(kind, ids)
    return Accelerators("cpu")


def _visible_ids(value: str | None, present: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the ids in a variable up to the first invalid one, as CUDA does; all if the variable is not set."""
    if value is None:
        return present
    names = (name.strip() for name in value.split(","))
    return tuple(takewhile(lambda name: name and not name.startswith("-"), names))


def _count_npus(nodes: Path) -> int:
    if importlib.util.find_spec("torch_npu") is None:
        return 0
    return sum(device.name.removeprefix("davinci").isdigit() for device in nodes.glob("davinci*"))


def _count_gpus() -> int:
    if importlib.metadata.version("torch").endswith("+cpu"):
        return 0
    count = ctypes.c_uint(0)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")  # as torch counts them; needs no context on a device
    except OSError:
        return 0
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return sum(device.name.removeprefix("nvidia").isdigit() for device in Path("/dev").glob("nvidia*"))
    nvml.nvmlShutdown()
    return count.value
