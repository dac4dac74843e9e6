from __future__ import annotations

import json
from typing import Any

import pytest

from glm_image.ipc.protocol import Event
from glm_image.lifecycle.context import LATEST_DEADLINE_NS
from glm_image.lifecycle.events import ORDER, DitSecondsByKind, EventBuilder
from glm_image.lifecycle.stream_options import StreamOptions
from glm_image.request.geometry import Grid, output_grids, preview_of


def told(stage: str, done: int, total: int = 10, state: str = "running", arrived_ns: int = 7) -> Event:
    return {"stage": stage, "done": done, "total": total, "state": state, "arrived_ns": arrived_ns}


def test_what_is_over_is_not_told_again() -> None:
    story = EventBuilder("me", 7)
    assert story.progress(told("prefill", 1))
    assert story.progress(told("tokens", 5))
    assert story.progress(told("tokens", 5)) is None
    assert story.progress(told("prefill", 2)) is None
    assert story.progress(told("denoise", 1))
    assert story.progress(told("tokens", 9, state="handed_on")) is None
    assert story.progress(told("denoise", 2, state="cancelled")) is None


def test_between_the_stages_it_is_queued() -> None:
    event = EventBuilder("me", 7).progress(told("tokens", 10, state="handed_on"))
    assert event is not None
    assert (event["event"], event["stage"], event["done"], event["total"]) == ("queued", "dit_queue", 0, 1)


def test_each_stage_has_its_kind() -> None:
    story = EventBuilder("me", 7)
    events = [story.progress(told(stage, 1)) for stage in ORDER]
    assert [event["event"] for event in events if event] == [
        "queued",
        "prefill",
        "tokens",
        "queued",
        "denoise",
        "denoise",
    ]


def test_another_request_of_the_same_id_is_another_story() -> None:
    story = EventBuilder("me", 7)
    assert story.is_about(told("tokens", 1))
    assert not story.is_about(told("tokens", 1, arrived_ns=8))


def test_what_is_left_goes_by_the_pace_and_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("glm_image.lifecycle.events.time.monotonic", lambda: clock[0])
    for known, expected in ((None, 3.0), (20.0, 23.0)):
        story = EventBuilder("me", 7, known)
        first = story.progress(told("tokens", 1))
        clock[0] += 2.0
        second = story.progress(told("tokens", 5, total=11))
        assert first is not None
        assert first["eta"] is None
        assert second is not None
        assert second["eta"] == expected
        third = story.progress(told("denoise", 2))
        clock[0] += 1.0
        fourth = story.progress(told("denoise", 3))
        assert third is not None
        assert fourth is not None
        assert fourth["eta"] == 7.0


def test_the_latest_time_of_a_kind_is_known() -> None:
    times = DitSecondsByKind()
    assert times.of("a") is None
    for seconds in (1.0, 2.0):
        times.note("a", seconds)
    assert times.of("a") == 2.0
    for index in range(300):
        times.note(index, 0.0)
    assert times.of("a") is None


FOLLOWED = StreamOptions(arrived_ns=5, previews=True, pictures_every=3)


def test_following_is_a_parameter() -> None:
    parameters = json.dumps({**FOLLOWED.parameters(), "other": 1})
    assert StreamOptions.read(parameters) == FOLLOWED
    assert StreamOptions.is_asked(parameters)
    assert not StreamOptions.is_asked('{"timeout": 5}')


BROKEN: list[Any] = ["", "[]", "{}", '{"follow": 5}', '{"follow": "5"}', '{"follow": "{"}', '{"follow": "[1]"}']


@pytest.mark.parametrize("parameters", BROKEN)
def test_parameters_of_others_ask_for_nothing(parameters: str) -> None:
    assert StreamOptions.read(parameters) == StreamOptions()


@pytest.mark.parametrize("value", [-1, True, 1.5, "1", LATEST_DEADLINE_NS + 1])
def test_numbers_that_are_none_are_left_out(value: object) -> None:
    given = {"arrived_ns": value, "previews": 1, "pictures_every": value}
    assert StreamOptions.read(json.dumps({"follow": json.dumps(given)})) == StreamOptions()


@pytest.mark.parametrize(
    ("target", "expected"), [(Grid(32, 32), Grid(16, 16)), (Grid(22, 22), None), (Grid(1, 1), None)]
)
def test_a_preview_is_worth_it_below_half_of_the_picture(target: Grid, expected: Grid | None) -> None:
    assert preview_of(output_grids(target, image_to_image=False)) == expected
    assert preview_of(output_grids(target, image_to_image=True)) is None
