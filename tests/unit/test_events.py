from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from glm_image.ipc.protocol import Event
from glm_image.lifecycle.events import KINDS, EventBuilder
from glm_image.request.geometry import Grid, output_grids, preview_of
from glm_image_client import GenerationResult, Metadata, StreamEvent
from glm_image_client.cli.progress import watch


def published(stage: str, done: int, total: int = 10, state: str = "running", arrived_ns: int = 7) -> Event:
    return {"stage": stage, "done": done, "total": total, "state": state, "arrived_ns": arrived_ns}


def test_progress_never_goes_back() -> None:
    builder = EventBuilder("me", 7)
    assert builder.progress(published("prefill", 1))
    assert builder.progress(published("decode", 5))
    assert builder.progress(published("decode", 5)) is None
    assert builder.progress(published("prefill", 2)) is None
    assert builder.progress(published("denoise", 1))
    assert builder.progress(published("decode", 9, state="forwarded")) is None
    assert builder.progress(published("denoise", 2, state="cancelled")) is None


def test_a_forwarded_request_is_queued_for_the_dit() -> None:
    event = EventBuilder("me", 7).progress(published("decode", 10, state="forwarded"))
    assert event is not None
    assert (event["event"], event["stage"], event["done"], event["total"]) == ("queued", "dit_queue", 0, 1)


def test_each_stage_has_its_kind_of_event() -> None:
    builder = EventBuilder("me", 7)
    events = [builder.progress(published(stage, 1)) for stage in KINDS]
    assert [event["event"] for event in events if event] == [
        "queued",
        "prefill",
        "decode",
        "queued",
        "denoise",
        "denoise",
    ]


def test_events_of_another_request_of_the_same_id_are_distinguished() -> None:
    builder = EventBuilder("me", 7)
    assert builder.is_about(published("decode", 1))
    assert not builder.is_about(published("decode", 1, arrived_ns=8))


def test_eta_extrapolates_the_stage_and_adds_the_dit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("glm_image.lifecycle.events.time.monotonic", lambda: clock[0])
    for known, expected in ((None, 3.0), (20.0, 23.0)):
        builder = EventBuilder("me", 7, known)
        first = builder.progress(published("decode", 1))
        clock[0] += 2.0
        second = builder.progress(published("decode", 5, total=11))
        assert first is not None
        assert first["eta"] is None
        assert second is not None
        assert second["eta"] == expected
        third = builder.progress(published("denoise", 2))
        clock[0] += 1.0
        fourth = builder.progress(published("denoise", 3))
        assert third is not None
        assert fourth is not None
        assert fourth["eta"] == 7.0


@pytest.mark.parametrize("name", ["decode", "tokens"])
def test_client_accepts_the_old_name_of_decode(name: str) -> None:
    published = {"event": name, "stage": name, "request_id": "me", "done": 1, "total": 2, "seconds": 0.5, "eta": None}
    outputs = {"event": np.array([json.dumps(published).encode()]), "images_base64": np.array([], dtype=object)}
    event = StreamEvent.from_outputs(outputs)
    assert (event.kind, event.stage, event.done, event.files) == ("decode", "decode", 1, [])


def skipped_event() -> StreamEvent:
    published = {"stage": "decode", "done": 1, "total": 2}
    event = EventBuilder("me", 7).skipped(published, {"reason": "busy", "message": "glm_dit is too busy"})
    outputs = {"event": np.array([json.dumps({**event, "seconds": 0.5}).encode()]), "images_base64": np.array([])}
    return StreamEvent.from_outputs(outputs)


def test_client_reads_why_a_preview_is_not_made() -> None:
    event = skipped_event()
    assert (event.kind, event.stage, event.files) == ("preview_skipped", "decode", [])
    assert (event.reason, event.message) == ("busy", "glm_dit is too busy")


def test_the_command_prints_why_a_preview_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = GenerationResult(Metadata())
    last = StreamEvent("image", "me", "done", 1, 1, 1.0, result=result)
    assert watch([skipped_event(), last], has_bar=False, preview_dir=tmp_path).result is result
    assert capsys.readouterr().err == "no preview (busy): glm_dit is too busy\n"


@pytest.mark.parametrize(
    ("target", "expected"), [(Grid(32, 32), Grid(16, 16)), (Grid(22, 22), None), (Grid(1, 1), None)]
)
def test_a_preview_is_made_below_half_of_the_images_area(target: Grid, expected: Grid | None) -> None:
    assert preview_of(output_grids(target, image_to_image=False)) == expected
    assert preview_of(output_grids(target, image_to_image=True)) is None
