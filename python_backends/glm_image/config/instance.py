"""An instance of a stage, as Triton loads it."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from glm_image.config.models import POOL_MODELS, SERVED_VARIABLE
from glm_image.config.parameters import ArParameters, DitParameters
from glm_image.devices.discovery import find_accelerators
from glm_image.devices.placement import Placement, assign_devices, check_memory_shares, place_instance
from glm_image.errors import ConfigurationError, UnavailableError
from glm_image.request.declaration import check_names, read
from glm_image.telemetry.logs import start_logging

if TYPE_CHECKING:
    from glm_image.devices.base import Device
    from glm_image.parallel.rank_group import WorkerConfig

logger = logging.getLogger(__name__)

P = TypeVar("P", bound=ArParameters | DitParameters)


@dataclass(frozen=True)
class Instance(Generic[P]):
    """One instance of a model: number ``index``, counted from 0, of ``siblings``."""

    model: str
    index: int
    siblings: int
    parameters: P

    @classmethod
    def read(cls, args: Mapping[str, str], kind: type[P]) -> Instance[P]:
        """Reads the ``args`` of ``TritonPythonModel.initialize``."""
        start_logging(args["model_instance_name"])
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        check_names(kind, given)
        index, siblings = position(args)
        return Instance(args["model_name"], index, siblings, read(kind, given))

    def take_place(self, *, reserve_first: bool) -> Placement:
        """Chooses this instance's devices and hides all others from this process.

        Call it before anything imports torch, which looks for devices only once. With ``reserve_first``, ``auto``
        leaves the first of several devices to the other stage, if this server has it.
        """
        cards, devices = find_accelerators(), self.parameters.devices
        reserve_first = reserve_first and len(served_stages()) > 1
        entries = assign_devices(devices, self.siblings, cards, reserve_first=reserve_first)
        check_memory_shares(entries, self.parameters.engine.memory_utilization, cards)
        chosen = place_instance(entries, self.index, cards)
        os.environ.update(chosen.environment)
        variables = "".join(f", {name}={value}" for name, value in chosen.environment.items())
        taken = f"instance {self.index} of {self.siblings} takes {chosen}"
        logger.info("%s: devices is %s, found %s%s", taken, devices, cards, variables)
        return chosen

    def workers(self, place: Placement, device: Device, on_loss: Callable[[UnavailableError], None]) -> WorkerConfig:
        """Returns the configuration of the worker processes of an instance on several devices.

        ``device`` is the first one; ``on_loss`` is called when a rank is lost.
        """
        from glm_image.parallel.rank_group import WorkerConfig  # noqa: PLC0415 - imports torch

        hang_seconds = self.hang_seconds(device) or math.inf
        return WorkerConfig(place.local_names[1:], place.devices[1:], hang_seconds, on_loss=on_loss)

    def hang_seconds(self, device: Device) -> float:
        """Returns the duration of an engine command after which its process counts as hung; 0 = never."""
        configured = self.parameters.hang_seconds
        return device.hang_seconds if configured is None else configured

    @property
    def name(self) -> str:
        return f"{self.model}_{self.index}"


def position(args: Mapping[str, str]) -> tuple[int, int]:
    """Returns the index of an instance over all groups of its model, and the number of instances."""
    groups: Sequence[Mapping[str, Any]] = json.loads(args["model_config"]).get("instance_group", ())
    name, index, count = args["model_instance_name"], None, 0
    for number, group in enumerate(groups or ({},)):
        group_name, size = group.get("name") or f"{args['model_name']}_{number}", int(group.get("count") or 1)
        names = [f"{group_name}_{index_in_group}" for index_in_group in range(size)]
        if name in names:
            index = count + names.index(name)
        count += size
    if index is None:
        raise ConfigurationError(f"the instance is named {name!r}, which no group of instance_group gives")
    return index, count


def served_stages() -> tuple[str, ...]:
    """Returns the stages that this server serves; both, unless ``serve --models`` names them."""
    names = os.environ.get(SERVED_VARIABLE)
    return tuple(names.split(",")) if names else tuple(POOL_MODELS)


def is_pool_member() -> bool:
    """Returns whether the stages of this server have been named, so that their callers are those of a pool."""
    return bool(os.environ.get(SERVED_VARIABLE))
