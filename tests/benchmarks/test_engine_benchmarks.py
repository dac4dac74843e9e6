"""Every benchmark of an engine runs, briefly, and its figures are consistent."""

from __future__ import annotations

from pathlib import Path

import linears
import pytest
import torch
from measure import TINY_CHECKPOINT
from timing import DeviceWaits

from benchmarks.lines import all_of, check_ceiling, only, run
from glm_image.devices.base import DeviceEvent
from glm_image.devices.cpu import CpuDevice

CLOSE = pytest.approx
ROUNDED = 2e-3
"""Relative: lines have four digits."""


@pytest.fixture
def brief(checkpoint_folder: Path) -> list[object]:
    return ["--brief", "--checkpoint", checkpoint_folder, "--size", "64x64"]


def test_ar(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    lines = run(capsys, "ar", *brief, "--same", "64x64", "--profile", "--reference")
    floor = only(lines, "floor of a step")
    assert floor["ms"] == CLOSE(floor["gigabytes"] / check_ceiling(lines)["copy_tb_s"], rel=ROUNDED)
    steps = all_of(lines, "decode step", size=64)
    assert [line["running"] for line in steps] == [1, 8]
    for line in steps:
        assert line["to_floor"] == CLOSE(line["ms"] / floor["ms"], rel=ROUNDED)
        assert line["tokens_before"] > 0
    requests = all_of(lines, "request of the AR engine")
    assert [(line["which"], line["requests"]) for line in requests] == [
        ("first", 1),
        ("second", 1),
        ("eight together", 8),
    ]
    for line in requests:
        assert line["seconds"] > line["decode_seconds"] > line["prefill_seconds"]
    host = only(lines, "host time of a step")
    assert host["ms"] <= host["step_ms"]
    assert host["share"] == CLOSE(host["ms"] / host["step_ms"], rel=ROUNDED)
    same = only(lines, "same tokens alone and among eight")
    assert (same["identical"], same["sequences"]) == (8, 8)
    assert only(lines, "admission of a 64-token prompt")["lost_ms"] > 0
    assert only(lines, "transformers generate")["ms_a_token"] > 0
    assert any("linear" in line["name"] for line in all_of(lines, "kernel"))
    assert only(lines, "memory")["peak_gb"] > 0


@pytest.mark.full
def test_ar_with_int8_weights(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    lines = run(capsys, "ar", *brief, "--same", "64x64", "--quantization", "int8")
    weights = only(lines, "int8 weights")
    assert 0 < weights["logit_error"] < 0.2
    assert weights["gigabytes_after"] < weights["gigabytes_before"]
    assert len(all_of(lines, "decode step")) == 2


def test_speculation(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(
        capsys, "speculation", "--brief", "--checkpoint", TINY_CHECKPOINT, "--load-format", "auto", "--no-times"
    )
    same = only(lines, "same tokens")
    assert (same["prompts"], same["identical"]) == (8, 8)
    assert only(lines, "tokens a step", kind="text to image")["mean"] > 4
    assert only(lines, "tokens a step", kind="image to image")["mean"] > 1.5
    shares = {line["of"]: line for line in all_of(lines, "right guesses")}
    assert {"preview", "image", "flat background", "edges", "letters"} == set(shares)
    assert sum(shares[name]["tokens"] for name in ("flat background", "edges", "letters")) == shares["image"]["tokens"]


@pytest.mark.full
def test_forced_guesses(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    lines = run(capsys, "speculation", *brief, "--prompts", 0)
    assert "different tokens" not in {line["measure"] for line in lines}
    assert len(all_of(lines, "step of windows")) == 9
    rates = {(line["running"], line["right"]): line["tokens_a_step"] for line in all_of(lines, "sequences")}
    assert rates[1, 0.8] > rates[1, 0.5] > rates[1, 0.0] >= 1
    assert rates[1, 0.5] == CLOSE(2, rel=0.25)


def test_dit(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    options = ["--profile", "--reference", "--difference", "--cache"]
    lines = run(capsys, "dit", *brief, *options) + run(capsys, "dit", *brief, "--quantization", "int8")
    check_ceiling(lines)
    pictures = all_of(lines, "picture, 12 steps, guidance 1.5", size="64x64")
    assert [line["quantization"] for line in pictures] == ["none", "int8"]
    for line in pictures:
        assert line["seconds"] > line["denoise_seconds"]
    exact, quantized = pictures
    assert exact["to_floor"] == CLOSE(exact["denoise_seconds"] / exact["floor_seconds"], rel=ROUNDED)
    assert "to_floor" not in quantized  # the measured rate is not that of 8 bits
    for line in all_of(lines, "host time of a step"):
        assert 0 < line["ms"] <= line["step_ms"]
    for line in all_of(lines, "cached picture, 12 steps, guidance 1.5, every step that may be"):
        assert 0 < line["cached_steps"] < 12
        assert line["block_work_share"] < 1
    for line in all_of(lines, "cached picture, 12 steps, guidance 1.5, none cached"):
        assert (line["cached_steps"], line["identical_to_exact"]) == (0, True)
    assert only(lines, "diffusers eager")["forward_ms"] > 0
    assert only(lines, "difference of the blocks")["ours_to_fp32"] < 1e-5
    assert any("addmm" in line["name"] for line in all_of(lines, "kernel", quantization="none"))


def test_quantized(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    lines = run(capsys, "quantized", *brief, "--quantization", "int8,fp8")
    check_ceiling(lines)
    products = all_of(lines, "product")
    assert {line["layer"] for line in products} == {"qkv", "out", "up", "down"}
    assert {line["function"] for line in products} >= {"bf16", "int8, sums alone"}
    error = only(lines, "difference of the blocks in 8 bits", quantization="int8")
    assert error["to_reference"] < error["to_exact"] < 0.1
    if not torch.cuda.is_available():
        assert "CPU" in only(lines, "difference of the blocks in 8 bits", quantization="fp8")["refused"]


def test_vae(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    lines = run(capsys, "vae", *brief, "--profile")
    check_ceiling(lines)
    decodes = {line["variant"]: line for line in all_of(lines, "vae decode", size="64x64")}
    assert {"fp32", "plain", "channels last", "in tiles"} <= set(decodes)
    assert all(line["largest_difference"] <= 8 for name, line in decodes.items() if name != "fp32")
    assert any("conv" in line["name"] for line in all_of(lines, "kernel", variant="plain"))


def test_i2i(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    lines = run(capsys, "i2i", *brief)
    check_ceiling(lines)
    assert [line["sources"] for line in all_of(lines, "vision tower and quantizer")] == [1, 2, 4]
    steps = {(line["sources"], line["guidance"]): line for line in all_of(lines, "step")}
    assert set(steps) == {(sources, guidance) for sources in (0, 1, 2) for guidance in (1.0, 1.5)}
    for (sources, guidance), line in steps.items():
        if sources:
            assert line["added_ms"] == CLOSE(line["ms"] - steps[0, guidance]["ms"], abs=0.01)
            assert line["added_attention_floor_ms"] > 0
    condition = only(lines, "condition, one source")
    assert condition["seconds"] * 1e3 == CLOSE(condition["vae_encode_ms"] + condition["rest_ms"], abs=0.1)
    assert condition["keys_and_values_gb"] > 0


def test_linears(capsys: pytest.CaptureFixture[str], checkpoint_folder: Path) -> None:
    lines = run(capsys, "linears", "--brief", "--checkpoint", checkpoint_folder)
    check_ceiling(lines)
    assert [line["name"] for line in all_of(lines, "linear")] == ["qkv", "out", "gate_up", "down", "head"]
    start = linears.START["split"].head
    tiles = list(linears.candidates("head", start, sweep=True))
    assert tiles[0] == start
    assert len(set(tiles)) == len(tiles) > 10


def test_linears_without_cuda(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert linears.main(["--brief", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == "error: device is cpu; allowed: a CUDA GPU, whose kernels these are\n"


def test_previews(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    lines = run(capsys, "previews", *brief, "--steps", 3)
    check_ceiling(lines)
    image, estimate = only(lines, "an image"), only(lines, "an estimate, on the engine's thread")
    assert image["whole_seconds"] > image["denoise_seconds"]
    assert (estimate["previews"], estimate["received"]) == (2, 2)
    preview = only(lines, "a preview, alone")
    assert preview["seconds"] >= preview["step_seconds"] + preview["decode_seconds"]
    for measure in ("an image with an estimate every step", "an image with a preview between its steps"):
        line = only(lines, measure)
        assert line["cost"] == CLOSE(line["denoise_seconds"] / line["without_seconds"] - 1, rel=ROUNDED, abs=1e-3)


def test_cancel(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    lines = run(capsys, "cancel", *brief)
    check_ceiling(lines)
    for measure in ("cancel to free slot", "cancel to answer in the queue", "cancel to free device"):
        line = only(lines, measure)
        assert line["median_ms"] <= line["worst_ms"]
        assert line["worst_steps"] == CLOSE(line["worst_ms"] / line["step_ms"], rel=ROUNDED)
    assert only(lines, "denoising")["steps"] == 50


def test_cancel_does_not_fill_the_memory_of_a_host(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    assert run(capsys, "cancel", *brief, "--device", "cpu", "--memory", code=2) == []


def test_bus(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "bus", "--brief")
    check_ceiling(lines)
    without = only(lines, "host's step without events")["us"]
    for subscribers in ("no subscriber", "a subscriber to one request", "a subscriber to each"):
        line = only(lines, f"a step's events, {subscribers}", requests=3)
        assert line["added_us"] == CLOSE(line["host_step_us"] - without, abs=0.1)


def test_parallel_on_one_device(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    lines = run(capsys, "parallel", *brief, "--device", "cpu")
    check_ceiling(lines)
    assert only(lines, "decode step", devices=1)["running"] == 8
    assert only(lines, "denoising step", devices=1, parallel="none")["speedup"] == 1


@pytest.mark.full
def test_parallel_on_two_devices(capsys: pytest.CaptureFixture[str], brief: list[object]) -> None:
    lines = run(capsys, "parallel", *brief, "--device", "cpu,cpu", "--parallel", "cfg=2")
    for measure, named in (("decode step", {"through": "collectives"}), ("denoising step", {"parallel": "cfg=2"})):
        alone, both = only(lines, measure, devices=1), only(lines, measure, devices=2, **named)
        assert both["speedup"] == CLOSE(alone["ms"] / both["ms"], rel=ROUNDED)


def test_ceilings(capsys: pytest.CaptureFixture[str]) -> None:
    check_ceiling(run(capsys, "ceilings", "--brief"))


class Event:
    """Is passed after a second by the test's clock."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock

    def synchronize(self) -> None:
        self._clock[0] += 1


def test_seconds_in_which_the_host_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("timing.time.perf_counter", lambda: clock[0])

    class Slow(CpuDevice):
        def record_event(self) -> DeviceEvent:
            return Event(clock)

    device = Slow(torch.device("cpu"))
    waits = DeviceWaits(device)
    device.record_event().synchronize()
    device.record_event().synchronize()
    assert waits.seconds == 2
