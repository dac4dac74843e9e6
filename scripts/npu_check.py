"""Checks this project on an NPU, section by section, and writes a report to attach to an issue.

A section that fails does not stop the others. On the stand-in for CANN the times mean nothing, and the report says so.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "bench"))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glm_image.ar.executor import Executor
from glm_image.ar.settings import ArSettings
from glm_image.devices.accelerator import NpuDevice
from glm_image.devices.base import Device
from glm_image.devices.open import open_device
from glm_image.dit.fused.npu import attention
from glm_image.dit.settings import DitSettings
from glm_image.lifecycle.context import RequestContext
from glm_image.lifecycle.metadata import ar_metadata
from glm_image.pipeline import LocalPipeline, LocalSettings, paint_request
from glm_image.request.parameters import GenerationParameters

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torch-npu", "transformers", "diffusers", "numpy")
PROMPT = "a red circle that says 'NEWS'"
MOST_MEAN_ERROR = 1.0
"""Of 255, between an NPU and the CPU from the same tokens; a few pixels at edges may differ by more."""
REPLAYS = 20

Section = dict[str, Any]


class CheckError(Exception):
    """A result is not what it should be."""


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise CheckError(message)


def is_standin() -> bool:
    try:
        return hasattr(ctypes.CDLL("libascendcl.so"), "standin_log_start")
    except OSError:
        return False


def versions(device: Device) -> Section:
    """Of packages, CANN, driver and card."""
    import torch_npu  # noqa: PLC0415 - needs CANN's libraries

    smi = ["npu-smi", "info"]
    try:
        driver = subprocess.run(smi, capture_output=True, text=True, timeout=60, check=False).stdout[-4000:]
    except OSError as error:
        driver = str(error)
    return {
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "card": torch_npu.npu.get_device_name(device.torch_device),
        "cann": torch_npu.version.cann if hasattr(torch_npu.version, "cann") else "",
        "memory_gb": device.memory().total / 1e9,
        "npu_smi": driver,
        "stand_in": is_standin(),
        "variables": {name: value for name, value in os.environ.items() if name.startswith(("ASCEND_", "HCCL_"))},
    }


def operators(device: Device) -> Section:
    """The fused operators against torch on the CPU, in bf16: the largest difference over the largest value."""
    torch.manual_seed(0)
    ops, place, dtype = torch.ops.npu, device.torch_device, torch.bfloat16
    x, y, weight = torch.randn(64, 256), torch.randn(64, 256), torch.randn(256)
    heads, (cos, sin) = torch.randn(1, 24, 8, 128), torch.randn(2, 1, 24, 1, 128)
    image, scale = torch.randn(1, 32, 16, 16), torch.randn(32)

    def to(tensor: Tensor) -> Tensor:
        return tensor.to(place, dtype if tensor.is_floating_point() else None)

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).float()

    def turned(t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        return torch.cat([-second, first], -1)

    x, y, weight, heads, cos, sin, image, scale = map(rounded, (x, y, weight, heads, cos, sin, image, scale))
    first = heads.transpose(1, 2)
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "npu_rms_norm": (ops.npu_rms_norm(to(x), to(weight), 1e-5)[0], F.rms_norm(x, (256,), weight, 1e-5)),
        "npu_add_rms_norm": (
            ops.npu_add_rms_norm(to(x), to(y), to(weight), 1e-5)[0],
            F.rms_norm(x + y, (256,), weight, 1e-5),
        ),
        "layer_norm": (F.layer_norm(to(x), (256,), to(weight)), F.layer_norm(x, (256,), weight)),
        "npu_swiglu": (ops.npu_swiglu(to(x)), F.silu(x[:, :128]) * x[:, 128:]),
        "npu_gelu": (device.tanh_gelu(to(x)), F.gelu(x, approximate="tanh")),
        "addcmul_": (to(x).addcmul_(to(y), to(weight)), x + y * weight),
        "npu_rotary_mul": (ops.npu_rotary_mul(to(heads), to(cos), to(sin)), heads * cos + turned(heads) * sin),
        "npu_fusion_attention": (
            attention(to(heads), to(heads), to(heads)),
            F.scaled_dot_product_attention(first, first, first).transpose(1, 2),
        ),
        "npu_fused_infer_attention_score": (
            ops.npu_fused_infer_attention_score(
                to(first),
                to(first),
                to(first),
                num_heads=8,
                num_key_value_heads=8,
                scale=128**-0.5,
                input_layout="BNSD",
            )[0],
            F.scaled_dot_product_attention(first, first, first),
        ),
        "npu_group_norm_silu": (
            ops.npu_group_norm_silu(to(image), to(scale), to(scale), 8, 1e-6)[0],
            F.silu(F.group_norm(image, 8, scale, scale, 1e-6)),
        ),
        "int8 weights": (
            device.int8_product(
                to(x),
                torch.arange(64 * 256, device=place).remainder(100).view(64, 256).to(torch.int8),
                torch.full((64,), 0.01, device=place),
            ),
            x @ torch.arange(64 * 256).remainder(100).view(64, 256).float().t() * 0.01,
        ),
    }
    found = {
        name: float((got.cpu().float() - expected).abs().max() / expected.abs().max())
        for name, (got, expected) in pairs.items()
    }
    wrong = {name: error for name, error in found.items() if not error < 0.02}
    expect(not wrong, f"operators differ from the CPU's by more than 0.02 of their largest value: {wrong}")
    return {"relative_errors": found}


class Launches(TorchDispatchMode):
    """Counts operators that compute: what a step launches, as torch sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not function.is_view and "empty" not in function.name():
            self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def _refill(executor: Any, slot: int, sequence: Any) -> None:
    """Draws the noise of a sequence on the host: an NPU's generator draws other numbers than the CPU's."""
    generator = torch.Generator().manual_seed(sequence.generator.initial_seed() + sequence.sampled)
    noise = torch.empty_like(executor._state.noise[slot], device="cpu").exponential_(generator=generator)
    executor._state.noise[slot].copy_(noise)


