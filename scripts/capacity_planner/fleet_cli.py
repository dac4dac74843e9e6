"""``scripts/plan fleet``: pools of many cards."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from glm_image.errors import ConfigurationError, shown

if TYPE_CHECKING:
    from capacity_planner.fleet_plan import Trial
    from capacity_planner.times import StageTimes
    from glm_image.request.geometry import Size

RESULTS: Final = Path(__file__).resolve().parents[1] / "bench" / "results"
MEASURED: Final = tuple(RESULTS / f"nvidia-h200-{benchmark}.json" for benchmark in ("ar", "dit", "i2i"))
PARTS: Final = ("pools", "routing", "scaling")
MIXES_HELP: Final = (
    "t2i, i2i (with one source image of the image's size), both (half of each), sizes (512x512 and 2048x2048)"
)

Value = TypeVar("Value")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="plan fleet", description="Simulates pools of glm_ar and glm_dit behind gateways, one member a card."
    )

    def add(name: str, default: Any, metavar: str, text: str, kind: Callable[[str], Any] = str) -> None:
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{text} (default: %(default)s)")

    add("--cards", "8,64,1024", "N,...", "cards of both pools together")
    add("--mixes", "t2i,i2i,both", "NAME,...", MIXES_HELP)
    add("--size", "1024x1024", "WxH", "size of the images")
    add("--steps", 50, "N", "denoising steps", int)
    add("--load", 0.8, "SHARE", "of the highest throughput, at which latencies are simulated", float)
    add("--gateways", 1, "N", "gateways, each of which knows only its own requests", int)
    add("--away", 120.0, "SECONDS", "for which a host of eight cards is lost", float)
    add("--lags", "30,120,300", "SECONDS,...", "until a new member is ready, after the decision to add it")
    add("--compared-cards", 64, "N", "cards for the parts routing and scaling", int)
    add("--parts", ",".join(PARTS), "NAME,...", "what to simulate")
    add("--requests", 10, "N", "simulated a card and load", int)
    add("--seed", 0, "N", "of the requests", int)
    parser.add_argument(
        "--measured",
        type=Path,
        nargs="+",
        default=MEASURED,
        metavar="FILE",
        help="output or result files of scripts/bench (default: those of one H200)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


def plan_fleet(arguments: Sequence[str]) -> str:
    """Returns the report; raises ConfigurationError for a flag's value."""
    flags = parse_arguments(arguments)
    found = report(flags)
    return json.dumps(found, indent=2) if flags.json else "\n".join(lines(found))


