"""Settings of the DiT engine. Imports no torch: they are read before a stage chooses its devices."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from glm_image.devices.settings import DeviceSettings
from glm_image.dit.cache import CacheSettings
from glm_image.request.declaration import Parameter, choice, declare, switched_group, text, whole
from glm_image.request.geometry import Size


def _warmup_sizes(default: tuple[Size, ...] | None, help_text: str) -> tuple[Size, ...] | None:
    allowed = "auto, none, or WIDTHxHEIGHT with commas between"
    return declare(default, Parameter(help_text, allowed, {"auto": None, "none": ()}, _sizes, sizes_text))


def _sizes(given: str) -> tuple[Size, ...]:
    found = [re.fullmatch(r"(\d{1,4})x(\d{1,4})", part.strip()) for part in given.split(",")]
    sizes = tuple(Size(height=int(size[2]), width=int(size[1])) for size in found if size)
    if len(sizes) != len(found):
        raise ValueError
    return sizes


def sizes_text(sizes: tuple[Size, ...]) -> str:
    """Returns sizes as ``warmup_sizes`` lists them, width first."""
    return ",".join(f"{size.width}x{size.height}" for size in sizes)


@dataclass(frozen=True)
class DitSettings(DeviceSettings):
    """How the DiT engine runs.

    Attributes:
        warmup_sizes: None = the device's default.
        largest_side: the longest side of an image, in pixels.
    """

    quantization: str = choice(
        "none",
        ("none", "int8", "fp8"),
        "`int8` and `fp8` store the linear layers of the transformer's blocks in 8 bits and quantize activations per "
        "token, so matrix multiplications run in 8 bits. `fp8` needs CUDA and compute capability 8.9. Images change; "
        "see [performance](performance.md).",
    )
    cache: CacheSettings | None = switched_group(
        CacheSettings,
        "cache_",
        "`cache_dit` lets a denoising step reuse the residual that its middle blocks added in an earlier step; see "
        "[cached denoising](cached_denoising.md).",
        on="cache_dit",
    )
    parallel: str = text(
        "none",
        "How the devices of one instance share an image; the factors multiply to the number of devices. See "
        "[placement](placement.md).",
        allowed="none, auto, or of cfg=2, ulysses=N, ring=N, tp=N, with commas between",
    )
    max_num_requests: int = whole(
        4,
        "Requests that an instance holds. Their images take turns at the device; further requests wait in Triton. See "
        "[queues](#queues).",
        low=1,
    )
    warmup_sizes: tuple[Size, ...] | None = _warmup_sizes(
        None,
        "Sizes generated once at load (width first), so that the first request of such a size is as fast as later "
        "ones. `auto` is 1024x1024 on accelerators and none on the CPU.",
    )
    vae_tiling: str = choice(
        "off",
        ("off", "on", "auto"),
        "`on` processes images with a side above 1024 pixels in overlapping tiles that are blended: less memory, "
        "different pixels. `auto` is on if the largest allowed image does not fit into the memory left by the weights; "
        "the choice is made at load.",
    )
    largest_side: int = 2048

    @property
    def pixel_settings(self) -> dict[str, Any]:
        """The settings that change pixels, as a file's record has them."""
        return {
            "quantization": self.quantization,
            "dtype": self.dtype,
            "cache": None if self.cache is None else asdict(self.cache),
            "vae_tiling": self.vae_tiling,
        }
