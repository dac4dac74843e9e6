"""Measures the VAE's decoder: the ways to run it, what each changes, the memory it works in.

Prints JSON lines; see ``dit.py`` for a checkpoint of the real size without its weights.

    scripts/bench/vae.py --checkpoint FULL --sizes 1024x1024,2048x2048
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from measure import arguments, say, say_kernels, seconds

from glm_image.checkpoint.checkpoint import Checkpoint, fill
from glm_image.devices.base import Device
from glm_image.devices.cpu import CpuDevice
from glm_image.devices.open import instance_device, open_device
from glm_image.dit.vae import Vae
from glm_image.request.geometry import Size

KERNELS_SHOWN = 8


def build(checkpoint: Checkpoint, device: Device) -> Any:
    """Loads diffusers' autoencoder."""
    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(checkpoint.config("vae"))
    fill(autoencoder, checkpoint.tensors("vae", device.torch_device, device.default_dtype))
    return autoencoder


def variants(autoencoder: Any, device: Device) -> Iterator[tuple[str, Vae]]:
    """Yields the ways to run it, each before the next is made."""
    # A device for which there are no kernels leaves diffusers' modules as they are.
    plain = CpuDevice(device.torch_device)
    yield "plain", Vae(copy.deepcopy(autoencoder), plain)
    # Only to know what it would give: it chooses by the clock, so that two starts need not give the same picture.
    torch.backends.cudnn.benchmark = True
    yield "plain, convolutions chosen by trial", Vae(copy.deepcopy(autoencoder), plain)
    torch.backends.cudnn.benchmark = False
    last = copy.deepcopy(autoencoder).to(memory_format=torch.channels_last)
    yield "channels last", Vae(last, plain)
    if device.runs_triton:
        yield "channels last, fused norms", Vae(copy.deepcopy(autoencoder), device)
        torch.backends.cudnn.benchmark = True
        yield (
            "channels last, fused norms, convolutions chosen by trial",
            Vae(copy.deepcopy(autoencoder), device),
        )
        torch.backends.cudnn.benchmark = False
    yield "in tiles", Vae(copy.deepcopy(autoencoder), device, tiling=True)


def measure(vae: Vae, latents: torch.Tensor, exact: np.ndarray | None, device: Device, **named: Any) -> np.ndarray:
    """Times a decode, with its peak memory, and compares the picture with ``exact``."""
    on_cuda = device.torch_device.type == "cuda"
    picture = vae.decode(latents)
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        vae.decode(latents)
        named["working_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        named["reserved_gb"] = torch.cuda.memory_reserved() / 1e9
    took = seconds(lambda: vae.decode(latents), lambda: device.mark().wait(), repeats=5, warm_ups=1)
    if exact is not None:
        apart = np.abs(picture.astype(int) - exact)
        named |= {"levels_apart_at_most": int(apart.max()), "levels_apart_mean": float(apart.mean())}
    say("vae decode", **named, seconds=took)
    return picture.astype(int)


def profile(vae: Vae, latents: torch.Tensor, device: Device, **named: Any) -> None:
    """Prints the kernels of a decode that take longest."""
    say_kernels(lambda: vae.decode(latents), lambda: device.mark().wait(), KERNELS_SHOWN, **named)


def main(flags: argparse.Namespace) -> None:
    """Runs all measures."""
    device = open_device(instance_device(flags.device, 0))
    device.bind()
    checkpoint = Checkpoint.open(flags.checkpoint, flags.load_format)
    sizes = [Size(*(int(side) for side in reversed(size.split("x")))) for size in flags.sizes.split(",")]
    autoencoder = build(checkpoint, device)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for size in sizes:
            shape = (1, autoencoder.config.latent_channels, size.height // 8, size.width // 8)
            latents = torch.randn(shape, generator=generator).to(device.torch_device)
            named = {"size": f"{size.width}x{size.height}"}
            exact = None
            if size == sizes[0]:
                # In fp32, whose pictures the others' are compared with.
                whole = Vae(copy.deepcopy(autoencoder).float(), CpuDevice(device.torch_device))
                exact = measure(whole, latents, None, device, **named, how="fp32")
                del whole
            for how, vae in variants(autoencoder, device):
                try:
                    measure(vae, latents, exact, device, **named, how=how)
                except torch.OutOfMemoryError as error:
                    say("vae decode", **named, how=how, error=str(error)[:120])
                    continue
                if flags.profile and device.torch_device.type == "cuda" and size == sizes[0]:
                    profile(vae, latents, device, **named, how=how)


if __name__ == "__main__":
    parser = arguments(__doc__ or "")
    parser.add_argument("--sizes", default="1024x1024", help="WIDTHxHEIGHT, with commas between them")
    parser.add_argument("--profile", action="store_true", help="also print the kernels of a decode of the first size")
    main(parser.parse_args())
