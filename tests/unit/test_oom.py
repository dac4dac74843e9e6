"""Allocations that really fail, in a process whose address space is limited."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from glm_image.devices.oom import OomReport, run_or_oom
from glm_image.devices.open import open_device
from glm_image.errors import DeviceMemoryError

TOO_MUCH = 1 << 50

PROGRAM = """
import json, resource, sys
from pathlib import Path
import numpy as np
import torch
from glm_image.checkpoint.checkpoint import Checkpoint
from glm_image.devices.open import open_device
from glm_image.dit.engine import DitEngine, DitSettings
from glm_image.errors import DeviceMemoryError
from glm_image.lifecycle.context import RequestContext
from glm_image.request.geometry import Grid, Size
from glm_image.request.limits import Limits
from glm_image.request.parameters import PaintRequest

torch.set_num_threads(1)
engine = DitEngine(Checkpoint.open(Path(sys.argv[1])), open_device("cpu"), DitSettings())

def paint(side):
    tokens = np.zeros((1, side * side), np.int32)
    request = PaintRequest("x", tokens, Grid(side, side), Size(32 * side, 32 * side), (1,), num_inference_steps=2)
    return engine.paint(RequestContext(), request, Limits()).result().pixels

before = paint(2)
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (8 << 20), resource.RLIM_INFINITY))
messages = []
for _ in range(2):
    try:
        paint(64)
    except DeviceMemoryError as error:
        messages.append(str(error))
print(json.dumps({
    "messages": messages, "same": bool((before == paint(2)).all()), "held": len(engine.executor._images)
}))
"""


@pytest.mark.full
def test_image_that_does_not_fit_fails_alone(checkpoint_folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, checkpoint_folder], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert len(result["messages"]) == 2
    for message in result["messages"]:
        assert message.startswith("out of memory on cpu during ")
        assert " of an image of 2048 x 2048: " in message
        assert message.endswith("; lower height x width, or the source images")
    assert (result["same"], result["held"]) == (True, 0)


def test_error_keeps_no_tensors_of_the_failed_work() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> torch.Tensor:
        tensor = torch.zeros(10)
        held.append(weakref.ref(tensor))
        return torch.empty(TOO_MUCH, dtype=torch.uint8)

    gc.disable()
    try:
        with pytest.raises(
            DeviceMemoryError, match=r"^out of memory on cpu during x: [\d.]+ of [\d.]+ GB free, y; lower z$"
        ) as failed:
            run_or_oom(open_device("cpu"), work, lambda: OomReport("x", "y", "z"))
        assert held[0]() is None
    finally:
        gc.enable()
    assert (failed.value.__cause__, failed.value.__context__) == (None, None)


def test_other_errors_pass_and_a_chained_allocation_error_is_recognized() -> None:
    device = open_device("cpu")
    assert not device.is_out_of_memory(RuntimeError("shapes do not match"))

    def fail_on_the_way_out() -> None:
        try:
            torch.empty(TOO_MUCH, dtype=torch.uint8)
        finally:
            raise ValueError("on the way out")

    with pytest.raises(ValueError, match="on the way out") as ended:
        fail_on_the_way_out()
    assert device.is_out_of_memory(ended.value)
    with pytest.raises(ZeroDivisionError):
        run_or_oom(device, lambda: 1 / 0, lambda: OomReport("x", "y", "z"))
