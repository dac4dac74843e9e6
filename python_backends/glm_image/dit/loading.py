"""Loads the DiT, or a rank's share of it, on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, GlmImageTransformer2DModel
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from glm_image.checkpoint.checkpoint import Checkpoint, fill
from glm_image.checkpoint.files import read_from
from glm_image.devices.base import Device
from glm_image.devices.budget import check_budget
from glm_image.devices.open import named_dtype
from glm_image.dit.conditioning import Conditioner
from glm_image.dit.executor import Executor, Follower
from glm_image.dit.memory import working_bytes
from glm_image.dit.model import DitModel
from glm_image.dit.parallel_context import ParallelContext
from glm_image.dit.quantization import quantize_blocks, weight_bytes
from glm_image.dit.schedule import check_schedule
from glm_image.dit.select_blocks import select_attention, select_blocks
from glm_image.dit.sequence_parallel import SequenceAttention
from glm_image.dit.settings import DitSettings
from glm_image.dit.tensor_parallel import ShardedTensors, shard
from glm_image.dit.vae import Vae
from glm_image.errors import ConfigurationError
from glm_image.parallel.layout import check_heads
from glm_image.parallel.process_group import Ranks
from glm_image.request.geometry import Size

BUILDERS: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "transformer": GlmImageTransformer2DModel.from_config,
    "vae": AutoencoderKL.from_config,
    "text_encoder": lambda config: T5EncoderModel(T5Config(**config)),
}
"""Component -> function that makes its module of its config."""


def load_executor(checkpoint: Checkpoint, settings: DitSettings, device: Device, ranks: Ranks) -> Executor | Follower:
    """Loads the transformer, whose weights the ranks of ``ranks.tp`` share, the glyph encoder and the VAE."""
    dtype = named_dtype(settings.dtype) or device.default_dtype
    modules = _empty_modules(checkpoint, settings, device, dtype, ranks)
    tiling = _check_memory(modules, settings, device, dtype)
    for component, module in modules.items():
        tensors = checkpoint.tensors(component, device.torch_device, dtype)
        fill(module, ShardedTensors(tensors, ranks.tp) if component == "transformer" else tensors)
    transformer, autoencoder, glyph_encoder = modules.values()
    with read_from(checkpoint.path("tokenizer")):
        tokenizer = ByT5Tokenizer.from_pretrained(checkpoint.path("tokenizer"))
    with read_from(checkpoint.path("scheduler") / "scheduler_config.json"):
        check_schedule(checkpoint.config("scheduler"))
    parallel = ParallelContext(ranks)
    blocks = select_blocks(transformer, device, _sequence_attention(transformer, device, parallel))
    executor = Executor(
        DitModel(transformer, blocks, parallel),
        Conditioner(transformer, glyph_encoder, tokenizer),
        Vae(autoencoder, device, tiling=tiling),
        checkpoint.config("scheduler"),
        device,
        settings.cache,
    )
    return Follower(executor) if ranks.world.rank else executor


def _empty_modules(
    checkpoint: Checkpoint, settings: DitSettings, device: Device, dtype: torch.dtype, ranks: Ranks
) -> dict[str, Any]:
    modules = {}
    for component, build in BUILDERS.items():
        with read_from(checkpoint.path(component) / "config.json"), torch.device("meta"):
            modules[component] = build(checkpoint.config(component))
    transformer = modules["transformer"]
    if settings.cache is not None:
        settings.cache.check(len(transformer.transformer_blocks))
    check_heads(transformer.config.num_attention_heads, ranks.tp.size, ranks.ulysses.size)
    shard(transformer, ranks.tp)
    if settings.quantization != "none":
        if ranks.tp.size > 1:
            raise ConfigurationError(
                f"quantization is {settings.quantization!r} and parallel has tp={ranks.tp.size}; allowed with 8 bits: "
                "cfg, ulysses and ring"
            )
        quantize_blocks(transformer, settings.quantization, device, dtype)
    return modules


def _check_memory(modules: Mapping[str, Any], settings: DitSettings, device: Device, dtype: torch.dtype) -> bool:
    """Checks that the weights fit; returns whether the VAE decodes in tiles."""
    weights = {name: weight_bytes(module, dtype) for name, module in modules.items()}
    memory = device.memory()
    check_budget(
        "glm_dit",
        fixed={f"the weights of {name}": size for name, size in weights.items()},
        scaled={},
        memory=memory,
        utilization=settings.memory_utilization,
        device=str(device),
    )
    largest = Size(settings.largest_side, settings.largest_side)
    working = working_bytes(modules["transformer"].config, modules["vae"].config, largest, dtype.itemsize)
    left = int(memory.total * settings.memory_utilization) - sum(weights.values())
    return settings.vae_tiling == "on" or (settings.vae_tiling == "auto" and left < working)


def _sequence_attention(transformer: Any, device: Device, parallel: ParallelContext) -> SequenceAttention | None:
    if not parallel.splits_tokens:
        return None
    ring, ulysses = parallel.ranks.ring, parallel.ranks.ulysses
    attend, backend = select_attention(transformer, device)
    if ring.size > 1:
        backend = device.lse_attention_backend
    return SequenceAttention(ring, ulysses, attend, device.attention_with_lse, backend)
