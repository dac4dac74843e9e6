"""Estimates every profile on a machine and recommends one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from capacity_planner.simulation import Deployment, StageCosts, percentile, poisson_arrivals, saturate, simulate
from capacity_planner.times import StageTimes, image_tokens
from glm_image.config.parameters import ArParameters
from glm_image.config.profiles import PROFILES, Profile
from glm_image.parallel.layout import ParallelLayout
from glm_image.request.declaration import read
from glm_image.request.geometry import Size
from glm_image.sizing.profile_memory import device_bytes, profile_memory

LOADS: Final = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
"""Shares of the highest throughput at which latencies are simulated."""

SATURATING_REQUESTS: Final = 400

WARM_UP_SHARE: Final = 0.1
"""Share of the simulated requests whose latency does not count, because they find an empty server."""


@dataclass(frozen=True)
class Machine:
    """``devices`` cards of one kind, with ``gigabytes`` (10^9 bytes) each."""

    kind: str
    devices: int
    gigabytes: float


@dataclass(frozen=True)
class Workload:
    """Requests for one image each, with guidance."""

    size: Size
    steps: int


@dataclass(frozen=True)
class ProfileEstimate:
    """A profile on a machine.

    Attributes:
        gigabytes_a_card: memory of its fullest card.
        refusal: why it does not run on the machine; "" if it does.
        images_per_second: the highest throughput.
        seconds: latency of a single request.
        first_stage_feeds: DiT instances that one AR instance keeps busy.
    """

    profile: Profile
    gigabytes_a_card: float
    refusal: str = ""
    images_per_second: float = 0.0
    seconds: float = 0.0
    first_stage_feeds: float = 0.0


def stage_costs(profile: Profile, workload: Workload, times: StageTimes) -> StageCosts:
    relative = times.int8_step if profile.ar.parameters.get("quantization") == "int8" else 1.0
    relative *= times.scaling.decode_step(len(profile.ar.entries[0]))
    denoise = denoise_seconds(profile, workload, times)
    return StageCosts(
        tokens=image_tokens(workload.size),
        prefill=times.prefill,
        step=lambda running: times.step(running) * relative,
        denoise=lambda _: denoise,
        finish=times.pixels(times.vae, workload.size),
        encode=times.pixels(times.encode, workload.size),
        overhead=times.overhead,
    )


def denoise_seconds(profile: Profile, workload: Workload, times: StageTimes) -> float:
    """Returns the seconds of an image's conditioning and denoising steps."""
    layout = ParallelLayout.parse(profile.dit.parameters.get("parallel", "auto"), len(profile.dit.entries[0]))
    step = times.denoise_step(workload.size) * times.scaling.denoise_step(layout)
    return times.condition + workload.steps * step


def deployment_of(profile: Profile) -> Deployment:
    """Returns the instances of a profile; an instance over several cards counts as one device."""
    parameters = read(ArParameters, profile.ar.values())
    return Deployment(
        ar=tuple(map(",".join, profile.ar.entries)),
        dit=tuple(map(",".join, profile.dit.entries)),
        slots=parameters.engine.max_num_seqs,
        admission=parameters.admission,
    )


def estimates(machine: Machine, workload: Workload, times: StageTimes) -> Iterator[ProfileEstimate]:
    for profile in PROFILES.values():
        if profile.name.startswith(f"{machine.kind}-"):
            yield _estimate(profile, machine, workload, times)


def _estimate(profile: Profile, machine: Machine, workload: Workload, times: StageTimes) -> ProfileEstimate:
    gigabytes = max(device_bytes(profile, workload.size).values()) / 1e9
    refusal = _refusal(profile, machine, workload)
    if refusal:
        return ProfileEstimate(profile, gigabytes, refusal)
    deployment, costs = deployment_of(profile), stage_costs(profile, workload, times)
    single = simulate(deployment, costs, [0.0]).latencies[0]
    feeds = (denoise_seconds(profile, workload, times) + costs.finish) / (
        costs.prefill + (costs.tokens - 1) * costs.step(deployment.slots) / deployment.slots
    )
    throughput = saturate(deployment, costs, SATURATING_REQUESTS).throughput
    return ProfileEstimate(profile, gigabytes, "", throughput, single, feeds)


def _refusal(profile: Profile, machine: Machine, workload: Workload) -> str:
    if len(profile.devices) > machine.devices:
        return f"needs {len(profile.devices)} cards"
    instances = profile_memory(profile, workload.size)
    if all(instance.fits(machine.gigabytes) for instance in instances):
        return ""
    needed = max(instance.memory.total / instance.share for instance in instances)
    return f"needs cards of {math.ceil(needed / 1e9)} GB"


def recommended(found: Sequence[ProfileEstimate]) -> ProfileEstimate | None:
    """Returns the estimate with the highest throughput; of equal ones, the one with the fewest cards.

    Quantized weights are an approximation: they are recommended only if nothing else fits.
    """
    usable = [estimate for estimate in found if not estimate.refusal]

    def merit(estimate: ProfileEstimate) -> tuple[bool, float, int]:
        return not estimate.profile.is_quantized, estimate.images_per_second, -len(estimate.profile.devices)

    return max(usable, key=merit, default=None)


@dataclass(frozen=True)
class Latency:
    """Latencies in seconds of requests with random arrivals, ``rate`` a second on average."""

    load: float
    rate: float
    p50: float
    p99: float
    ar_p50: float
    queue_p50: float


def latencies(
    estimate: ProfileEstimate, workload: Workload, times: StageTimes, requests: int, seed: int
) -> Iterator[Latency]:
    deployment, costs = deployment_of(estimate.profile), stage_costs(estimate.profile, workload, times)
    for load in LOADS:
        rate = load * estimate.images_per_second
        outcome = simulate(deployment, costs, poisson_arrivals(rate, requests, seed), seed)
        first = int(requests * WARM_UP_SHARE)
        decoding = [end - begin for begin, end in zip(outcome.arrived, outcome.decoded, strict=True)][first:]
        queued = [end - begin for begin, end in zip(outcome.decoded, outcome.denoise_started, strict=True)][first:]
        whole = outcome.latencies[first:]
        p50, p99 = percentile(whole, 50), percentile(whole, 99)
        yield Latency(load, rate, p50, p99, percentile(decoding, 50), percentile(queued, 50))
