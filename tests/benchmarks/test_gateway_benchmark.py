"""The gateway's benchmark runs, briefly, and its figures are consistent."""

from __future__ import annotations

import pytest

from benchmarks.lines import only, run


def test_gateway(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "gateway", "--brief")
    overhead, memory = only(lines, "overhead"), only(lines, "memory")
    assert overhead["requests"] == 10
    assert overhead["base64_bytes"] > 4_000_000
    added = overhead["gateway_p50_seconds"] - overhead["triton_grpc_p50_seconds"]
    assert overhead["added_to_triton_grpc_p50_seconds"] == pytest.approx(added, abs=1e-3)
    assert (memory["idle_connections"], memory["waiting_requests"], memory["failed"]) == (20, 4, 0)
    assert 30e6 < memory["resident_bytes"] <= memory["peak_bytes"]
