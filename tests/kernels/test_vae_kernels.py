"""The VAE with fused norms against diffusers', in bf16."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from glm_image.checkpoint.checkpoint import RandomTensors, fill
from glm_image.dit.fused.group_norm import GroupNormSilu
from glm_image.dit.fused.vae import fuse_norms
from glm_image.kernels.group_norm_silu import group_norm_silu
from kernels.sizes import relative_error

BF16_ERROR = 0.01


def normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)


# Less than a tile and many tiles; channels and groups that are not powers of two.
@pytest.mark.parametrize(("channels", "groups", "height", "width"), [(16, 8, 5, 3), (48, 8, 16, 8), (1000, 8, 48, 48)])
def test_norm_matches_torch(device: torch.device, channels: int, groups: int, height: int, width: int) -> None:
    image = (normal(device, 1, channels, height, width) * 3 + 5).contiguous(memory_format=torch.channels_last)
    weight, bias = normal(device, channels), normal(device, channels)
    got = group_norm_silu(image, weight, bias, groups, 1e-6)
    want = F.silu(F.group_norm(image.float(), groups, weight.float(), bias.float(), 1e-6))
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(got, want) < BF16_ERROR


def test_autoencoder_matches_diffusers(device: torch.device) -> None:
    with torch.device("meta"):
        theirs = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 32),
            norm_num_groups=8,
        )
    fill(theirs, RandomTensors(device, torch.bfloat16))
    ours = copy.deepcopy(theirs)
    fuse_norms(ours, GroupNormSilu)
    ours.to(memory_format=torch.channels_last)
    assert sum(isinstance(part, GroupNormSilu) for part in ours.modules()) == 22
    latents, picture = normal(device, 1, 4, 4, 6), normal(device, 1, 3, 8, 12)
    with torch.inference_mode():
        pictures = [vae.decode(latents).sample for vae in (ours, theirs)]
        encoded = [vae.encode(picture).latent_dist.mode() for vae in (ours, theirs)]
        theirs.float()
        exact = theirs.decode(latents.float()).sample, theirs.encode(picture.float()).latent_dist.mode()
    for (of_ours, of_theirs), unrounded in zip((pictures, encoded), exact, strict=True):
        assert relative_error(of_ours, unrounded) < 1.5 * relative_error(of_theirs, unrounded) < 0.1
