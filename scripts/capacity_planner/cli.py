"""The command: flags in, tables out."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_image.errors import GlmImageError

EXIT_DONE, EXIT_FAILED, EXIT_REFUSED = 0, 1, 2
NOT_MEASURED = "no NPU has been measured: these are the times of another card"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags; an unknown one ends the process with code 2."""
    parser = argparse.ArgumentParser(prog="python -m capacity_planner", description="Plans a layout of both stages.")
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="cards of the machine")
    parser.add_argument("--memory", type=float, required=True, metavar="GB", help="of each card, in 10^9 bytes")
    parser.add_argument("--kind", choices=("npu", "cuda"), default="npu", help="of the cards (default: %(default)s)")
    parser.add_argument("--size", default="1024x1024", metavar="WxH", help="of the pictures (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="denoising steps (default: %(default)s)")
    parser.add_argument("--measured", type=Path, nargs="+", default=[], metavar="FILE", help="lines of scripts/bench")
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="to simulate a load (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of their arrivals (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints every profile for the machine, the recommended one, and its latency under load; returns the exit code."""
    flags = parse_arguments(arguments)
    if importlib.util.find_spec("simpy") is None:
        print("error: the package simpy is not installed; install this project with its extra 'plan'", file=sys.stderr)
        return EXIT_REFUSED
    try:
        told = plan(flags)
    except GlmImageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_REFUSED
    print(json.dumps(told, indent=2) if flags.json else "\n".join(_lines(told)))
    return EXIT_DONE if told["recommended"] else EXIT_FAILED


def plan(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns all that there is to tell, as plain values.

    Raises:
        ConfigurationError: a flag is not usable.
    """
    # These import torch and simpy, which a refusal of flags need not wait for.
    from capacity_planner import planner, times  # noqa: PLC0415
    from glm_image.errors import ConfigurationError  # noqa: PLC0415
    from glm_image.request.geometry import generated_size  # noqa: PLC0415

    for name, low in (("devices", 1), ("memory", 1), ("steps", 1), ("requests", 100)):
        if getattr(flags, name) < low:
            raise ConfigurationError(f"--{name} is {getattr(flags, name):g}; allowed: {low} or more")
    measured = times.read_measured(flags.measured) if flags.measured else times.H100
    machine = planner.Machine(flags.kind, flags.devices, flags.memory)
    asked = planner.Asked(generated_size(times.read_size(flags.size)), flags.steps)
    found = list(planner.options(machine, asked, measured))
    best = planner.recommended(found)
    return {
        "machine": vars(machine),
        "size": f"{asked.size.width}x{asked.size.height}",
        "steps": flags.steps,
        "times": measured.source,
        "note": NOT_MEASURED if flags.kind == "npu" and not flags.measured else "",
        "profiles": [
            {
                "profile": option.profile.name,
                "cards": len(option.profile.devices),
                "gigabytes_a_card": option.gigabytes,
                "images_per_second": option.images_per_second,
                "seconds": option.seconds,
                "first_stage_feeds": option.feeds,
                "refusal": option.refusal,
            }
            for option in found
        ],
        "recommended": best.profile.name if best else "",
        "loads": [vars(one) for one in planner.latencies(best, asked, measured, flags.requests, flags.seed)]
        if best
        else [],
    }


def _lines(told: dict[str, Any]) -> list[str]:
    machine = told["machine"]
    lines = [
        f"{machine['devices']} x {machine['kind']} of {machine['gigabytes']:g} GB; "
        f"{told['size']}, {told['steps']} steps",
        f"times: {told['times']}" + (f" ({told['note']})" if told["note"] else ""),
        "",
        f"{'profile':<16}{'cards':>6}{'GB a card':>11}{'images/min':>12}{'alone':>10}  {'a first stage feeds':>20}",
    ]
    for one in told["profiles"]:
        line = f"{one['profile']:<16}{one['cards']:>6}{one['gigabytes_a_card']:>11.1f}"
        if one["refusal"]:
            lines.append(f"{line}  {one['refusal']}")
        else:
            rate, seconds, feeds = one["images_per_second"] * 60, one["seconds"], one["first_stage_feeds"]
            lines.append(f"{line}{rate:>12.1f}{seconds:>8.1f} s  {feeds:>20.1f}")
    if not told["recommended"]:
        return [*lines, "", "no profile is for this machine"]
    lines += ["", f"recommended: {told['recommended']}; requests that come at random:", ""]
    lines.append(f"{'load':>5}{'images/min':>12}{'p50':>10}{'p99':>10}{'first stage':>13}{'queue':>9}  (p50 each)")
    for load in told["loads"]:
        lines.append(
            f"{load['load']:>5.0%}{load['rate'] * 60:>12.1f}{load['p50']:>8.1f} s{load['p99']:>8.1f} s"
            f"{load['ar_p50']:>11.1f} s{load['queue_p50']:>7.1f} s"
        )
    return lines
