#!/usr/bin/env python3
"""Measures the VAE's decoder: its variants, how their pixels differ, their working memory. Prints JSON lines.

For the real size without its weights:

    scripts/make_tiny_checkpoint.py --preset full --weights none FULL
    scripts/bench/vae.py --checkpoint FULL --size 1024x1024,2048x2048 --profile
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from measure import engine_parser, parse, report, size_name
from numpy.typing import NDArray
from timing import open_benchmark_device, report_ceilings, report_kernels, seconds, synchronizer

from glm_image.checkpoint.checkpoint import Checkpoint, fill
from glm_image.devices.base import Device
from glm_image.devices.cpu import CpuDevice
from glm_image.dit.vae import Vae
from glm_image.request.geometry import Size

KERNELS_REPORTED = 8
PIXELS_PER_LATENT = 8
BRIEF = {"sizes": "64x64", "repeats": 1}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = engine_parser("vae.py", __doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of each figure, a median (%(default)s)")
    parser.add_argument("--profile", action="store_true", help="also report the kernels of a decode of the first size")
    return parse(parser, arguments, BRIEF)


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse_arguments(arguments)
    device = open_benchmark_device(flags.device)
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    report_ceilings(device, brief=flags.brief)
    autoencoder = load_autoencoder(checkpoint, device)
    with torch.inference_mode():
        for index, size in enumerate(flags.sizes):
            measure_size(autoencoder, device, size, flags, is_first=index == 0)
    return 0


def load_autoencoder(checkpoint: Checkpoint, device: Device) -> Any:
    """Loads diffusers' autoencoder."""
    from diffusers import AutoencoderKL  # noqa: PLC0415 - it takes long to import

    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(checkpoint.config("vae"))
    fill(autoencoder, checkpoint.tensors("vae", device.torch_device, device.default_dtype))
    return autoencoder


def variants(autoencoder: Any, device: Device) -> Iterator[tuple[str, Vae]]:
    """Yields the variants of the decoder, each before the next is made."""
    # A device without kernels leaves diffusers' modules as they are.
    plain = CpuDevice(device.torch_device)
    yield "plain", Vae(copy.deepcopy(autoencoder), plain)
    # Not served: the choice depends on the clock, so two starts of a server could give different pixels.
    torch.backends.cudnn.benchmark = True
    yield "plain, convolutions chosen by trial", Vae(copy.deepcopy(autoencoder), plain)
    torch.backends.cudnn.benchmark = False
    yield "channels last", Vae(copy.deepcopy(autoencoder).to(memory_format=torch.channels_last), plain)
    if device.runs_triton:
        yield "channels last, fused norms", Vae(copy.deepcopy(autoencoder), device)
        torch.backends.cudnn.benchmark = True
        yield "channels last, fused norms, convolutions chosen by trial", Vae(copy.deepcopy(autoencoder), device)
        torch.backends.cudnn.benchmark = False
    yield "in tiles", Vae(copy.deepcopy(autoencoder), device, tiling=True)


def measure_size(autoencoder: Any, device: Device, size: Size, flags: argparse.Namespace, *, is_first: bool) -> None:
    """All variants at one size; those of the first size are compared with fp32."""
    shape = (1, autoencoder.config.latent_channels, size.height // PIXELS_PER_LATENT, size.width // PIXELS_PER_LATENT)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device.torch_device)
    named, exact = {"size": size_name(size)}, None
    if is_first:
        exact_vae = Vae(copy.deepcopy(autoencoder).float(), CpuDevice(device.torch_device))
        exact = measure(exact_vae, latents, None, device, flags.repeats, **named, variant="fp32")
        del exact_vae
    for variant, vae in variants(autoencoder, device):
        try:
            measure(vae, latents, exact, device, flags.repeats, **named, variant=variant)
        except torch.OutOfMemoryError as error:
            report("vae decode", **named, variant=variant, error=str(error)[:120])
            continue
        if flags.profile and is_first:
            report_kernels(
                lambda vae=vae: vae.decode(latents),  # type: ignore[misc]
                device,
                KERNELS_REPORTED,
                **named,
                variant=variant,
            )


def measure(
    vae: Vae, latents: torch.Tensor, exact: NDArray[np.int64] | None, device: Device, repeats: int, **named: Any
) -> NDArray[np.int64]:
    """Times a decode, with its working memory, and compares the pixels with ``exact``; returns the pixels."""
    pixels = vae.decode(latents).astype(int)
    if device.torch_device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        vae.decode(latents)
        named["working_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        named["reserved_gb"] = torch.cuda.memory_reserved() / 1e9
    took = seconds(lambda: vae.decode(latents), synchronizer(device), repeats, warm_ups=1)
    if exact is not None:
        difference = np.abs(pixels - exact)
        named |= {"largest_difference": int(difference.max()), "mean_difference": float(difference.mean())}
    report("vae decode", **named, seconds=took)
    return pixels


if __name__ == "__main__":
    sys.exit(main())
