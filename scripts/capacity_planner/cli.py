"""The command line of ``scripts/plan``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capacity_planner.fleet_cli import plan_fleet
from glm_image.errors import GlmImageError, printable

EXIT_DONE, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2
NOT_MEASURED = "no NPU has been measured: these times are a prediction"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="plan",
        description="Estimates every profile on a machine, recommends one. `plan fleet` simulates pools of many cards.",
    )
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="cards of the machine")
    parser.add_argument("--memory", type=float, required=True, metavar="GB", help="of each card, in 10^9 bytes")
    parser.add_argument("--kind", choices=("npu", "cuda"), default="npu", help="of the cards (default: %(default)s)")
    parser.add_argument("--size", default="1024x1024", metavar="WxH", help="of the images (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="denoising steps (default: %(default)s)")
    parser.add_argument("--measured", type=Path, nargs="+", default=[], metavar="FILE", help="output of scripts/bench")
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="simulated per load (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    flags = None if given[:1] == ["fleet"] else parse_arguments(given)
    if importlib.util.find_spec("simpy") is None:
        print("error: the package simpy is not installed; install this project with its extra 'plan'", file=sys.stderr)
        return EXIT_REFUSED
    try:
        if flags is None:
            print(plan_fleet(given[1:]))
            return EXIT_DONE
        report = plan(flags)
    except GlmImageError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return EXIT_REFUSED
    print(json.dumps(report, indent=2) if flags.json else "\n".join(_lines(report)))
    return EXIT_DONE if report["recommended"] else EXIT_FAILED


def plan(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the report as plain values; raises ConfigurationError for a flag's value."""
    # These import torch and simpy, for which a refused flag should not wait.
    from capacity_planner import planner, times  # noqa: PLC0415
    from glm_image.errors import ConfigurationError  # noqa: PLC0415
    from glm_image.request.geometry import generated_size  # noqa: PLC0415

    for name, low in (("devices", 1), ("memory", 1), ("steps", 1), ("requests", 100)):
        if getattr(flags, name) < low:
            raise ConfigurationError(f"--{name} is {getattr(flags, name):g}; allowed: {low} or more")
    base = times.ASCEND_910B3 if flags.kind == "npu" else times.H100
    measured = times.read_measured(flags.measured, base) if flags.measured else base
    machine = planner.Machine(flags.kind, flags.devices, flags.memory)
    workload = planner.Workload(generated_size(times.read_size(flags.size)), flags.steps)
    found = list(planner.estimates(machine, workload, measured))
    best = planner.recommended(found)
    loads = planner.latencies(best, workload, measured, flags.requests, flags.seed) if best else ()
    return {
        "machine": vars(machine),
        "size": f"{workload.size.width}x{workload.size.height}",
        "steps": flags.steps,
        "times": measured.source,
        "note": NOT_MEASURED if flags.kind == "npu" and not flags.measured else "",
        "profiles": [
            {**vars(estimate), "profile": estimate.profile.name, "cards": len(estimate.profile.devices)}
            for estimate in found
        ],
        "recommended": best.profile.name if best else "",
        "loads": [vars(latency) for latency in loads],
    }


def _lines(report: dict[str, Any]) -> list[str]:
    machine = report["machine"]
    lines = [
        f"{machine['devices']} x {machine['kind']} of {machine['gigabytes']:g} GB; "
        f"{report['size']}, {report['steps']} steps",
        f"times: {report['times']}" + (f" ({report['note']})" if report["note"] else ""),
        "",
        f"{'profile':<16}{'cards':>6}{'GB a card':>11}{'images/min':>12}{'single':>10}  {'DiTs per AR':>12}",
    ]
    for row in report["profiles"]:
        line = f"{row['profile']:<16}{row['cards']:>6}{row['gigabytes_a_card']:>11.1f}"
        if row["refusal"]:
            lines.append(f"{line}  {row['refusal']}")
        else:
            rate, seconds, feeds = row["images_per_second"] * 60, row["seconds"], row["first_stage_feeds"]
            lines.append(f"{line}{rate:>12.1f}{seconds:>8.1f} s  {feeds:>12.1f}")
    if not report["recommended"]:
        return [*lines, "", "no profile fits this machine"]
    lines += ["", f"recommended: {report['recommended']}; latency with random arrivals:", ""]
    lines.append(f"{'load':>5}{'images/min':>12}{'p50':>10}{'p99':>10}{'AR p50':>13}{'queue p50':>11}")
    for load in report["loads"]:
        lines.append(
            f"{load['load']:>5.0%}{load['rate'] * 60:>12.1f}{load['p50']:>8.1f} s{load['p99']:>8.1f} s"
            f"{load['ar_p50']:>11.1f} s{load['queue_p50']:>9.1f} s"
        )
    return lines
