"""The parameters of ``config.pbtxt``: one dataclass a stage.

They are read with ``glm_image.request.declaration.read``. The engines' own settings are groups within them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from glm_image.ar.admission import ADMISSIONS
from glm_image.ar.settings import ArSettings
from glm_image.dit.settings import DitSettings, sizes_text
from glm_image.errors import ConfigurationError
from glm_image.lifecycle.timeouts import Timeouts
from glm_image.provenance.settings import ProvenanceSettings
from glm_image.request.declaration import choice, group, number, text, whole
from glm_image.request.limits import LIMIT_PREFIX, Limits
from glm_image.safety.settings import SafetySettings

VARIABLE: Final = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class StageParameters:
    """The parameters of both stages."""

    checkpoint: str = text(
        "${GLM_IMAGE_CHECKPOINT}",
        "Folder of the checkpoint; `serve --checkpoint` sets the variable.",
        allowed="a path; environment variables are filled in",
    )
    devices: str = text(
        "auto",
        "Devices of the instances: `;` between instances, `,` between the devices of one instance. `auto` takes "
        "the accelerators, else the CPU; of several, the first is for `glm_ar` and the others for `glm_dit`.",
        allowed="auto, or of cpu, cpu:N, cuda:N, npu:N",
    )
    load_format: str = choice(
        "auto", ("auto", "dummy"), "`dummy` uses random weights of the configured sizes, for benchmarks."
    )
    default_timeout_ms: int = whole(0, "Timeout of requests that do not set `timeout`; 0 = no limit.", low=0, unit="ms")
    max_timeout_ms: int = whole(0, "Longest timeout of any request; 0 = no limit.", low=0, unit="ms")
    hang_seconds: float | None = number(
        None,
        "Duration of one engine command after which its process counts as hung; 0 = never. `auto` is 60 on "
        "accelerators and 600 on the CPU. See [operations](operations.md).",
        auto=True,
        unit="s",
    )
    checks: SafetySettings = group(SafetySettings)

    @property
    def checkpoint_folder(self) -> Path:
        """The checkpoint's folder, with environment variables filled in."""
        for name in VARIABLE.findall(self.checkpoint):
            if not os.environ.get(name):
                given = f"checkpoint is {self.checkpoint!r}"
                raise ConfigurationError(f"{given}, but the environment has no {name}; set it")
        return Path(VARIABLE.sub(lambda match: os.environ[match[1]], self.checkpoint))

    @property
    def timeouts(self) -> Timeouts:
        return Timeouts(self.default_timeout_ms * 1000, self.max_timeout_ms * 1000)


@dataclass(frozen=True, kw_only=True)
class ArParameters(StageParameters):
    """The parameters of ``glm_ar``."""

    engine: ArSettings = group(ArSettings)
    admission: str = choice(
        "at_once",
        ADMISSIONS,
        "When waiting sequences fill free slots. `gathered` holds them back while `glm_dit` on the same device has "
        "enough images to denoise; see [placement](placement.md). The profiles for one device set it.",
    )
    max_queue_bytes: int = whole(
        512 * 1024 * 1024,
        "Bytes of the source images, and of the data computed from them, of all requests that `glm_ar` holds or that "
        "wait for `glm_dit`; further requests get UNAVAILABLE.",
        low=1,
        unit="bytes",
    )
    limits: Limits = group(Limits, LIMIT_PREFIX)


@dataclass(frozen=True, kw_only=True)
class DitParameters(StageParameters):
    """The parameters of ``glm_dit``."""

    engine: DitSettings = group(DitSettings)
    provenance: ProvenanceSettings = group(ProvenanceSettings, "provenance_")
    limits: Limits = group(Limits, LIMIT_PREFIX)

    def __post_init__(self) -> None:
        low, high = self.limits.min_side, self.limits.max_side
        sizes = self.engine.warmup_sizes or ()
        if not all(low <= side <= high for size in sizes for side in size):
            raise ConfigurationError(
                f"warmup_sizes is {sizes_text(sizes)!r}; allowed: auto, none, or WIDTHxHEIGHT of {low} to {high}, "
                "with commas between"
            )
        object.__setattr__(self, "engine", replace(self.engine, largest_side=high))


PARAMETERS: Final[Mapping[str, type[StageParameters]]] = {"glm_ar": ArParameters, "glm_dit": DitParameters}
