"""The parts of a fleet that need no server: its processes, and Envoy's configuration."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="the extra fleet is not installed")

from glm_image.errors import ConfigurationError
from glm_image.supervisor.restarts import RestartPolicy
from local_fleet.certificates import Authority
from local_fleet.envoy import Tls, write_bootstrap, write_members
from local_fleet.fleet import FleetSettings, LocalFleet, envoy_program
from local_fleet.processes import FleetError, KeptProcess

SECONDS = 60
POLICY = RestartPolicy(max_restarts=1, first_seconds=0.01)


def kept(script: str, log: list[str] | None = None) -> KeptProcess:
    lines = [] if log is None else log
    return KeptProcess("member", ["bash", "-c", script], os.environ, lines.append, policy=POLICY)


def wait_gone(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], SECONDS)[0]
    finally:
        os.close(descriptor)


class TestKeptProcess:
    def test_it_is_started_again_when_it_is_killed(self) -> None:
        log: list[str] = []
        process = kept("echo 'ready: here'; exec sleep 1000", log)
        process.start()
        assert process.wait_ready() == "ready: here"
        first = process.pid
        process.send(signal.SIGKILL)
        assert process.wait_restarted(1) == "ready: here"
        assert process.pid != first
        process.request_stop()
        process.wait_ended(SECONDS)
        assert (process.starts, process.failure) == (2, None)
        assert log == ["ready: here", "restart 1 of 1 in 0.01 s: member ended with code -9", "ready: here"]
        wait_gone(process.pid)

    def test_it_fails_when_it_breaks_too_often(self) -> None:
        process = kept("echo 'ready: here'; exit 3")
        process.start()
        process.wait_ended(SECONDS)
        assert str(process.failure) == "member ended with code 3; restarts in a row before: 1"

    def test_a_start_that_fails_has_the_reason(self) -> None:
        process = kept("echo 'error: --checkpoint is x; allowed: a folder' >&2; echo more; exit 2")
        process.start()
        reason = "member ended with code 2 while starting: error: --checkpoint is x; allowed: a folder"
        with pytest.raises(FleetError, match=reason):
            process.wait_ready()
        process.wait_ended(SECONDS)
        assert process.starts == 1

    def test_an_end_on_request_is_no_failure(self) -> None:
        process = kept("trap 'exit 0' TERM; echo 'ready: here'; while :; do sleep 0.01; done")
        process.start()
        process.wait_ready()
        process.send(signal.SIGTERM)  # from elsewhere
        process.wait_ended(SECONDS)
        assert (process.starts, process.failure, process.has_ended) == (1, None, True)

    def test_a_restart_on_request_counts_as_no_failure(self) -> None:
        process = kept("echo 'ready: here'; exec sleep 1000")
        process.start()
        for starts in range(1, 4):
            process.wait_ready()
            process.restart()
            process.wait_restarted(starts)
        process.request_stop()
        process.wait_ended(SECONDS)
        assert (process.starts, process.failure) == (4, None)

    def test_it_ends_with_its_parent(self) -> None:
        program = (
            "import os, sys; from local_fleet.processes import KeptProcess\n"
            "kept = KeptProcess('member', ['bash', '-c', 'echo ready: $$; exec sleep 1000'], os.environ, print)\n"
            "kept.start(); kept.wait_ready(); sys.stdout.flush(); os.kill(os.getpid(), 9)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        wait_gone(int(done.stdout.split()[1]))


@pytest.mark.parametrize("with_tls", [False, True])
def test_envoy_accepts_its_configuration(tmp_path: Path, with_tls: bool) -> None:
    try:
        program = envoy_program()
    except ConfigurationError as error:
        pytest.skip(str(error))
    authority = Authority(tmp_path / "certificates")
    tls = Tls(authority.issue("envoy"), authority.certificate) if with_tls else None
    for pool in ("ar", "dit"):
        tmp_path.joinpath("envoy").mkdir(exist_ok=True)
        write_members(tmp_path / "envoy", pool, [("127.0.0.1", 8001), ("127.0.0.2", 8001)])
    write_bootstrap(tmp_path / "envoy", 7001, 7000, ("ar", "dit"), tls)
    command = [str(program), "-c", str(tmp_path / "envoy" / "envoy.json"), "--mode", "validate"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_members_are_replaced_by_rename(tmp_path: Path) -> None:
    write_members(tmp_path, "dit", [("127.0.0.1", 8001)])
    before = (tmp_path / "dit.json").stat().st_ino
    write_members(tmp_path, "dit", [("127.0.0.1", 8002), ("10.0.0.2", 8001)])
    assert (tmp_path / "dit.json").stat().st_ino != before
    (assignment,) = json.loads((tmp_path / "dit.json").read_text())["resources"]
    (group,) = assignment["endpoints"]
    members = [endpoint["metadata"]["filter_metadata"]["envoy.lb"] for endpoint in group["lb_endpoints"]]
    assert members == [{"member": "127.0.0.1:8002"}, {"member": "10.0.0.2:8001"}]
    assert {path.name for path in tmp_path.iterdir()} == {"dit.json"}


@pytest.mark.parametrize(
    ("counts", "message"), [({"ar": 0}, "--ar is 0; allowed: 1 or more"), ({"dit": -1}, "--dit is -1; allowed: 1")]
)
def test_pools_need_members(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LocalFleet(FleetSettings(tmp_path, **counts), print)