def report(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the report as plain values; raises ConfigurationError for a flag's value."""
    # These import torch and simpy, for which a refused flag should not wait.
    from capacity_planner import fleet_plan, mixes, times  # noqa: PLC0415
    from glm_image.request.geometry import generated_size  # noqa: PLC0415

    parts = _named("--parts", flags.parts, PARTS)
    _named("--mixes", flags.mixes, mixes.MIXES)
    cards, lags = _numbers("--cards", flags.cards, int, 2), _numbers("--lags", flags.lags, float, 0)
    for name, low, high in (
        ("steps", 1, 200), ("load", 0.01, 0.99), ("gateways", 1, 1000), ("away", 0, 3600),
        ("compared_cards", 2, 10_000), ("requests", 1, 1000),
    ):  # fmt: skip
        if not low <= getattr(flags, name) <= high:
            flag = name.replace("_", "-")
            raise ConfigurationError(f"--{flag} is {getattr(flags, name):g}; allowed: {low:g} to {high:g}")
    measured = times.read_measured(list(flags.measured))
    trial = fleet_plan.Trial(flags.load, flags.requests, flags.gateways, flags.seed)
    size = generated_size(times.read_size(flags.size))
    names = ", ".join(path.name for path in flags.measured)
    found: dict[str, Any] = {"size": flags.size, "steps": flags.steps, "times": names, **vars(trial)}
    if "pools" in parts:
        found["pools"] = list(_pools(flags, cards, size, measured, trial))
    if "routing" in parts:
        found["routing"] = list(_routing(flags, size, measured, trial))
    if "scaling" in parts:
        found["scaling"] = list(_scaling(flags, lags, size, measured, trial))
    return found


def _pools(
    flags: argparse.Namespace, cards: Sequence[int], size: Size, times: StageTimes, trial: Trial
) -> Iterator[dict[str, Any]]:
    from capacity_planner import fleet_plan, mixes  # noqa: PLC0415

    for count in cards:
        for name in flags.mixes.split(","):
            mix = mixes.mix_named(name, size, flags.steps)
            fleet, most = fleet_plan.best_pools(count, mix, times, trial)
            estimate = fleet_plan.pools_estimate(fleet, most, mix, times, trial)
            lost = fleet_plan.lost_host(estimate, fleet, mix, times, flags.away, trial)
            yield {"mix": name, **vars(estimate), "dit_per_ar": estimate.dit_per_ar, "lost_host": vars(lost)}


def _routing(flags: argparse.Namespace, size: Size, times: StageTimes, trial: Trial) -> Iterator[dict[str, Any]]:
    from capacity_planner import fleet_plan, mixes  # noqa: PLC0415

    mix = mixes.mix_named("sizes", size, flags.steps)
    fleet, _ = fleet_plan.best_pools(flags.compared_cards, mix, times, trial)
    for estimate in fleet_plan.compare_routing(fleet, mix, times, trial):
        yield {"cards": flags.compared_cards, "ar": fleet.ar, "dit": fleet.dit, **vars(estimate)}


def _scaling(
    flags: argparse.Namespace, lags: Sequence[float], size: Size, times: StageTimes, trial: Trial
) -> Iterator[dict[str, Any]]:
    from capacity_planner import fleet_plan, mixes  # noqa: PLC0415

    mix = mixes.mix_named("t2i", size, flags.steps)
    fleet, most = fleet_plan.best_pools(flags.compared_cards, mix, times, trial)
    for estimate in fleet_plan.added_members(fleet, most, mix, times, trial, lags):
        yield {"cards": flags.compared_cards, "ar": fleet.ar, "dit": fleet.dit, **vars(estimate)}


def _named(flag: str, text: str, allowed: Sequence[str]) -> list[str]:
    for name in text.split(","):
        if name not in allowed:
            raise ConfigurationError(f"{flag} is {shown(text)}; allowed: {', '.join(allowed)}, with commas between")
    return text.split(",")


def _numbers(flag: str, text: str, kind: Callable[[str], Value], low: float) -> list[Value]:
    try:
        numbers = [kind(part) for part in text.split(",")]
        if all(low <= float(part) <= MOST for part in text.split(",")):
            return numbers
    except ValueError:
        pass
    raise ConfigurationError(f"{flag} is {shown(text)}; allowed: numbers from {low:g} to {MOST:g}, with commas between")


MOST: Final = 10_000


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yields a report as tables."""
    yield f"{found['size']}, {found['steps']} steps; times: {found['times']}; latencies at {found['load']:.0%} load"
    if "pools" in found:
        yield ""
        yield (
            f"{'cards':>5} {'mix':<6}{'AR + DiT':>11}{'images/s':>10}{'p50':>9}{'p99':>9}"
            "   a lost host: images/s, retried, p99"
        )
        for row in found["pools"]:
            lost, pools = row["lost_host"], f"{row['ar']} + {row['dit']}"
            yield (
                f"{row['cards']:>5} {row['mix']:<6}{pools:>11}{row['images_per_second']:>10.2f}{row['p50']:>7.1f} s"
                f"{row['p99']:>7.1f} s{lost['images_per_second']:>24.2f}{lost['retried']:>9}{lost['p99']:>6.0f} s"
            )
    if "routing" in found:
        first = found["routing"][0]
        yield ""
        yield f"512x512 (80 %) and 2048x2048 on {first['ar']} + {first['dit']} cards:"
        yield f"{'policy':<17}{'images/s':>10}{'p50':>9}{'p99':>9}{'p99 of 512x512':>16}"
        for row in found["routing"]:
            yield (
                f"{row['policy']:<17}{row['images_per_second']:>10.2f}{row['p50']:>7.1f} s{row['p99']:>7.1f} s"
                f"{row['p99_of_small']:>14.1f} s"
            )
    if "scaling" in found:
        first = found["scaling"][0]
        yield ""
        yield f"half of {first['dit']} DiT members, requests double; autoscaled:"
        yield f"{'ready after':>11}{'p50':>9}{'p99':>9}{'members':>9}{'last after':>12}"
        for row in found["scaling"]:
            yield (
                f"{row['lag']:>9.0f} s{row['p50']:>7.1f} s{row['p99']:>7.1f} s{row['members']:>9}"
                f"{row['seconds_to_last']:>10.0f} s"
            )
