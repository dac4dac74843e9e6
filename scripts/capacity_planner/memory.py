"""Memory of each card in a profile, from the published model's numbers; bytes, GB are 10^9 of them."""

from __future__ import annotations

from collections import Counter
from typing import Final

import torch

from glm_image.ar.memory import activation_bytes, state_bytes, weight_bytes
from glm_image.ar.settings import ArSettings
from glm_image.config.profiles import Profile, StageLayout
from glm_image.devices.settings import DeviceSettings
from glm_image.dit.settings import DitSettings
from glm_image.request.declaration import read
from glm_image.request.geometry import Size
from glm_image.sizing import parameter_counts
from glm_image.sizing.inspect import WORKING_MAPS
from glm_image.sizing.reference_sizes import DECODER, GLYPH_ENCODER, TRANSFORMER, VAE

DTYPE: Final = torch.bfloat16

VISION_PARAMETERS: Final = 1_233_012_224
"""Of the first stage beside its decoder, as it holds them."""
TRANSFORMER_PARAMETERS: Final = parameter_counts.transformer(TRANSFORMER)
TRANSFORMER_LINEAR_PARAMETERS: Final = 6_857_162_752
"""Those of its matrices, which int8 halves."""
VAE_PARAMETERS: Final = parameter_counts.vae(VAE)
GLYPH_ENCODER_PARAMETERS: Final = parameter_counts.text_encoder(GLYPH_ENCODER)
VAE_CHANNELS: Final = VAE["block_out_channels"][1]
"""Of the autoencoder's largest feature maps, which are as large as the picture."""


def card_bytes(profile: Profile, size: Size) -> dict[str, int]:
    """Returns what each device of a profile holds when it paints pictures of a size."""
    held: Counter[str] = Counter()
    for entry in profile.ar.entries:
        for device in entry:
            held[device] += first_stage_bytes(profile.ar, len(entry))
    for entry in profile.dit.entries:
        for device in entry:
            held[device] += second_stage_bytes(profile.dit, size)
    return dict(held)


def first_stage_bytes(layout: StageLayout, ranks: int = 1) -> int:
    """Returns the memory of a first stage on each of its devices.

    Over several, the weights of the layers and what is computed are split, and the cache as far as it has heads.
    """
    settings = read(ArSettings, layout.values())
    int8, slots, positions = settings.int8, settings.max_num_seqs, settings.max_sequence_tokens
    embedding = DECODER.vocab_size * DECODER.hidden_size * DTYPE.itemsize
    kept = embedding + VISION_PARAMETERS * DTYPE.itemsize
    split = weight_bytes(DECODER, DTYPE, int8=int8) - embedding
    state = sum(state_bytes(DECODER, slots, positions, DTYPE).values())
    working = activation_bytes(DECODER, slots, positions, DTYPE, int8=int8)
    return kept + (split + working) // ranks + state // min(ranks, DECODER.kv_heads)


def second_stage_bytes(layout: StageLayout, size: Size) -> int:
    """Returns the memory of a second stage on each of its devices; what painting takes is an estimate."""
    parameters = TRANSFORMER_PARAMETERS + VAE_PARAMETERS + GLYPH_ENCODER_PARAMETERS
    weights = parameters * DTYPE.itemsize
    if read(DitSettings, layout.values()).quantization == "int8":
        weights -= TRANSFORMER_LINEAR_PARAMETERS * (DTYPE.itemsize - torch.int8.itemsize)
    working: int = WORKING_MAPS * size.height * size.width * VAE_CHANNELS * DTYPE.itemsize
    return weights + working


def shares(profile: Profile) -> dict[str, float]:
    """Returns for each device of a profile how much of its memory the instances on it may use together."""
    taken: Counter[str] = Counter()
    for layout in (profile.ar, profile.dit):
        settings = read(DeviceSettings, layout.values())
        for entry in layout.entries:
            for device in entry:
                taken[device] += settings.memory_utilization  # type: ignore[assignment]
    return dict(taken)
