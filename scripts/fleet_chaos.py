#!/usr/bin/env python3
"""Disturbs a fleet repeatedly while clients send requests, and checks that every one gets its images once.

    fleet_chaos.py [--checkpoint DIR] [--seconds 60] [--ar 1] [--dit 2] [--clients 4] [--seed 0] [--no-namespaces]

A server of both stages generates the images first. Then pools behind Envoy and a gateway get requests for the same
images, by OpenAI's API, as jobs there, and by KServe's protocol. Meanwhile their processes are killed (SIGKILL) and
stopped (SIGSTOP), drained, added and restarted, and one is cut off the network, if namespaces can be made. Every
request must be answered once, with the same bytes. A client sends a request again only where it lost its connection
because the gateway was ended. At the end all processes and files of the fleet must be gone.

Prints the counts as a JSON object, and faults to standard error. The exit code is 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.servers import descendants, tiny_checkpoint
from glm_image.supervisor import ServerSettings, TritonServer
from local_fleet.faults import Disturbance, Faults
from local_fleet.fleet import FleetSettings, LocalFleet
from local_fleet.namespaces import NetworkNamespace
from local_fleet.state import retries_of, wait_whole
from local_fleet.traffic import Picture, Traffic, images_of

CALM_SECONDS = 3.0
"""The longest time between two disturbances."""


@dataclass
class Report:
    """The results of a run."""

    disturbances: list[Disturbance] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    retries: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, Any]:
        kinds = sorted({disturbance.kind for disturbance in self.disturbances})
        return {
            **self.counts,
            "disturbances": dict(Counter(disturbance.kind for disturbance in self.disturbances)),
            "slowest_recovery_seconds": {
                kind: round(max(found.seconds for found in self.disturbances if found.kind == kind), 1)
                for kind in kinds
            },
            # A gateway that was ended took its own with it.
            "retries": dict(self.retries),
            "faults": len(self.faults),
        }


def run(settings: FleetSettings, expected: dict[Picture, list[str]], flags: argparse.Namespace) -> Report:
    """Runs a fleet and disturbs it until the time is over, each kind of disturbance at least once."""
    report, rng = Report(), random.Random(flags.seed)
    log = (Path(os.devnull) if flags.log is None else flags.log).open("w")
    with contextlib.ExitStack() as stack:
        stack.callback(log.close)
        namespaces = {}
        if not flags.no_namespaces:
            try:
                namespaces["dit-0"] = stack.enter_context(NetworkNamespace(flags.seed % 250))
            except OSError as error:
                print(f"no member is cut off: {error}", file=sys.stderr)
        places = {name: namespace.place for name, namespace in namespaces.items()}
        fleet = stack.enter_context(LocalFleet(settings, lambda line: print(line, file=log, flush=True), places))
        folder = fleet.folder
        traffic = Traffic(fleet.url, fleet.grpc_url, expected, flags.clients, flags.seed)
        faults = Faults(fleet, traffic, flags.seed, namespaces)
        wait_whole(fleet, "the start")
        with traffic:
            _disturb(faults, fleet, report, rng, flags.seconds)
        report.faults += traffic.faults
        report.counts = traffic.counts()
    if left := descendants(os.getpid())[1:]:
        report.faults.append(f"processes are left: {left}")
    if folder.exists():
        report.faults.append(f"files are left: {folder}")
    return report


def _disturb(faults: Faults, fleet: LocalFleet, report: Report, rng: random.Random, seconds: float) -> None:
    end, waiting = time.monotonic() + seconds, list[str]()
    seen: set[str] = set()
    before: Counter[str] = Counter()
    while time.monotonic() < end or set(faults.kinds) - seen:
        if not waiting:
            waiting = rng.sample(sorted(faults.kinds), len(faults.kinds))
        kind = waiting.pop()
        time.sleep(rng.uniform(0, CALM_SECONDS))
        found = faults.disturb(kind)
        after = Counter(retries_of(fleet))
        report.retries += after if "gateway" in kind else after - before
        before = after
        report.disturbances.append(found)
        seen.add(kind)
        print(f"{found.seconds:6.1f} s  {found.kind}: {found.detail}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Disturbs a fleet repeatedly and checks every answer.")
    parser.add_argument("--checkpoint", type=Path, help="default: a tiny one of random weights")
    parser.add_argument("--seconds", type=float, default=60.0, help="of disturbances (default: %(default)g)")
    parser.add_argument("--ar", type=int, default=1, help="members of glm_ar (default: %(default)s)")
    parser.add_argument("--dit", type=int, default=2, help="members of glm_dit (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=4, help="requests at the same time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: %(default)s)")
    parser.add_argument("--no-namespaces", action="store_true", help="cut no member off the network")
    parser.add_argument("--log", type=Path, help="file for the log of all processes (default: none)")
    flags = parser.parse_args()
    # The order of a sum, and so its last bits, depends on the number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_checkpoint(Path(folder)) if flags.checkpoint is None else flags.checkpoint.absolute()
        with TritonServer(ServerSettings(checkpoint, drain_seconds=5)) as server:
            expected = images_of(server.grpc_url)
        report = run(FleetSettings(checkpoint, flags.ar, flags.dit, spare=1, drain_seconds=60), expected, flags)
    for fault in report.faults:
        print(fault, file=sys.stderr)
    print(json.dumps(report.as_json(), indent=2))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
