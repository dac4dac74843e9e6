"""What the stand-in checks and refuses: the order of streams, captures, memory, devices.

Run by ``tests/npu/test_standin.py`` on a stand-in with two devices of 256 MiB.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from standin_log import recorded

MIB = 1 << 20


def ends_the_process(script: str) -> str:
    """Runs a script on the same stand-in; returns what it prints as it is ended."""
    done = subprocess.run(
        [sys.executable, "-c", f"import torch, torch_npu\n{script}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 70, done.stderr
    return done.stderr


UNORDERED = """
side, x = torch.npu.Stream(), torch.ones(8, device="npu")
torch.npu.synchronize()
with torch.npu.stream(side):
    x.add_(1)
x * 2
torch.npu.synchronize()
"""


def test_a_read_without_an_event_is_reported() -> None:
    report = ends_the_process(UNORDERED)
    assert "aclnnMuls in stream" in report
    assert "written by aclnnInplaceAdds in stream" in report


@pytest.mark.parametrize(
    "order",
    [
        lambda side: torch.npu.current_stream().wait_stream(side),
        lambda side: torch.npu.current_stream().wait_event(side.record_event()),
        lambda side: side.synchronize(),
        lambda side: torch.npu.synchronize(),
    ],
)
def test_an_order_is_enough(order: object) -> None:
    side, x = torch.npu.Stream(), torch.ones(8, device="npu")
    torch.npu.synchronize()
    with torch.npu.stream(side):
        x.add_(1)
    order(side)
    assert torch.equal((x * 2).cpu(), torch.full((8,), 4.0))


def test_what_is_missing_ends_the_process_with_its_name() -> None:
    assert "aclnnBincountGetWorkspaceSize has no implementation" in ends_the_process(
        "torch.ones(3, dtype=torch.int64, device='npu').bincount(); torch.npu.synchronize()"
    )


def captured(step: object, **options: object) -> torch.npu.NPUGraph:
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True, **options):
        step()
    return graph


def test_capture_and_replay() -> None:
    x, weight = torch.randn(6, 8, device="npu"), torch.randn(8, 8, device="npu")
    out = torch.full((6, 8), 5.0, device="npu")
    graph = captured(lambda: out.copy_(F.silu(x @ weight) + 1))
    assert torch.equal(out.cpu(), torch.full((6, 8), 5.0))  # recorded, not run
    for _ in range(2):
        x.copy_(torch.randn(6, 8))
        with recorded() as events:
            graph.replay()
        assert [event["kind"] for event in events if event["kind"] != "wait"] == ["replay"]
        torch.testing.assert_close(out.cpu(), F.silu(x.cpu() @ weight.cpu()) + 1)


@pytest.mark.parametrize(
    ("forbidden", "code"),
    [
        (lambda x: x.sum().item(), 107027),
        (lambda x: x.cpu(), 107030),
        (lambda x: torch.npu.current_stream().synchronize(), 107027),
        (lambda x: torch.npu.synchronize(), 107030),
        (lambda x: torch.npu.current_stream().record_event().synchronize(), 107028),
    ],
)
def test_a_capture_refuses(forbidden: object, code: int) -> None:
    x = torch.ones(4, device="npu")
    with pytest.raises(RuntimeError, match=str(code)):
        captured(lambda: forbidden(x))
    torch.testing.assert_close((x + 1).cpu(), torch.full((4,), 2.0))  # and the device works on


def test_a_capture_with_a_stream_that_is_not_joined_is_refused() -> None:
    side, x = torch.npu.Stream(), torch.ones(4, device="npu")

    def step() -> None:
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            x.add_(1)

    with pytest.raises(RuntimeError, match="107025"):
        captured(step)


def test_streams_in_a_capture() -> None:
    side, x, y = torch.npu.Stream(), torch.ones(4, device="npu"), torch.zeros(4, device="npu")

    def step() -> None:
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            y.add_(1)
        x.add_(1)
        torch.npu.current_stream().wait_stream(side)
        x.add_(y)

    captured(step).replay()
    assert torch.equal(x.cpu(), torch.full((4,), 3.0))


def test_memory_is_accounted_and_runs_out() -> None:
    torch.npu.empty_cache()
    free, total = torch.npu.mem_get_info()
    assert total == 256 * MIB
    held = torch.empty(100 * MIB, dtype=torch.uint8, device="npu")
    assert free - torch.npu.mem_get_info()[0] >= 100 * MIB
    assert held.view(torch.float32)[:16].isnan().all().item()  # fresh memory is not zero
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(200 * MIB, dtype=torch.uint8, device="npu")
    del held
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info()[0] == free


def test_devices_have_their_own_memory() -> None:
    assert torch.npu.device_count() == 2
    before = torch.npu.mem_get_info("npu:0")
    x = torch.ones(50 * MIB, dtype=torch.uint8, device="npu:1")
    assert torch.npu.mem_get_info("npu:0") == before
    assert torch.npu.mem_get_info("npu:1")[0] <= 206 * MIB
    assert torch.equal(x[:3].to("npu:0").cpu(), torch.ones(3, dtype=torch.uint8))
