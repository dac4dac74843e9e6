"""Loads the second stage, or a rank's part of it, on a device."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, GlmImageTransformer2DModel
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from glm_image.checkpoint import Checkpoint, fill
from glm_image.devices import Device, check_budget
from glm_image.dit.blocks import best_attention, best_blocks
from glm_image.dit.conditioning import Conditioner
from glm_image.dit.executor import Executor, Follower
from glm_image.dit.sequence import SequenceAttention, Sharing, TokenSplit
from glm_image.dit.settings import DitSettings
from glm_image.dit.sharding import ShardedTensors, shard
from glm_image.dit.vae import Vae
from glm_image.parallel.group import Group
from glm_image.parallel.layout import check_heads
from glm_image.parallel.ranks import Ranks


def load_executor(checkpoint: Checkpoint, settings: DitSettings, device: Device, ranks: Ranks) -> Executor | Follower:
    """Loads the transformer, the glyph encoder and the VAE.

    Args:
        checkpoint: where they come from.
        settings: how they run.
        device: where they run.
        ranks: those of ``ranks.tp`` share the transformer's weights; every one has the whole of the others.

    Raises:
        CheckpointError: a tensor is missing or has a wrong shape.
        ConfigurationError: the device is too small, or the heads can't be split so.
    """
    check_heads(checkpoint.config("transformer")["num_attention_heads"], ranks.tp.size, ranks.ulysses.size)
    dtype = settings.dtype or device.default_dtype
    modules = _empty_modules(checkpoint, ranks.tp)
    check_budget(
        "glm_dit",
        fixed={f"the weights of {name}": _bytes(module, dtype) for name, module in modules.items()},
        scaled={},
        memory=device.memory(),
        utilization=settings.memory_utilization,
        device=str(device),
    )
    for component, module in modules.items():
        tensors = checkpoint.tensors(component, device.torch_device, dtype)
        fill(module, ShardedTensors(tensors, ranks.tp) if component == "transformer" else tensors)
    transformer, autoencoder, glyph_encoder = modules.values()
    shared = _sequence_attention(transformer, device, ranks)
    executor = Executor(
        transformer,
        best_blocks(transformer, device, shared),
        Conditioner(transformer, glyph_encoder, ByT5Tokenizer.from_pretrained(checkpoint.path("tokenizer"))),
        Vae(autoencoder),
        checkpoint.config("scheduler"),
        device,
        Sharing(ranks, shared),
    )
    return Follower(executor) if ranks.world.rank else executor


def _sequence_attention(transformer: Any, device: Device, ranks: Ranks) -> SequenceAttention | None:
    if ranks.ring.size * ranks.ulysses.size == 1:
        return None
    split = TokenSplit(ranks.ring, ranks.ulysses)
    return SequenceAttention(split, best_attention(transformer, device), device.attention_with_lse)


def _empty_modules(checkpoint: Checkpoint, group: Group) -> dict[str, Any]:
    with torch.device("meta"):
        modules = {
            "transformer": GlmImageTransformer2DModel.from_config(checkpoint.config("transformer")),
            "vae": AutoencoderKL.from_config(checkpoint.config("vae")),
            "text_encoder": T5EncoderModel(T5Config(**checkpoint.config("text_encoder"))),
        }
    shard(modules["transformer"], group)
    return modules


def _bytes(module: Any, dtype: torch.dtype) -> int:
    return int(sum(weight.numel() for weight in module.parameters()) * dtype.itemsize)
