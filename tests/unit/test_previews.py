from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from glm_image.dit import latent_preview
from glm_image.dit.commands import Drop, Estimate, Prepare, Step
from glm_image.dit.metrics import DROPPED_PREVIEWS, PREVIEWS
from glm_image.dit.previews import MAX_WAITING, Previews
from glm_image.dit.scheduler import Scheduler
from glm_image.errors import CancelledError, DeadlineExceededError, QueueFullError, UnavailableError
from glm_image.lifecycle.context import ProgressCallback, RequestContext
from glm_image.pipeline import LocalPipeline
from glm_image.request.parameters import PaintRequest
from glm_image.telemetry.metrics import MetricSpec
from unit.test_dit_scheduler import STEPS, WAIT_SECONDS, Executor, kinds, request


class Counts(dict[str, float]):
    def record(self, measure: MetricSpec, value: float, times: int = 1, /) -> None:
        self[measure.name] = self.get(measure.name, 0.0) + value


@pytest.fixture
def scheduler() -> Iterator[tuple[Scheduler, Executor, Counts]]:
    executor, counts = Executor(), Counts()
    made = Scheduler(executor.run, counts.record)
    yield made, executor, counts
    made.previews.close()


def test_preview_is_rendered_while_the_device_is_idle(scheduler: tuple[Scheduler, Executor, Counts]) -> None:
    made, executor, counts = scheduler
    assert made.previews.submit(RequestContext(), request(9)).result(WAIT_SECONDS).ravel().tolist() == [9, 9, 9]
    assert kinds(executor) == ["Prepare", *["Step"] * STEPS, "Decode", "Drop"]
    assert counts[PREVIEWS.name] == 1
    assert executor.images == {}


def test_preview_is_rendered_between_two_steps_of_a_request(scheduler: tuple[Scheduler, Executor, Counts]) -> None:
    made, executor, _ = scheduler
    previews: list[Any] = []

    def ask_once(command: object) -> None:
        if isinstance(command, Step) and not previews:
            previews.append(None)
            previews[0] = made.previews.submit(RequestContext(), request(9))

    executor.before = ask_once
    made.denoise(RequestContext(), request(1))
    assert previews[0].result(0).ravel().tolist() == [9, 9, 9]
    ours = [getattr(command, "image", None) for command in executor.commands]
    assert ours == [0, 0, *[1] * (STEPS + 3), *[0] * (STEPS - 1)]


def test_full_queue_refuses_previews_and_close_fails_those_that_wait() -> None:
    counts, device = Counts(), threading.Lock()
    previews = Previews(lambda context, request: np.zeros((1, 1, 3), np.uint8), device, counts.record)
    with previews.requests_first():
        waiting = [previews.submit(RequestContext(), request(1)) for _ in range(MAX_WAITING)]
        with pytest.raises(QueueFullError):
            previews.submit(RequestContext(), request(1))
        assert counts == {DROPPED_PREVIEWS.name: 1}
        previews.close()
    for preview in waiting:
        with pytest.raises(UnavailableError):
            preview.result(0)
    with pytest.raises(UnavailableError):
        previews.submit(RequestContext(), request(1))


def test_previews_between_steps_keep_to_their_share_of_the_time() -> None:
    def render(context: RequestContext, request: PaintRequest) -> NDArray[np.uint8]:
        clock[0] += 2.0
        return np.zeros((1, 1, 3), np.uint8)

    clock = [0.0]
    previews = Previews(render, threading.Lock(), Counts().record)
    with pytest.MonkeyPatch.context() as patch, previews.requests_first():
        patch.setattr("glm_image.dit.previews.time.monotonic", lambda: clock[0])
        first = previews.submit(RequestContext(), request(1))
        previews.between_steps(0.1)
        assert first.done()
        with pytest.raises(QueueFullError):
            previews.submit(RequestContext(), request(1))
        for _ in range(3):
            previews.between_steps(10.0)
        second = previews.submit(RequestContext(), request(1))
        previews.between_steps(0.1)
        assert second.done()
    previews.close()


