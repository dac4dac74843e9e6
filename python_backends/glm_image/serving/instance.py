"""What an instance of a stage learns when Triton loads it."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glm_image.errors import ConfigurationError
from glm_image.geometry import Size
from glm_image.request import Limits
from glm_image.serving.declaration import ParameterSpec, read_parameters

VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Instance:
    """One instance of a model.

    Attributes:
        model: the model's name.
        index: which instance of the model this is, from 0.
        parameters: every declared parameter.
        limits: the largest request.
    """

    model: str
    index: int
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
        return cls(
            model=args["model_name"],
            index=int(args["model_instance_name"].rsplit("_", 1)[-1]),
            parameters=read_parameters(specs, given),
            limits=Limits.from_parameters(given),
        )

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

    def integer(self, name: str, low: int) -> int:
        """Returns a parameter that is a whole number of at least ``low``."""
        text = self.parameters[name]
        if not re.fullmatch(r"\d{1,9}", text) or int(text) < low:
            raise ConfigurationError(f"{name} is {text!r}; allowed: a whole number of at least {low}")
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
        text = self.parameters[name]
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            raise ConfigurationError(f"{name} is {text!r}; allowed: above 0, at most 1")
        return value