def _image(checkpoint: Path, name: str, quantization: str, prior: Any = None) -> tuple[Any, Any, Section]:
    """Returns tokens, an image, and what the pipeline took; ``prior`` are tokens to paint in place of its own."""
    settings = LocalSettings(
        ar=ArSettings(dtype="bfloat16", max_sequence_tokens=512, quantization=quantization, max_num_seqs=2),
        dit=DitSettings(dtype="bfloat16", warmup_sizes=(), quantization=quantization),
    )
    with LocalPipeline(checkpoint, name, settings) as pipeline:
        parameters = GenerationParameters(prompt=PROMPT, height=96, width=96, num_inference_steps=12, seed=7)
        resolved, context = pipeline.resolve(parameters), RequestContext()
        started = time.perf_counter()
        own = pipeline.prior(resolved, context)
        decoded = time.perf_counter()
        used = own if prior is None else prior
        image = pipeline.paint(paint_request(resolved, used, ar_metadata(context, used.tokens)))
        seconds = {"tokens": decoded - started, "image": time.perf_counter() - decoded}
    return own, image, seconds


def product(device: Device, checkpoint: Path, quantization: str) -> Section:
    """Both stages of the small model against the CPU: the same noise, and the image from the CPU's tokens."""
    expected, reference, _ = _image(checkpoint, "cpu", quantization)
    with counted_captures() as captures:
        found, image, seconds = _image(checkpoint, str(device), quantization, expected)
    equal = float(np.mean(found.prior_token_ids == expected.prior_token_ids))
    error = np.abs(image.pixels.astype(int) - reference.pixels.astype(int))
    section = {"equal_tokens": equal, "largest_error": int(error.max()), "mean_error": float(error.mean()), **seconds}
    expect(equal >= 0.5, f"only {equal:.0%} of the tokens equal the CPU's: {section}")
    expect(float(error.mean()) <= MOST_MEAN_ERROR, f"pixels differ from the CPU's: {section}")
    expect(len(captures) >= 2, f"{len(captures)} steps are captured; allowed: a decode step and a denoising step")
    return section | {"operators_of_captured_steps": [{"all": counts.total(), **counts} for counts in captures]}


