"""Chaos, a short time and a long one; both take too long for every run."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos import Chaos, Report

SHORT_SECONDS, LONG_SECONDS = 4, 600


def check(report: Report) -> None:
    counts = report.counts()
    print(counts)
    assert report.faults == []
    assert {blow.signal for blow in report.blows} == {"SIGKILL", "SIGSTOP"}
    endings = counts["endings"]
    assert endings["good"]["picture"] > 0
    assert endings["good"]["closed"] + endings["good"].get("failed", 0) > 0


@pytest.mark.full
def test_a_broken_server_answers_everybody(tiny_checkpoint: Path, same_threads: None) -> None:
    check(Chaos(tiny_checkpoint, seed=1).run(SHORT_SECONDS, clients=3))


@pytest.mark.full
def test_a_server_that_is_broken_for_long(tiny_checkpoint: Path, same_threads: None) -> None:
    report = Chaos(tiny_checkpoint, seed=2).run(LONG_SECONDS, clients=4)
    check(report)
    assert all(report.counts()["endings"].values())