@pytest.mark.parametrize(
    ("context", "error"),
    [(RequestContext(deadline_ns=1), DeadlineExceededError), (RequestContext(), CancelledError)],
    ids=["late", "cancelled"],
)
def test_late_and_cancelled_previews_are_dropped(
    scheduler: tuple[Scheduler, Executor, Counts], context: RequestContext, error: type[Exception]
) -> None:
    made, executor, counts = scheduler
    if error is CancelledError:
        context.cancel()
    with pytest.raises(error):
        made.previews.submit(context, request(9)).result(WAIT_SECONDS)
    assert kinds(executor) == ["Drop"]
    assert counts == {DROPPED_PREVIEWS.name: 1}


def test_every_nth_step_but_the_last_publishes_a_latent_preview() -> None:
    executor, shown = Executor(), list[int]()

    def run(command: Any) -> Any:
        is_shown = isinstance(command, Estimate)
        result = np.zeros((1, 1, 3), np.uint8) if is_shown else executor.run(command)
        if is_shown:
            shown.append(sum(isinstance(earlier, Step) for earlier in executor.commands))
        return result

    context = RequestContext(latent_preview_every=1)
    Scheduler(run).denoise(context, request(1, 2))
    assert shown == [1, 2, STEPS + 1, STEPS + 2]
    steps = [command for command in executor.commands if isinstance(command, Step)]
    assert [step.for_estimate for step in steps] == [True, True, False] * 2


def test_latent_preview_inverts_a_linear_encoder() -> None:
    mixing = torch.tensor(np.random.default_rng(1).normal(size=(3, 16)), dtype=torch.float32)

    def encode(pixels: NDArray[np.uint8]) -> torch.Tensor:
        height, width, _ = pixels.shape
        squares = torch.from_numpy(pixels).float().reshape(height // 8, 8, width // 8, 8, 3).mean(dim=(1, 3))
        return ((squares / 255 - 0.5) @ mixing).permute(2, 0, 1)[None]

    found = latent_preview.fit(encode)
    picture = np.random.default_rng(2).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(found(encode(picture.repeat(8, axis=0).repeat(8, axis=1))), picture)


def test_latent_preview_on_a_straight_path_is_its_end(pipeline: LocalPipeline) -> None:
    """With x = clean + sigma * noise on both ends of a step, the latent preview is that of the clean latents."""
    executor = pipeline.dit.executor
    paint_request = request(3)
    tokens = paint_request.prior_token_ids[0] * 0
    levels = executor.run(Prepare(-7, (), (), tokens, paint_request.grid, 4, 1.5, seed=0))
    assert isinstance(levels, np.ndarray)
    executor.run(Step(-7))
    executor.run(Step(-7, for_estimate=True))
    image = executor._images[-7]
    clean, noise = torch.randn_like(image.latents), torch.randn_like(image.latents)
    image.previous = clean + float(levels[1]) * noise
    image.latents = clean + float(levels[2]) * noise
    difference = executor.run(Estimate(-7)).astype(int) - executor._vae.preview(clean)  # type: ignore[union-attr]
    assert abs(difference).max() <= 1
    executor.run(Drop(-7))


def test_previews_between_steps_do_not_change_the_image(pipeline: LocalPipeline) -> None:
    base = request(3)
    paint_request = PaintRequest("a", base.prior_token_ids * 0, base.grid, base.requested, (3,), num_inference_steps=4)
    run = pipeline.dit.executor.run
    alone, busy = Scheduler(run), Scheduler(run)
    expected = alone.decode(RequestContext(), alone.denoise(RequestContext(), paint_request))
    context = RequestContext(latent_preview_every=1)
    context.add_observer(ProgressCallback(lambda _: busy.previews.submit(RequestContext(), paint_request)))
    began = time.monotonic()
    pixels = busy.decode(context, busy.denoise(context, paint_request))
    assert time.monotonic() - began < WAIT_SECONDS
    busy.previews.close()
    np.testing.assert_array_equal(pixels, expected)
