from __future__ import annotations

import time

import pytest

from glm_image.errors import CancelledError, DeadlineExceededError
from glm_image.job import Job, Progress


def test_a_job_goes_on_until_it_is_cancelled() -> None:
    job = Job(id="mine")
    job.check()
    job.cancel()
    with pytest.raises(CancelledError, match="mine"):
        job.check()


def test_a_timeout_becomes_a_deadline() -> None:
    before = time.monotonic_ns()
    job = Job.with_timeout("mine", 5_000_000)
    assert before + 5 * 10**9 <= job.deadline_ns <= time.monotonic_ns() + 5 * 10**9
    job.check()
    job.deadline_ns = time.monotonic_ns() - 1
    with pytest.raises(DeadlineExceededError, match="mine"):
        job.check()


def test_no_timeout_is_no_deadline_and_no_id_is_a_new_one() -> None:
    jobs = [Job.with_timeout("", 0) for _ in range(2)]
    assert [job.deadline_ns for job in jobs] == [0, 0]
    assert jobs[0].id != jobs[1].id
    assert all(job.id for job in jobs)
    jobs[0].check()


def test_seconds_add_up_and_are_kept_when_a_stage_fails() -> None:
    job = Job()
    job.add_seconds("decode", 1.5)
    job.add_seconds("decode", 0.25)
    with pytest.raises(RuntimeError), job.timed("vae"):
        raise RuntimeError
    assert job.seconds["decode"] == 1.75
    assert job.seconds["vae"] >= 0


def test_progress_reaches_the_sink() -> None:
    seen: list[Progress] = []
    Job(on_progress=seen.append).report("tokens", 3, 8)
    assert seen == [Progress("tokens", 3, 8)]
