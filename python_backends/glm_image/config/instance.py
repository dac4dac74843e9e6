"""What an instance of a stage learns when Triton loads it."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm_image.config.schema import ParameterSpec, read_parameters
from glm_image.devices.discovery import find_accelerators
from glm_image.devices.placement import Placement, assign_devices, check_memory_shares, place_instance
from glm_image.errors import ConfigurationError, UnavailableError
from glm_image.lifecycle.context import Timeouts
from glm_image.request.geometry import Size
from glm_image.request.limits import Limits

if TYPE_CHECKING:
    from glm_image.devices.base import Device
    from glm_image.parallel.rank_group import WorkerConfig

logger = logging.getLogger(__name__)

VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Instance:
    """One instance of a model.

    Attributes:
        model: the model's name.
        index: which instance of the model this is, from 0.
        siblings: how many there are, this one included.
        parameters: every declared parameter.
        limits: the largest request.
    """

    model: str
    index: int
    siblings: int
    parameters: dict[str, str]
    limits: Limits

    @classmethod
    def read(cls, args: Mapping[str, str], specs: tuple[ParameterSpec, ...]) -> Instance:
        """Reads the ``args`` of ``TritonPythonModel.initialize``.

        Raises:
            ConfigurationError: a parameter is not known or has a value that is not allowed.
        """
        logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {args['model_instance_name']} %(message)s")
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        index, siblings = position(args)
        return cls(
            model=args["model_name"],
            index=index,
            siblings=siblings,
            parameters=read_parameters(specs, given),
            limits=Limits.from_parameters(given),
        )

    def take_place(self, *, reserve_first: bool) -> Placement:
        """Chooses this instance's devices and hides all others from this process.

        To be called before anything imports the framework, which looks but once.

        Args:
            reserve_first: whether ``auto`` leaves the first of several cards to the other stage.

        Raises:
            ConfigurationError: ``devices`` does not fit the instances or this machine.
        """
        cards, devices = find_accelerators(), self.parameters["devices"]
        entries = assign_devices(devices, self.siblings, cards, reserve_first=reserve_first)
        check_memory_shares(entries, self.share("memory_utilization"), cards)
        taken = place_instance(entries, self.index, cards)
        os.environ.update(taken.environment)
        told = "".join(f", {name}={value}" for name, value in taken.environment.items())
        logger.info(
            "instance %d of %d takes %s: devices is %s, found %s%s",
            self.index,
            self.siblings,
            taken,
            devices,
            cards,
            told,
        )
        return taken

    def workers(self, place: Placement, device: Device, on_loss: Callable[[UnavailableError], None]) -> WorkerConfig:
        """Returns the other devices of an instance that spans several.

        Args:
            place: from ``take_place``.
            device: the first one.
            on_loss: called when a rank is lost.
        """
        from glm_image.parallel.rank_group import WorkerConfig  # noqa: PLC0415 - imports torch

        hang_seconds = self.seconds("hang_seconds", device.hang_seconds) or math.inf
        return WorkerConfig(place.local_names[1:], place.devices[1:], hang_seconds, on_loss=on_loss)

    @property
    def name(self) -> str:
        """The model's name and the index."""
        return f"{self.model}_{self.index}"

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's folder, environment variables filled in."""
        text = self.parameters["checkpoint"]
        for name in VARIABLE.findall(text):
            if not os.environ.get(name):
                raise ConfigurationError(f"checkpoint is {text!r}, but the environment has no {name}; set it")
        return Path(VARIABLE.sub(lambda match: os.environ[match[1]], text))

    @property
    def timeouts(self) -> Timeouts:
        """How long requests may take."""
        return Timeouts(*(self.integer(f"{name}_timeout_ms", 0) * 1000 for name in ("default", "max")))

    def integer(self, name: str, low: int) -> int:
        """Returns a parameter that is a whole number of at least ``low``."""
        text = self.parameters[name]
        if not re.fullmatch(r"\d{1,9}", text) or int(text) < low:
            raise ConfigurationError(f"{name} is {text!r}; allowed: a whole number of at least {low}")
        return int(text)

    def optional_integer(self, name: str, low: int) -> int | None:
        """Returns a parameter that is ``none`` or a whole number of at least ``low``."""
        text = self.parameters[name]
        if text == "none":
            return None
        if not re.fullmatch(r"\d{1,9}", text) or int(text) < low:
            raise ConfigurationError(f"{name} is {text!r}; allowed: none, or a whole number of at least {low}")
        return int(text)

    def limit(self, name: str) -> int:
        """Returns a parameter that is a number of things, or -1 for any number."""
        text = self.parameters[name]
        if text != "-1" and not re.fullmatch(r"\d{1,9}", text):
            raise ConfigurationError(f"{name} is {text!r}; allowed: a whole number of at least 0, or -1 (no limit)")
        return int(text)

    def integers(self, name: str) -> tuple[int, ...]:
        """Returns a parameter that is a list of whole numbers such as ``8`` or ``[1, 8]``; () when it is empty."""
        text = self.parameters[name].strip()
        inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        if not inner.strip():
            return ()
        numbers = [number.strip() for number in inner.split(",")]
        if not all(re.fullmatch(r"\d{1,9}", number) for number in numbers):
            raise ConfigurationError(f"{name} is {text!r}; allowed: empty, or whole numbers with commas between")
        return tuple(int(number) for number in numbers)

    def sizes(self, name: str, default: tuple[Size, ...]) -> tuple[Size, ...]:
        """Returns a parameter that is ``auto``, ``none`` or sizes such as ``1024x1024,1920x1024`` (width first)."""
        text = self.parameters[name]
        if text in {"auto", "none"}:
            return default if text == "auto" else ()
        sizes = [re.fullmatch(r"(\d{1,4})x(\d{1,4})", part.strip()) for part in text.split(",")]
        low, high = self.limits.min_side, self.limits.max_side
        if not all(size and all(low <= int(side) <= high for side in size.groups()) for size in sizes):
            raise ConfigurationError(
                f"{name} is {text!r}; allowed: auto, none, or WIDTHxHEIGHT of {low} to {high}, with commas between"
            )
        return tuple(Size(height=int(size[2]), width=int(size[1])) for size in sizes if size)

    def seconds(self, name: str, default: float) -> float:
        """Returns a parameter that is ``auto`` or a number of at least 0."""
        text = self.parameters[name]
        if text == "auto":
            return default
        if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text):
            raise ConfigurationError(f"{name} is {text!r}; allowed: auto, or a number of at least 0")
        return float(text)

    def share(self, name: str) -> float:
        """Returns a parameter that is a number above 0 and at most 1."""
        value = _number(self.parameters[name])
        if not 0 < value <= 1:
            raise ConfigurationError(f"{name} is {self.parameters[name]!r}; allowed: above 0, at most 1")
        return value

    def threshold(self, name: str) -> float:
        """Returns a parameter that is a number of at least 0."""
        value = _number(self.parameters[name])
        if not 0 <= value < math.inf:
            raise ConfigurationError(f"{name} is {self.parameters[name]!r}; allowed: a number of at least 0")
        return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def position(args: Mapping[str, str]) -> tuple[int, int]:
    """Returns which instance of a model this is, counted over all its groups, and how many there are."""
    groups: Sequence[Mapping[str, Any]] = json.loads(args["model_config"]).get("instance_group", ())
    name, index, count = args["model_instance_name"], None, 0
    for number, group in enumerate(groups or ({},)):
        group_name, size = group.get("name") or f"{args['model_name']}_{number}", int(group.get("count") or 1)
        names = [f"{group_name}_{one}" for one in range(size)]
        if name in names:
            index = count + names.index(name)
        count += size
    if index is None:
        raise ConfigurationError(f"the instance is named {name!r}, which instance_group does not give to any")
    return index, count
