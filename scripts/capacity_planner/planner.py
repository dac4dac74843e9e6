"""What each profile gives on a machine, and which one to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from capacity_planner.memory import card_bytes, shares
from capacity_planner.simulation import Layout, Work, percentile, poisson_arrivals, saturate, simulate
from capacity_planner.times import StageTimes, tokens_of
from glm_image.config.parameters import ArParameters, DitParameters
from glm_image.config.profiles import PROFILES, Profile
from glm_image.errors import ConfigurationError
from glm_image.parallel.layout import ParallelLayout
from glm_image.request.declaration import read
from glm_image.request.geometry import Size

LOADS: Final = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
"""Shares of what a layout can serve at which its latency is told."""

SATURATING_REQUESTS: Final = 400

WARM_UP_SHARE: Final = 0.1
"""Of the simulated requests, those that come to an empty server and are left out."""


@dataclass(frozen=True)
class Machine:
    """What there is: cards of one kind, each with so many GB (10^9 bytes)."""

    kind: str
    devices: int
    gigabytes: float


@dataclass(frozen=True)
class Asked:
    """What requests ask for: pictures of a size, in so many denoising steps, with guidance."""

    size: Size
    steps: int


@dataclass(frozen=True)
class Option:
    """A profile on a machine.

    Attributes:
        profile: which.
        gigabytes: the most that a card of it holds.
        refusal: why it is not for this machine or cannot be predicted; "" where it can.
        images_per_second: the most it keeps up; 0 where it is refused.
        seconds: of a request that nobody else is there for.
        feeds: second stages that one first stage keeps busy.
    """

    profile: Profile
    gigabytes: float
    refusal: str = ""
    images_per_second: float = 0.0
    seconds: float = 0.0
    feeds: float = 0.0


def work_of(profile: Profile, asked: Asked, times: StageTimes) -> Work:
    """Returns what a picture asks of the stages of a profile."""
    of_one = times.int8_step if profile.ar.parameters.get("quantization") == "int8" else 1.0
    of_one *= times.splits.select_decode_step(len(profile.ar.entries[0]))
    painting = painting_seconds(profile, asked, times)
    return Work(
        tokens=tokens_of(asked.size),
        prefill=times.prefill,
        step=lambda running: times.step(running) * of_one,
        paint=lambda _: painting,
        finish=times.pixels(times.vae, asked.size),
        encode=times.pixels(times.encode, asked.size),
        overhead=times.overhead,
    )


def painting_seconds(profile: Profile, asked: Asked, times: StageTimes) -> float:
    """Returns what the conditions and steps of a picture take."""
    split = ParallelLayout.parse(profile.dit.parameters.get("parallel", "auto"), len(profile.dit.entries[0]))
    return times.condition + asked.steps * times.denoise_step(asked.size) * times.splits.denoising_step(split)


def layout_of(profile: Profile) -> Layout:
    """Returns the instances of a profile; several devices of one are a device here."""
    parameters = read(ArParameters, profile.ar.values())
    return Layout(
        ar=tuple(map(",".join, profile.ar.entries)),
        dit=tuple(map(",".join, profile.dit.entries)),
        slots=parameters.engine.max_num_seqs,
        admission=parameters.admission,
    )


def options(machine: Machine, asked: Asked, times: StageTimes) -> Iterator[Option]:
    """Tells of every profile for a kind of card."""
    for profile in PROFILES.values():
        if profile.name.startswith(f"{machine.kind}-"):
            yield _option(profile, machine, asked, times)


def _option(profile: Profile, machine: Machine, asked: Asked, times: StageTimes) -> Option:
    held = card_bytes(profile, asked.size)
    most = max(held.values()) / 1e9
    refusal = ""
    usable = {device: machine.gigabytes * min(1.0, share) for device, share in shares(profile).items()}
    if len(profile.devices) > machine.devices:
        refusal = f"needs {len(profile.devices)} cards"
    elif any(size / 1e9 > usable[device] for device, size in held.items()):
        refusal = f"needs cards of {most / min(1.0, max(shares(profile).values())):.0f} GB"
    else:
        refusal = _not_served(profile)
    if refusal:
        return Option(profile, most, refusal)
    layout, work = layout_of(profile), work_of(profile, asked, times)
    alone = simulate(layout, work, [0.0]).latencies[0]
    feeds = (painting_seconds(profile, asked, times) + work.finish) / (
        work.prefill + (work.tokens - 1) * work.step(layout.slots) / layout.slots
    )
    kept_up = saturate(layout, work, SATURATING_REQUESTS).throughput
    return Option(profile, most, "", kept_up, alone, feeds)


def _not_served(profile: Profile) -> str:
    """Returns the words with which a stage of this version refuses a profile, "" where both take it."""
    try:
        read(ArParameters, profile.ar.values())
        read(DitParameters, profile.dit.values())
    except ConfigurationError as error:
        return str(error)
    return ""


def recommended(found: Sequence[Option]) -> Option | None:
    """Returns the option with the most pictures a second; of equals, the one with the fewest cards.

    Quantized weights are an approximation: they are recommended where nothing else fits.
    """
    usable = [option for option in found if not option.refusal]

    def merit(option: Option) -> tuple[bool, float, int]:
        return not option.profile.is_quantized, option.images_per_second, -len(option.profile.devices)

    return max(usable, key=merit, default=None)


@dataclass(frozen=True)
class Latency:
    """Seconds of requests that come at random, so many a second."""

    load: float
    rate: float
    p50: float
    p99: float
    ar_p50: float
    queue_p50: float


def latencies(option: Option, asked: Asked, times: StageTimes, requests: int, seed: int) -> Iterator[Latency]:
    """Simulates an option at several loads."""
    layout, work = layout_of(option.profile), work_of(option.profile, asked, times)
    for load in LOADS:
        rate = load * option.images_per_second
        outcome = simulate(layout, work, poisson_arrivals(rate, requests, seed), seed)
        first = int(requests * WARM_UP_SHARE)
        decoding = [end - begin for begin, end in zip(outcome.arrived, outcome.decoded, strict=True)][first:]
        queued = [end - begin for begin, end in zip(outcome.decoded, outcome.painting, strict=True)][first:]
        whole = outcome.latencies[first:]
        p50, p99 = percentile(whole, 50), percentile(whole, 99)
        yield Latency(load, rate, p50, p99, percentile(decoding, 50), percentile(queued, 50))
