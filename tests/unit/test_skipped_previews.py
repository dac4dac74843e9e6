"""Intermediate images that cannot be made as asked: tokens beyond the codebook, and the reason where there is none."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from glm_image.dit.metrics import REPLACED_PREVIEW_TOKENS
from glm_image.dit.previews import within_codebook
from glm_image.dit.scheduler import Scheduler
from glm_image.errors import (
    DeadlineExceededError,
    DeviceMemoryError,
    GlmImageError,
    InvalidInputError,
    QueueFullError,
)
from glm_image.ipc.protocol import Message
from glm_image.ipc.server import IpcServer
from glm_image.lifecycle.context import RequestContext, RequestObserver
from glm_image.lifecycle.events import EventBuilder
from glm_image.lifecycle.preview_rpc import (
    IntermediateImage,
    PreviewSkippedError,
    error_reply,
    reply_with_preview,
    request_preview,
)
from glm_image.pipeline import LocalPipeline
from glm_image.request.geometry import Grid, Size
from glm_image.request.limits import DEFAULT_LIMITS
from glm_image.request.parameters import PaintRequest
from unit.test_previews import Counts

SIZE = 100
TOO_MUCH = 1 << 50


@pytest.mark.parametrize(
    ("grid", "ids", "expected"),
    [
        (Grid(1, 3), [1, SIZE, SIZE + 1], [1, 1, 1]),
        (Grid(1, 4), [1, SIZE, SIZE, 2], [1, 1, 2, 2]),
        (Grid(2, 2), [SIZE, 5, 6, SIZE], [5, 5, 6, 5]),
        (Grid(3, 1), [-1, 99, 7], [99, 99, 7]),
        (Grid(1, 2), [SIZE, SIZE], [0, 0]),
        (Grid(2, 2), [1, 2, 3, 99], [1, 2, 3, 99]),
    ],
)
def test_an_id_beyond_the_codebook_becomes_its_nearest_neighbour(
    grid: Grid, ids: list[int], expected: list[int]
) -> None:
    replaced, count = within_codebook(np.array([ids], np.int32), grid, SIZE)
    assert replaced.tolist() == [expected]
    assert count == sum(not 0 <= token < SIZE for token in ids)


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_valid_ids_are_kept_and_all_are_valid_in_the_end(height: int, width: int, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(-2, 2 * SIZE), min_size=height * width, max_size=height * width))
    given_ids = np.array([ids], np.int32)
    replaced, _ = within_codebook(given_ids, Grid(height, width), SIZE)
    assert given_ids.tolist() == [ids]
    is_valid = (given_ids >= 0) & (given_ids < SIZE)
    assert (replaced[is_valid] == given_ids[is_valid]).all()
    assert replaced.min() >= 0
    assert replaced.max() < SIZE
    assert replaced.dtype == np.int32


def test_the_engine_renders_a_preview_with_tokens_beyond_the_codebook(
    pipeline: LocalPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, counts = pipeline.dit.codebook_size, Counts()
    monkeypatch.setattr(pipeline.dit, "_record", counts.record)

    def preview(*ids: int) -> NDArray[np.uint8]:
        tokens = np.array([ids], np.int32)
        request = PaintRequest("a", tokens, Grid(2, 2), Size(64, 64), (3,), num_inference_steps=1)
        return pipeline.dit.preview(RequestContext(), request, DEFAULT_LIMITS).result(60).pixels

    np.testing.assert_array_equal(preview(size, 5, 6, size + 2), preview(5, 5, 6, 5))
    assert counts == {REPLACED_PREVIEW_TOKENS.name: 2}
    with pytest.raises(InvalidInputError, match="number of columns is 3"):
        preview(1, 2, size)


def future(error: Exception) -> Callable[[Message], Future[Message]]:
    def handle(_: Message) -> Future[Message]:
        preview: Future[IntermediateImage] = Future()
        reply: Future[Message] = Future()
        preview.add_done_callback(lambda done: reply_with_preview(reply, done))
        preview.set_exception(error)
        return reply

    return handle


@pytest.mark.parametrize(
    ("handler", "reason", "message"),
    [
        (lambda _: error_reply(QueueFullError("too busy")), "busy", "too busy"),
        (lambda _: error_reply(InvalidInputError("wrong")), "error", "wrong"),
        (lambda _: Message({"never": 1 / 0}), "error", "ZeroDivisionError: division by zero"),
        (future(DeadlineExceededError("too late")), "deadline", "too late"),
        (future(DeviceMemoryError("too large")), "memory", "too large"),
        (future(ValueError()), "error", "ValueError"),
    ],
)
def test_the_caller_of_a_preview_gets_the_reason_why_there_is_none(
    tmp_path: Path, handler: Callable[[Message], Message], reason: str, message: str
) -> None:
    server = IpcServer()
    server.start(tmp_path, "glm_dit_0", {"preview": handler}, lambda key, listens: None)
    try:
        with pytest.raises(PreviewSkippedError, match=f"^{message}$") as skipped:
            request_preview(tmp_path, "fox-1", {}, {})
    finally:
        server.close()
    published = {"stage": "decode", "done": 3, "total": 9}
    assert EventBuilder("fox-1", 1).skipped(published, skipped.value.fields()) == {
        "event": "preview_skipped",
        "request_id": "fox-1",
        "stage": "decode",
        "done": 3,
        "total": 9,
        "eta": None,
        "reason": reason,
        "message": message,
    }


def test_without_an_instance_there_is_a_reason_too(tmp_path: Path) -> None:
    with pytest.raises(PreviewSkippedError, match=r"^no instance of glm_dit is running$") as skipped:
        request_preview(tmp_path, "fox-1", {}, {})
    assert skipped.value.reason == "error"


class Skipped(RequestObserver):
    def __init__(self) -> None:
        self.errors: list[GlmImageError] = []

    def latent_preview_skipped(self, context: RequestContext, error: GlmImageError) -> None:
        self.errors.append(error)


def test_a_latent_preview_without_memory_is_skipped_and_the_image_is_the_same(
    pipeline: LocalPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, skipped = pipeline.dit.executor.run, Skipped()
    tokens = np.zeros((1, 4), np.int32)
    request = PaintRequest("a", tokens, Grid(2, 2), Size(64, 64), (3,), num_inference_steps=4)
    scheduler = Scheduler(run)
    expected = scheduler.decode(RequestContext(), scheduler.denoise(RequestContext(), request))
    monkeypatch.setattr(
        pipeline.dit.executor, "_estimate", lambda image: torch.empty(TOO_MUCH, dtype=torch.uint8), raising=True
    )
    context = RequestContext(latent_preview_every=1, observers=(skipped,))
    pixels = scheduler.decode(context, scheduler.denoise(context, replace(request)))
    np.testing.assert_array_equal(pixels, expected)
    assert [str(error).partition(":")[0] for error in skipped.errors] == [
        "out of memory on cpu during a latent preview of an image of 64 x 64"
    ] * 3
