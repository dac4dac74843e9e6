"""The state of a running fleet, as its gateway, Envoy and its members report it."""

from __future__ import annotations

import http.client
import time
import urllib.request
from collections.abc import Callable
from typing import Final

from glm_image.errors import GlmImageError
from local_fleet.fleet import POOLS, LocalFleet, Member

WHOLE_SECONDS: Final = 180.0
"""The longest time until all members are ready again."""
POLL_SECONDS: Final = 0.05
ANSWER_SECONDS: Final = 5.0


class FleetIsBrokenError(GlmImageError):
    """A fleet did not become whole in time."""


def wait_whole(fleet: LocalFleet, cause: str) -> None:
    """Waits until the gateway and the members themselves say that every member is ready.

    Raises:
        FleetIsBrokenError: they do not in ``WHOLE_SECONDS``, or a process has failed; ``cause`` is in the message.
    """
    members = fleet.members.values()
    wanted = {model: sum(member.pool == pool for member in members) for pool, model in POOLS.items()}
    wait_until(fleet, lambda: all(map(_is_ready, members)) and ready_members(fleet) == wanted, cause)


def wait_until(fleet: LocalFleet, condition: Callable[[], object], cause: str) -> None:
    """Waits until a condition of a fleet is true; raises as ``wait_whole``."""
    end = time.monotonic() + WHOLE_SECONDS
    while not condition():
        failure = fleet.failure()
        if failure is not None or time.monotonic() > end:
            raise FleetIsBrokenError(
                f"after {cause}: ready are {ready_members(fleet)}; {failure or 'no process failed'}"
            )
        time.sleep(POLL_SECONDS)


def ready_members(fleet: LocalFleet) -> dict[str, int]:
    """Returns the number of members of each stage that the gateway finds ready."""
    samples = _samples(fleet, "glm_image_gateway_members{")
    names = {model: f'glm_image_gateway_members{{stage="{model}",state="ready"}}' for model in POOLS.values()}
    return {model: int(samples.get(name, 0)) for model, name in names.items()}


def retries_of(fleet: LocalFleet) -> dict[str, float]:
    """Returns how often the present gateway has sent calls again, by the labels of its metric."""
    prefix = "glm_image_gateway_retries_total{"
    return {name.removeprefix(prefix).rstrip("}"): value for name, value in _samples(fleet, prefix).items()}


def active_members(fleet: LocalFleet, pool: str) -> set[str]:
    """Returns the addresses of the members of a pool that have requests, as Envoy counts them."""
    found = set()
    for line in _text(f"{fleet.envoy_admin}/clusters").splitlines():
        name, _, rest = line.partition("::")
        address, _, statistic = rest.partition("::")
        if name == pool and statistic.startswith("rq_active::") and statistic != "rq_active::0":
            found.add(address)
    return found


def _samples(fleet: LocalFleet, prefix: str) -> dict[str, float]:
    lines = [line for line in _text(f"{fleet.url}/metrics").splitlines() if line.startswith(prefix)]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def _is_ready(member: Member) -> bool:
    url = f"http://{member.host}:{member.ports['--http-port']}/v2/health/ready"
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS):
            return True
    except (OSError, http.client.HTTPException):
        return False


def _text(url: str) -> str:
    """Returns what a service of the fleet says; empty while it is away."""
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as response:
            return str(response.read().decode())
    except (OSError, http.client.HTTPException):
        return ""
