"""How the benchmarks time work on a device, and the ceilings of the device in the same run."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from measure import report

from glm_image.devices.base import Device, DeviceEvent
from glm_image.devices.open import instance_device, open_device

COPY_BYTES, HOST_COPY_BYTES, BRIEF_COPY_BYTES = 1 << 30, 1 << 27, 1 << 24
"""Of the copy that measures the bandwidth: larger than any cache, except in a brief run on a host."""

MATMUL_SIDE, HOST_MATMUL_SIDE = 8192, 512
MATMUL_SECONDS, SUSTAINED_MATMUL_SECONDS, BRIEF_MATMUL_SECONDS = 2.0, 5.0, 0.05
PACKAGES = ("torch", "triton", "transformers", "diffusers", "numpy", "cache-dit", "nvidia-cudnn-cu13")
KERNELS_REPORTED = 14


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run.

    Attributes:
        copy: bytes read and written a second by a large copy.
        matmul: floating-point operations a second of matrix products in the device's default dtype.
    """

    copy: float
    matmul: float


def open_benchmark_device(name: str) -> Device:
    """Opens the first device that ``--device`` names, and makes it current."""
    device = open_device(instance_device(name, 0))
    device.set_current()
    if device.is_host:
        # An engine computes in threads of its own: OpenMP's threads for each would be more than the cores.
        torch.set_num_threads(1)
    return device


def synchronizer(device: Device) -> Callable[[], None]:
    """Returns a function that waits for all work of the device."""
    return lambda: device.record_event().synchronize()


def seconds(work: Callable[[], object], synchronize: Callable[[], None], repeats: int = 5, warm_ups: int = 2) -> float:
    """Returns the median seconds of ``repeats`` runs, the device idle before and after each."""
    for _ in range(warm_ups):
        work()
    times = []
    for _ in range(repeats):
        synchronize()
        started = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def device_name(device: Device) -> str:
    """Returns the name that a device's driver gives it, or the CPU's model."""
    if device.torch_device.type == "cuda":
        return str(torch.cuda.get_device_name(device.torch_device))
    return str(device.torch_device.type)


def report_ceilings(device: Device, *, brief: bool, matmul_seconds: float = MATMUL_SECONDS) -> Ceilings:
    """Measures and reports the device's ceilings, after its name and the versions of the packages."""
    matmul_seconds = BRIEF_MATMUL_SECONDS if brief else matmul_seconds
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    name, dtype = device_name(device), str(device.default_dtype).removeprefix("torch.")
    report("device", device=name, dtype=dtype, versions=versions)
    ceilings = Ceilings(copy_bandwidth(device, brief=brief), matmul_rate(device, matmul_seconds))
    report("ceiling", device=name, copy_tb_s=ceilings.copy / 1e12, matmul_tflop_s=ceilings.matmul / 1e12)
    return ceilings


def copy_bandwidth(device: Device, *, brief: bool) -> float:
    """Returns bytes read and written a second by a large copy."""
    size = COPY_BYTES if not device.is_host else BRIEF_COPY_BYTES if brief else HOST_COPY_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), synchronizer(device), repeats=9)


def matmul_rate(device: Device, for_seconds: float) -> float:
    """Returns FLOP a second of matrix products over some seconds: devices slow down as they warm up."""
    side = HOST_MATMUL_SIDE if device.is_host else MATMUL_SIDE
    left, right = torch.randn(2, side, side, device=device.torch_device, dtype=device.default_dtype)
    product, synchronize = torch.empty_like(left), synchronizer(device)
    torch.matmul(left, right, out=product)
    synchronize()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < for_seconds:
        for _ in range(20):
            torch.matmul(left, right, out=product)
        synchronize()
        count += 20
    return count * 2 * side**3 / (time.perf_counter() - started)


def release(device: Device) -> None:
    """Frees the memory of objects that nothing refers to any more."""
    gc.collect()
    device.release_unused()


class DeviceWaits:
    """Adds up the seconds that each thread waits for a device's events.

    Replaces ``device.record_event``, so that what an engine waits for is counted too.
    """

    def __init__(self, device: Device) -> None:
        self._record_event = device.record_event
        self._thread = threading.local()
        device.record_event = self._counted_event  # type: ignore[method-assign]

    @property
    def seconds(self) -> float:
        """The calling thread's seconds."""
        return float(getattr(self._thread, "seconds", 0.0))

    def _counted_event(self) -> DeviceEvent:
        return _CountedEvent(self._record_event(), self._add)

    def _add(self, seconds: float) -> None:
        self._thread.seconds = self.seconds + seconds


class _CountedEvent:
    def __init__(self, event: DeviceEvent, add: Callable[[float], None]) -> None:
        self._event, self._add = event, add

    def synchronize(self) -> None:
        started = time.perf_counter()
        self._event.synchronize()
        self._add(time.perf_counter() - started)


class CommandSeconds(NamedTuple):
    """The seconds of one command, and those of them in which the host waited for the device."""

    whole: float
    waited: float

    @property
    def host(self) -> float:
        """The seconds of the host's own work."""
        return self.whole - self.waited


class CommandClock:
    """Times the commands that an engine runs, by the name of their class; ``wrap`` is an engine's ``watched``."""

    def __init__(self, device: Device) -> None:
        self._waits = DeviceWaits(device)
        self.times: dict[str, list[CommandSeconds]] = defaultdict(list)

    def wrap(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Returns ``run`` with a clock."""

        def timed(command: Any) -> Any:
            with self.timed(type(command).__name__):
                return run(command)

        return timed

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Records the seconds of a block."""
        started, waited = time.perf_counter(), self._waits.seconds
        try:
            yield
        finally:
            whole = time.perf_counter() - started
            self.times[name].append(CommandSeconds(whole, self._waits.seconds - waited))

    def take(self) -> dict[str, list[CommandSeconds]]:
        """Returns the times since the last call."""
        times, self.times = self.times, defaultdict(list)
        return times


def report_kernels(work: Callable[[], object], device: Device, most: int = KERNELS_REPORTED, **named: Any) -> None:
    """Reports the kernels of some work, those that take longest first; on a CPU, torch's operators."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415 - it takes long to import

    synchronize, on_cpu = synchronizer(device), device.torch_device.type == "cpu"
    synchronize()
    with profile(activities=[ProfilerActivity.CPU if on_cpu else ProfilerActivity.CUDA]) as recorded:
        work()
        synchronize()

    def microseconds(event: Any) -> float:
        return float(event.self_cpu_time_total if on_cpu else event.self_device_time_total)

    for event in sorted(recorded.key_averages(), key=microseconds, reverse=True)[:most]:
        report("kernel", **named, name=event.key[:70], ms=microseconds(event) / 1e3, calls=event.count)