def captured_step(device: Device) -> Section:
    """A step of fused operators, captured: the replay equals the eager step, bit for bit, and is one call."""
    torch.manual_seed(1)
    weight = torch.randn(512, 512).to(device.torch_device, torch.bfloat16) / 20
    norm = torch.ones(512, device=device.torch_device, dtype=torch.bfloat16)
    start = torch.randn(8, 512).to(device.torch_device, torch.bfloat16)
    state = start.clone()

    def step() -> None:
        for _ in range(20):
            state.copy_(torch.ops.npu.npu_rms_norm(state @ weight + state, norm, 1e-5)[0])

    step()
    eager = state.cpu()
    replay = device.capture(step, warm=True)
    state.copy_(start)
    replay()
    expect(torch.equal(state.cpu(), eager), "a replay differs from the eager step")
    times = {}
    for name, run in (("eager", step), ("replay", replay)):
        device.record_event().synchronize()
        started = time.perf_counter()
        for _ in range(REPLAYS):
            run()
        device.record_event().synchronize()
        times[f"{name}_ms"] = (time.perf_counter() - started) / REPLAYS * 1e3
    return times


@contextmanager
def counted_captures() -> Iterator[list[Counter[str]]]:
    """Yields a list that gets the operators of every step that is captured."""
    capture, counts = NpuDevice.capture, []

    def counted(self: NpuDevice, step: Callable[[], None], **options: Any) -> Callable[[], None]:
        calls: list[Counter[str]] = []

        def watched() -> None:
            with Launches() as launches:
                step()
            calls.append(launches.counts)

        replay = capture(self, watched, **options)
        counts.append(calls[-1])
        return replay

    NpuDevice.capture = counted  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        NpuDevice.capture = capture  # type: ignore[method-assign]


def memory(device: Device) -> Section:
    """Allocates a quarter of the card and gives it back; more than all of it is refused in words that are known."""
    device.release_unused()
    before = device.memory()
    held = torch.empty(before.total // 4, dtype=torch.uint8, device=device.torch_device)
    during = device.memory()
    del held
    device.release_unused()
    after = device.memory()
    try:
        torch.empty(before.total * 2, dtype=torch.uint8, device=device.torch_device)
        refused = False
    except RuntimeError as error:
        refused = device.is_out_of_memory(error)
    section = {"before": before, "during": during, "after": after, "peak_gb": device.peak_memory() / 1e9}
    expect(before.free - during.free >= before.total // 5, f"the allocation is not seen: {section}")
    expect(before.free - after.free < 1 << 28, f"memory is not given back: {section}")
    expect(refused, "an allocation of twice the card's memory is not refused as out of memory")
    return section


def ceilings(device: Device) -> Section:
    """The copy bandwidth and the rate of matrix products."""
    from timing import report_ceilings  # noqa: PLC0415

    if is_standin():
        return {"skipped": "the stand-in has no rate that means anything"}
    found = report_ceilings(device, brief=False)
    return {"copy_tb_s": found.copy / 1e12, "matmul_tflop_s": found.matmul / 1e12}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="npu_check", description=__doc__)
    parser.add_argument("--device", default="npu:0", help="(%(default)s)")
    parser.add_argument("--checkpoint", type=Path, default=REPOSITORY / "checkpoints" / "tiny", metavar="DIR")
    parser.add_argument("--out", type=Path, default=Path("npu_check.json"), metavar="FILE", help="(%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    device = open_device(flags.device)
    device.set_current()
    Executor._refill_noise = _refill  # type: ignore[method-assign]
    sections: dict[str, Callable[[], Section]] = {
        "versions": lambda: versions(device),
        "operators": lambda: operators(device),
        "captured step": lambda: captured_step(device),
        "memory": lambda: memory(device),
        "ceilings": lambda: ceilings(device),
        "both stages in bf16": lambda: product(device, flags.checkpoint, "none"),
        "both stages in int8": lambda: product(device, flags.checkpoint, "int8"),
    }
    report = {name: _outcome(name, section) for name, section in sections.items()}
    if is_standin():
        report = {"note": "run on the stand-in for CANN: its times and numerics say nothing about an NPU", **report}
    flags.out.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"report: {flags.out}")
    return int(any(isinstance(part, dict) and not part["ok"] for part in report.values()))


def _outcome(name: str, section: Callable[[], Section]) -> Section:
    started = time.perf_counter()
    try:
        outcome: Section = {"ok": True, **section()}
    except Exception as error:
        outcome = {"ok": False, "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    seconds = time.perf_counter() - started
    print(f"{name}: {'ok' if outcome['ok'] else outcome['error']} ({seconds:.0f} s)", flush=True)
    return {**outcome, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
